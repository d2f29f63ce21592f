"""The sampler's promises, checked on what it yields: nothing lost, nothing repeated, like work in one step."""

import json
import logging
import sys
from collections import Counter, defaultdict
from itertools import chain, islice, pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opensora.common import get_logger
from opensora.data.bucket import Bucket, BucketTable
from opensora.data.plan import balance, micro_batch_cost, order_rows, plan_updates
from opensora.data.random_draws import Purpose, hash_key
from opensora.data.sampler import NUM_SUBSTITUTES, BucketSampler

CONFIG = {"256px": {1: (1.0, 8), 17: (1.0, 3), 33: (1.0, 2)}, "128px": {1: (1.0, 16), 17: (1.0, 5)}}


class Columns:
    """The numbers of a table, without its file."""

    file = "table.csv"

    def __init__(self, num_frames, height, width, fps=None):
        self.num_frames, self.height, self.width = map(np.asarray, (num_frames, height, width))
        self.fps = np.full(len(self), np.nan) if fps is None else np.asarray(fps)

    def __len__(self):
        return len(self.num_frames)

    @property
    def fingerprint(self):
        return str(hash((self.num_frames.tobytes(), self.height.tobytes(), self.width.tobytes())))


def mixed_table(count: int, seed: int = 0) -> Columns:
    random = np.random.default_rng(seed)
    height = random.choice([144, 256, 300], count)
    width = np.where(random.random(count) < 0.5, height, height * 16 // 9)
    return Columns(random.choice([1, 20, 40], count), height, width)


def make(table, config=CONFIG, size=1, rank=0, accumulation=1, **options) -> BucketSampler:
    layout = {"data_parallel_size": size, "data_parallel_rank": rank, "accumulation_steps": accumulation}
    return BucketSampler(table, BucketTable(config, 24), **layout, **options)


def updates_of(table, config=CONFIG, size=1, accumulation=1, state=None, **options) -> list[list[list]]:
    """What all ranks together do: for each update its micro-batches, in the order of slots."""
    ranks = [make(table, config, size, rank, accumulation, **options) for rank in range(size)]
    if state is not None:
        for sampler in ranks:
            sampler.load_state_dict(json.loads(json.dumps(state)))
    steps = [list(slots) for slots in zip(*ranks, strict=True)]  # strict: all ranks yield equally many
    return [list(chain(*steps[i : i + accumulation])) for i in range(0, len(steps), accumulation)]


def rows(updates) -> list[int]:
    return [request.index for update in updates for micro_batch in update for request in micro_batch]


@pytest.fixture
def warnings(caplog):
    get_logger().addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    get_logger().removeHandler(caplog.handler)


def test_micro_batches_are_full_and_of_one_bucket():
    table = mixed_table(500)
    buckets = BucketTable(CONFIG, 24)
    ids = buckets.assign(table.num_frames, table.height, table.width, table.fps).ids
    for micro_batch in make(table):
        bucket = buckets.buckets[ids[micro_batch[0].index]]
        assert len(micro_batch) == bucket.batch_size
        for request in micro_batch:
            assert ids[request.index] == ids[micro_batch[0].index]
            assert request[1:4] == (bucket.num_frames, bucket.height, bucket.width)
            assert type(request.index) is int and type(request.seed) is int


@pytest.mark.parametrize(("size", "accumulation"), [(1, 1), (3, 1), (2, 4)])
def test_an_epoch_visits_each_row_at_most_once_and_leaves_no_whole_update(size, accumulation):
    table = mixed_table(700)
    updates = updates_of(table, size=size, accumulation=accumulation)
    seen = rows(updates)
    assert len(set(seen)) == len(seen)
    assert whole_micro_batches(table, CONFIG, set(seen)) < size * accumulation
    assert all(len(update) == size * accumulation for update in updates)


def whole_micro_batches(table, config, seen) -> int:
    """How many micro-batches the rows that were not seen would make up."""
    buckets = BucketTable(config, 24)
    ids = buckets.assign(table.num_frames, table.height, table.width, table.fps).ids
    rest = Counter(int(bucket) for row, bucket in enumerate(ids) if bucket >= 0 and row not in seen)
    return sum(count // buckets.buckets[bucket].batch_size for bucket, count in rest.items())


@pytest.mark.parametrize(("first", "second"), [((2, 1), (1, 2)), ((4, 1), (2, 2)), ((6, 2), (3, 4))])
def test_accumulation_and_ranks_are_interchangeable(first, second):
    table = mixed_table(600)
    left, right = (updates_of(table, size=size, accumulation=steps) for size, steps in (first, second))
    strip = lambda updates: [[[r._replace(micro_step=0) for r in m] for m in u] for u in updates]  # noqa: E731
    assert strip(left) == strip(right)


def test_order_within_a_bucket_does_not_depend_on_layout_or_batch_size():
    table = mixed_table(600)
    other = {name: {clip: (p, n + 1) for clip, (p, n) in clips.items()} for name, clips in CONFIG.items()}
    orders = []
    for config, size, accumulation in ((CONFIG, 1, 1), (CONFIG, 3, 2), (other, 2, 1)):
        order = defaultdict(list)
        for update in updates_of(table, config, size, accumulation):
            for micro_batch in update:
                order[micro_batch[0][1:4]] += [request.index for request in micro_batch]
        orders.append(order)
    for other_order in orders[1:]:
        for clip, sequence in other_order.items():
            common = min(len(sequence), len(orders[0][clip]))
            assert sequence[:common] == orders[0][clip][:common]


def test_epochs_and_seeds_differ_and_equal_seeds_agree():
    table = mixed_table(300)
    epochs = updates_of(table, epochs=2, seed=5)
    half = len(epochs) // 2
    assert rows(epochs[:half]) != rows(epochs[half:])
    assert updates_of(table, epochs=2, seed=5) == epochs
    assert rows(updates_of(table, seed=6)) != rows(epochs[:half])
    first = rows(epochs[:half])
    assert sum(a < b for a, b in pairwise(first)) < 0.7 * len(first)  # not the table's order


def test_rows_and_micro_batches_that_are_left_over_rotate_between_epochs():
    table = Columns([1] * 19, [256] * 19, [256] * 19)  # 2 micro-batches and 3 rows
    updates = updates_of(table, size=2, epochs=6)
    missing = [frozenset(range(19)) - frozenset(rows([update])) for update in updates]
    assert all(len(rest) == 3 for rest in missing) and len(set(missing)) > 1
    table = Columns([1] * 24, [256] * 24, [256] * 8 + [455] * 8 + [600] * 8)  # 3 micro-batches of different buckets
    updates = updates_of(table, size=2, epochs=12)
    assert len({frozenset(range(24)) - frozenset(rows([update])) for update in updates}) == 3


@settings(max_examples=10, deadline=None)
@given(count=st.integers(40, 120), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_over_many_epochs_every_sample_of_a_bucket_with_a_batch_is_seen(count, size, seed):
    """A row is left out of at most about two thirds of the epochs here: of 80 in a row with a chance of 1e-14."""
    table = mixed_table(count, seed)
    buckets = BucketTable(CONFIG, 24)
    ids = buckets.assign(table.num_frames, table.height, table.width, table.fps).ids
    batch_sizes = np.array([bucket.batch_size for bucket in buckets.buckets])
    sizes = np.bincount(ids[ids >= 0], minlength=len(batch_sizes))
    assume((sizes // batch_sizes).sum() >= size)
    used = (ids >= 0) & (sizes >= batch_sizes)[ids]
    seen = set(rows(updates_of(table, size=size, epochs=80, seed=seed)))
    assert seen == set(np.flatnonzero(used).tolist())


def test_left_over_counts_what_an_epoch_does_not_yield(caplog):
    get_logger().addHandler(caplog.handler)
    table = mixed_table(333)
    sampler = make(table, size=4)
    rest = sampler.left_over(0, sampler.plan(0))
    yielded = len(rows(updates_of(table, size=4)))
    get_logger().removeHandler(caplog.handler)
    assert rest.total.sum() == sampler.sizes(0).sum() - yielded
    assert (rest.starved == np.where(sampler.sizes(0) < sampler._batch_sizes, sampler.sizes(0), 0)).all()
    assert (rest.incomplete < sampler._batch_sizes).all() and (rest.surplus % sampler._batch_sizes == 0).all()
    assert f"{rest.incomplete.sum() + rest.surplus.sum()} samples are left over" in caplog.text


@pytest.mark.parametrize(("count", "buckets"), [(0, 3), (1, 1), (5000, 1), (5000, 40)])
def test_rows_of_a_bucket_are_in_the_order_of_their_hashes(count, buckets, monkeypatch):
    monkeypatch.setattr("opensora.data.plan._CHUNK_ROWS", 777)
    ids = np.random.default_rng(count).integers(-1, buckets, count).astype(np.int16)
    order = order_rows(ids, buckets, 3, 2)
    for bucket in range(buckets):
        members = np.flatnonzero(ids == bucket)
        expected = members[np.argsort(hash_key(Purpose.ROW_ORDER, 3, 2, members))]
        assert order.members(bucket).tolist() == expected.tolist()


def test_epochs_roll_over_and_end():
    table = mixed_table(200)
    sampler = make(table, accumulation=2, epochs=3)
    places = [(b[0].epoch, b[0].update, b[0].micro_step) for b in sampler]
    expected = [(e, u, m) for e in range(3) for u in range(sampler.len_epoch(e)) for m in range(2)]
    assert places == expected
    sampler.start_at(3)
    assert list(sampler) == []


def test_steps_of_an_epoch_follow_the_drawn_buckets():
    config = {"256px": {1: (0.5, 3), 17: (0.4, 2)}, "128px": {1: (1.0, 4), 17: ((1.0, 0.3), 3)}}
    table = mixed_table(400)
    sampler = make(table, config, size=2, epochs=6)
    lengths = Counter(batch[0].epoch for batch in sampler)
    assert [lengths[epoch] for epoch in range(6)] == [sampler.len_epoch(epoch) for epoch in range(6)]
    assert len(set(lengths.values())) > 1  # else this test shows nothing


def test_resume_in_the_same_layout_repeats_the_plan_from_where_it_stopped():
    table = mixed_table(400)
    whole = updates_of(table, size=2, accumulation=2, epochs=2, seed=3)
    for done in (0, 1, 7, len(whole) // 2 - 1, len(whole) // 2):
        state = make(table, size=2, accumulation=2, epochs=2, seed=3).state_dict(0, done)
        assert updates_of(table, size=2, accumulation=2, epochs=2, seed=3, state=state) == whole[done:]


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(60, 200), size=st.integers(1, 3), accumulation=st.integers(1, 2), share=st.floats(0, 1),
    probability=st.sampled_from([1.0, 0.6]),
)  # fmt: skip
def test_resume_anywhere_equals_the_rest_of_the_run(count, size, accumulation, share, probability):
    table, layout = mixed_table(count, seed=count), {"size": size, "accumulation": accumulation, "epochs": 2}
    config = {name: {clip: (probability, n) for clip, (_, n) in clips.items()} for name, clips in CONFIG.items()}
    whole = updates_of(table, config, **layout)
    done = int(share * len(whole))
    first = make(table, config, size, 0, accumulation, epochs=2)
    epoch, updates = (0, done) if done < first.len_epoch(0) else (1, done - first.len_epoch(0))
    assert updates_of(table, config, state=first.state_dict(epoch, updates), **layout) == whole[done:]


def test_resume_replays_no_batches():
    """Going on late in an epoch calls as many functions as going on at its start."""

    def calls_to_first_batch(updates: int) -> int:
        sampler = make(table)
        sampler.load_state_dict(make(table).state_dict(0, updates))
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            next(iter(sampler))
        finally:
            sys.setprofile(None)
        return calls

    table = mixed_table(5000)
    calls_to_first_batch(0)  # what happens only once
    assert abs(calls_to_first_batch(make(table).len_epoch(0) - 1) - calls_to_first_batch(0)) < 20


def test_resume_keeps_the_checkpoints_seed(warnings):
    table = mixed_table(300)
    whole = updates_of(table, seed=3)
    assert updates_of(table, seed=4, state=make(table, seed=3).state_dict(0, 5)) == whole[5:]
    assert "seed=3 instead of 4" in warnings()[-1]


layouts = st.tuples(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 6), min_size=5, max_size=5))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(40, 160), legs=st.lists(st.tuples(layouts, st.floats(0, 0.9)), min_size=2, max_size=4))
def test_elastic_resume_loses_and_repeats_nothing(count, legs):
    """A run is stopped and resumed several times in other layouts: ranks, accumulation and batch sizes."""
    table = mixed_table(count, seed=count)
    state, seen = None, []
    for (size, accumulation, batch_sizes), share in legs:
        batch_size = iter(batch_sizes)
        config = {name: {clip: (1.0, next(batch_size)) for clip in clips} for name, clips in CONFIG.items()}
        current = make(table, config, size, 0, accumulation)
        if state is not None:
            current.load_state_dict(state)
        epoch, done = current.position
        assume(epoch == 0 and current.plan(0).distinct >= current.group)  # else it is over, or too short to be stopped
        updates = updates_of(table, config, size, accumulation, state)
        stopped = updates[: int(share * len(updates))]
        rest, seen = seen + rows(updates), seen + rows(stopped)
        state = current.state_dict(0, done + len(stopped))
        assert len(set(rest)) == len(rest)
        assert whole_micro_batches(table, config, set(rest)) < size * accumulation


def test_another_layout_goes_on_in_the_epoch_and_then_plans_whole_ones():
    table = mixed_table(400)
    state = make(table, size=4, epochs=2).state_dict(0, 5)
    resumed = make(table, size=3, epochs=2)
    resumed.load_state_dict(state)
    assert resumed.position == (0, 0) and resumed.len_epoch(0) < make(table, size=3).len_epoch(0)
    again = make(table, size=3, epochs=2)
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict(0, 2))))
    assert list(again) == list(resumed)[2:]
    lengths = Counter(batch[0].epoch for batch in resumed)
    assert lengths == {epoch: resumed.len_epoch(epoch) for epoch in (0, 1)}
    assert resumed.state_dict(1, 0)["origin"] == {}


def test_an_epoch_with_too_little_left_for_the_new_layout_is_over():
    table = Columns([1] * 70, [256] * 70, [256] * 70)  # 8 micro-batches
    state = make(table, epochs=2).state_dict(0, 6)
    resumed = make(table, size=4, epochs=2)
    resumed.load_state_dict(state)
    assert resumed.position == (1, 0)


def test_a_changed_table_starts_the_epoch_anew(warnings):
    state = make(mixed_table(300), epochs=3).state_dict(1, 4)
    other = make(mixed_table(300, seed=1), epochs=3)
    other.load_state_dict(state)
    assert other.position == (1, 0)
    assert "epoch 1 starts anew" in warnings()[-1]
    config = CONFIG | {"64px": {1: (1.0, 2)}}
    changed = make(mixed_table(300), config, epochs=3)
    changed.load_state_dict(state)
    assert changed.position == (1, 0)


def test_start_step_counts_micro_batches_and_reaches_into_later_epochs(warnings):
    sampler = make(mixed_table(300), accumulation=2, epochs=3)
    length = sampler.len_epoch(0)
    whole = list(sampler)
    for micro_steps, position in {0: (0, 0), 6: (0, 3), 2 * length: (1, 0), 4 * length + 2: (2, 1)}.items():
        sampler.start_at(0, micro_steps)
        assert sampler.position == position
        assert list(sampler) == whole[micro_steps:]
    sampler.start_at(1, 0)
    assert list(sampler) == whole[2 * length :]
    sampler.start_at(0, 10 * length)
    assert list(sampler) == []
    sampler.start_at(0, 5)
    assert sampler.position == (0, 2) and "start_step=5" in warnings()[-1]


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 4), (64, 1)])
def test_the_slots_of_an_update_cost_the_same(size, accumulation):
    """Mean over maximum of the costs in an update, against the order that draws buckets independently."""
    table = mixed_table(20_000)
    buckets = BucketTable(CONFIG, 24)
    costs = np.array([micro_batch_cost(bucket) for bucket in buckets.buckets])
    plan = make(table, size=size, accumulation=accumulation).plan(0)
    balance = lambda order: np.mean(order.mean(axis=1) / order.max(axis=1))  # noqa: E731
    planned = costs[plan.bucket].reshape(-1, size * accumulation)
    shuffled = np.random.default_rng(0).permutation(planned.reshape(-1)).reshape(planned.shape)
    assert balance(planned) > 0.97 > balance(shuffled) + 0.1


def test_updates_of_an_epoch_are_shuffled():
    table = mixed_table(20_000)
    buckets = BucketTable(CONFIG, 24)
    costs = np.array([micro_batch_cost(bucket) for bucket in buckets.buckets], dtype=float)
    plan = make(table, size=4).plan(0)
    means = costs[plan.bucket].reshape(-1, 4).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1


def test_balance_is_the_share_of_time_at_work():
    assert balance(np.array([[2, 4], [10, 10]])) == pytest.approx((6 + 20) / (2 * 4 + 2 * 10))
    assert balance(np.array([[3], [7]])) == 1


def test_cost_grows_with_batch_and_more_than_linearly_with_tokens():
    base = micro_batch_cost(Bucket("256px", 33, "1:1", 256, 256, 4))
    assert micro_batch_cost(Bucket("256px", 33, "1:1", 256, 256, 8)) == 2 * base
    text_and_video = (512 + 9 * 256, 512 + 33 * 256)
    longer = micro_batch_cost(Bucket("256px", 129, "1:1", 256, 256, 4))
    assert longer / base > text_and_video[1] / text_and_video[0]


def test_a_table_smaller_than_an_update_is_repeated_to_fill_one(warnings):
    table = Columns([1] * 20, [256] * 20, [256] * 20)  # 2 micro-batches of 8
    updates = updates_of(table, size=5, epochs=2)
    assert [len(update) for update in updates] == [5, 5]
    assert updates[0][0] == updates[0][2] == updates[0][4] != updates[0][1] == updates[0][3]
    assert any("has 2 micro-batches where an update takes 5" in line for line in warnings())
    state = make(table, size=5, epochs=2).state_dict(0, 1)
    assert updates_of(table, size=5, epochs=2, state=state) == updates[1:]
    resumed = make(table, size=1, epochs=2)
    resumed.load_state_dict(state)
    assert resumed.position == (1, 0)  # all micro-batches of epoch 0 have been seen
    clips = CONFIG["256px"] | {1: (1.0, 4)}
    (rest,) = updates_of(table, CONFIG | {"256px": clips}, state=state)  # 4 rows were too few for 8
    assert set(rows([rest])) == set(range(20)) - set(rows(updates[:1]))


def test_no_batch_at_all_is_an_error_with_counts_and_remedies():
    table = Columns([1, 1, 0, 40], [256, 40, 256, 40], [256, 40, 256, 40])
    with pytest.raises(ValueError) as error:
        make(table)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "4 rows of 'table.csv'",
        "1 with an empty path",
        "meta.py",
        "2 smaller than every",
        "256px/1/1:1 (1 of 8)",
    ):
        assert part in message


def test_rows_and_buckets_that_are_not_used_are_reported_once(warnings):
    table = Columns([1] * 12 + [20, 5], [256] * 14, [256] * 14)
    sampler = make(table, epochs=3)
    list(sampler)
    unused, starved, empty = warnings()
    assert "1 of 14 rows are not used: 1 videos shorter" in unused and "add a smaller num_frames" in unused
    assert "256px/17/1:1 (1 of 3)" in starved and "reduce the batch size" in starved
    assert "no sample is in 3 entries of bucket_config (remove them): 256px/33, 128px/17, 128px/1" in empty


def test_substitutes_are_others_of_the_bucket():
    table = mixed_table(300)
    buckets = BucketTable(CONFIG, 24)
    ids = buckets.assign(table.num_frames, table.height, table.width, table.fps).ids
    chosen = Counter()
    for micro_batch in make(table):
        for request in micro_batch:
            others = request.substitutes
            assert 4 <= len(others) <= NUM_SUBSTITUTES and len(set(others)) == len(others)
            assert request.index not in others and {ids[i] for i in others} == {ids[request.index]}
            chosen.update(others)
    assert max(chosen.values()) < 25  # about 8 are expected: nobody replaces everybody
    few = list(make(Columns([1] * 3, [256] * 3, [256] * 3), {"256px": {1: (1.0, 3)}}))
    assert [sorted([request.index, *request.substitutes]) for request in few[0]] == [[0, 1, 2]] * 3
    alone = next(iter(make(Columns([1], [256], [256]), {"256px": {1: (1.0, 1)}})))
    assert alone[0].substitutes == ()


def test_seeds_belong_to_samples_not_to_layouts():
    table = mixed_table(300)
    seeds = {}
    for size, epochs in ((1, 2), (3, 2)):
        for update in updates_of(table, size=size, epochs=epochs):
            for request in chain(*update):
                assert 0 <= request.seed < 2**63
                assert seeds.setdefault((request.epoch, request.index), request.seed) == request.seed
    assert len(set(seeds.values())) == len(seeds)


def test_ranks_do_not_run_ahead_of_what_is_asked():
    sampler = make(mixed_table(300), epochs=10**9)  # endless
    assert len(list(islice(sampler, 500))) == 500


def test_plan_of_what_is_left_hands_out_prefixes():
    sizes, batch_sizes = np.array([23, 0, 9, 40]), np.array([4, 2, 3, 7])
    origin = np.array([3, 0, 9, 1])
    plan = plan_updates(sizes, origin, batch_sizes, [5, 5, 1, 9], group=3, key=(1, 2))
    assert plan.updates == 3 and plan.left_out == 1
    consumed = plan.consumed(3, batch_sizes)
    for bucket in range(4):
        starts = plan.start[plan.bucket == bucket]
        assert starts.tolist() == [origin[bucket] + i * batch_sizes[bucket] for i in range(len(starts))]
        assert consumed[bucket] == len(starts) * batch_sizes[bucket]
        assert origin[bucket] + consumed[bucket] <= sizes[bucket]
