import numpy as np

from opensora.data.random_draws import Purpose, RowStreams, hash_key, to_uniform


def test_row_streams_equal_numpy_generators():
    random = np.random.default_rng(0)
    seeds = np.concatenate(
        [
            np.arange(300, dtype=np.uint64),
            random.integers(0, 2**64, 300, dtype=np.uint64),
            np.array([2**32 - 1, 2**32, 2**63, 2**64 - 1], dtype=np.uint64),
        ]
    )
    generators = [np.random.default_rng(int(seed)) for seed in seeds]
    streams = RowStreams(seeds)
    for _ in range(6):  # each row is drawn from a different number of times
        rows = np.flatnonzero(random.random(len(seeds)) < 0.6)
        assert streams.random(rows).tolist() == [generators[row].random() for row in rows]


def test_hash_of_an_array_is_the_hash_of_its_elements():
    rows = np.arange(50)
    whole = hash_key(Purpose.SAMPLE, 42, 3, rows)
    assert whole.tolist() == [int(hash_key(Purpose.SAMPLE, 42, 3, row)) for row in rows]
    assert hash_key(Purpose.SAMPLE, 42, 3, rows[:, None], np.arange(4)).shape == (50, 4)


def test_hash_is_the_same_on_every_platform():
    """Values computed with Python's integers from the definition of SplitMix64."""

    def mix(x):
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for parts in ((0,), (42, 0, 7), (2**63, 1, 2, 3)):
        state = mix(Purpose.WINDOW)
        for part in parts:
            state = mix(state ^ part)
        assert int(hash_key(Purpose.WINDOW, *parts)) == state


def test_hashes_are_distinct_and_uniform():
    hashes = hash_key(Purpose.ROW_ORDER, 0, 0, np.arange(100_000))
    assert len(np.unique(hashes)) == 100_000
    counts, _ = np.histogram(to_uniform(hashes), bins=50, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 100  # chi-squared with 49 degrees of freedom, p < 1e-5
    other = hash_key(Purpose.ROW_ORDER, 0, 1, np.arange(100_000))
    assert abs(np.corrcoef(to_uniform(hashes), to_uniform(other))[0, 1]) < 0.02
