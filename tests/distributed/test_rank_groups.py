"""What ranks of a job and of its groups tell each other."""

import pytest
import torch


class Picky(OSError):
    """As some libraries make them: not to be made of its message alone."""

    def __init__(self, message: str, *, response: str):
        super().__init__(message)
        self.response = response


def fail_on_main(context):
    def work():
        raise Picky("the hub does not answer", response="503")

    with pytest.raises((ValueError, OSError)) as caught:
        context.on_main(work)
    return str(caught.value)


def test_any_error_of_the_first_rank_reaches_the_others(two_ranks):
    assert two_ranks(fail_on_main) == ["the hub does not answer"] * 2


def talk(context):
    group = context.share_samples(2, 1).model
    mine = torch.arange(3.0) + context.rank
    return group.any([context.rank == 0, context.rank == 1, False]), group.any([]), group.of_first(mine).tolist()


def test_ranks_of_a_group_agree(two_ranks):
    assert two_ranks(talk) == [([True, True, False], [], [0.0, 1.0, 2.0])] * 2


def talk_alone(context):
    return context.model.any([True, False]), context.model.of_first(torch.ones(1)).tolist()


def test_a_rank_without_others(one_rank):
    assert one_rank(talk_alone) == [([True, False], [1.0])]
