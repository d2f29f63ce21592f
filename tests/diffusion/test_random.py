import torch

from opensora.diffusion.random import SampleRandom, derive_seed


def test_draws_belong_to_the_sample_not_to_the_batch():
    seeds = [derive_seed(42, 0, i) for i in range(4)]
    together = SampleRandom(seeds)
    first, u, second = together.normal((2, 3)), together.uniform(), together.normal((5,), torch.bfloat16)
    for i in (3, 1, 0):
        alone = SampleRandom(seeds[i : i + 1])
        assert torch.equal(alone.normal((2, 3))[0], first[i])
        assert alone.uniform() == [u[i]]
        assert torch.equal(alone.normal((5,), torch.bfloat16)[0], second[i])


def test_host_draws_do_not_move_the_device_stream():
    a, b = SampleRandom([7]), SampleRandom([7])
    a.uniform()
    assert torch.equal(a.normal((3,)), b.normal((3,)))


def test_selected_samples_share_their_generators():
    whole = SampleRandom([1, 2, 3])
    part = whole.select([2, 0])
    reference = SampleRandom([1, 2, 3])
    expected = reference.normal((4,))
    assert torch.equal(part.normal((4,)), expected[[2, 0]])
    after = whole.normal((4,))  # 0 and 2 are at their second draw, 1 at its first
    assert torch.equal(after[1], expected[1])
    assert torch.equal(after[[0, 2]], reference.normal((4,))[[0, 2]])


def test_scalar_draws_have_the_batch_shape_and_seeds_differ():
    draws = SampleRandom([0, 1]).normal(())
    assert draws.shape == (2,) and draws[0] != draws[1]


def test_derived_seeds_are_fixed_and_distinct():
    assert derive_seed(42, 0, 1) == derive_seed(42, 0, 1)
    assert len({derive_seed(s, p, k) for s in range(3) for p in range(20) for k in range(4)}) == 240
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert 0 <= derive_seed("x") < 2**63
