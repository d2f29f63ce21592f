"""Random numbers that depend on a key and on nothing else: no worker, rank, batch size, platform or numpy version.

`hash_key` gives a number to a key such as (seed, epoch, row); `RowStreams` replays numpy's own generators for many
seeds at once, because bucket assignment is defined by `numpy.random.default_rng(row_seed).random()` for each row.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

UINT64 = NDArray[np.uint64]


class Purpose(IntEnum):
    """What a key is drawn for: two purposes with otherwise equal keys are independent."""

    ROW_ORDER = 1
    MICRO_BATCH_ORDER = 2
    UPDATE_ORDER = 3
    SUBSTITUTES = 4
    SAMPLE = 5
    WINDOW = 6


def hash_key(purpose: Purpose, *parts: ArrayLike) -> UINT64:
    """A 64-bit hash of non-negative integers; arrays broadcast. Bijective in the last part, so no two rows collide.

    Each part is folded in by the finaliser of SplitMix64 (Steele, Lea, Flood 2014, variant 13 of Stafford).
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        state = _mix(np.uint64(purpose))
        for part in parts:
            state = _mix(state ^ np.asarray(part).astype(np.uint64))
    return state


def _mix(x: UINT64) -> UINT64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def to_uniform(bits: UINT64) -> NDArray[np.float64]:
    """64 random bits -> a number in [0, 1) with 53 bits, as numpy does it."""
    return (bits >> np.uint64(11)) * 2.0**-53


class RowStreams:
    """One `numpy.random.default_rng(seed)` per row, drawn from for any subset of rows at once.

    Reproduces SeedSequence (numpy/random/bit_generator.pyx) and PCG64, i.e. PCG XSL-RR 128/64 (O'Neill 2014). Rows
    that are never drawn from cost nothing but their seed.

    Args:
        seeds: [N] integers in [0, 2**64).
    """

    def __init__(self, seeds: UINT64):
        self._seeds = np.asarray(seeds, dtype=np.uint64)
        self._started = np.zeros(len(self._seeds), dtype=bool)
        # 128-bit state and increment of each row: rows (state high, state low, increment high, increment low)
        self._registers: UINT64 | None = None

    def random(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """The next `.random()` of each of `rows` (distinct positions): [len(rows)] numbers in [0, 1)."""
        if self._registers is None:
            self._registers = np.empty((4, len(self._seeds)), dtype=np.uint64)
        fresh = rows[~self._started[rows]]
        if len(fresh):
            self._registers[:, fresh] = _pcg64_seed(self._seeds[fresh])
            self._started[fresh] = True
        high, low, increment_high, increment_low = self._registers[:, rows]
        high, low = _pcg64_step(high, low, increment_high, increment_low)
        self._registers[0, rows], self._registers[1, rows] = high, low
        return to_uniform(_rotate_right(high ^ low, high >> np.uint64(58)))


def _rotate_right(x: UINT64, count: UINT64) -> UINT64:
    return (x >> count) | (x << ((np.uint64(64) - count) & np.uint64(63)))


_MULTIPLIER_HIGH, _MULTIPLIER_LOW = np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645)


def _pcg64_step(high: UINT64, low: UINT64, increment_high: UINT64, increment_low: UINT64) -> tuple[UINT64, UINT64]:
    """state * multiplier + increment modulo 2**128, on pairs of 64-bit halves."""
    product_high = _multiply_high(low, _MULTIPLIER_LOW) + high * _MULTIPLIER_LOW + low * _MULTIPLIER_HIGH
    product_low = low * _MULTIPLIER_LOW
    new_low = product_low + increment_low
    carry = (new_low < increment_low).astype(np.uint64)
    return product_high + increment_high + carry, new_low


def _multiply_high(x: UINT64, y: np.uint64) -> UINT64:
    """The upper 64 bits of the 128-bit product, from 32-bit halves."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & mask, x >> half, y & mask, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    return x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & mask)) >> half)


def _pcg64_seed(seeds: UINT64) -> UINT64:
    """numpy's `PCG64(SeedSequence(seed))` for each seed: [4, N] registers, ready for the first step."""
    state_high, state_low, stream_high, stream_low = _seed_sequence(seeds)
    one = np.uint64(1)
    increment_high = (stream_high << one) | (stream_low >> np.uint64(63))
    increment_low = (stream_low << one) | one
    # From state 0 one step gives the increment; then the seed is added and one more step is made.
    low = increment_low + state_low
    high = increment_high + state_high + (low < state_low).astype(np.uint64)
    high, low = _pcg64_step(high, low, increment_high, increment_low)
    return np.stack([high, low, increment_high, increment_low])


def _seed_sequence(seeds: UINT64) -> tuple[UINT64, ...]:
    """`numpy.random.SeedSequence(seed).generate_state(4, uint64)` for each seed."""
    words = [(seeds & np.uint64(0xFFFFFFFF)).astype(np.uint32), (seeds >> np.uint64(32)).astype(np.uint32)]
    words += [np.zeros_like(words[0])] * 2  # entropy is padded with zero words to the pool's size of 4
    constant = _HashConstant(0x43B0D7E5, 0x931E8875)
    pool = [constant.hash(word) for word in words]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = _mix_words(pool[target], constant.hash(pool[source]))
    constant = _HashConstant(0x8B51F9DD, 0x58F38DED)
    state = [constant.hash(pool[i % 4]).astype(np.uint64) for i in range(8)]
    return tuple(state[i] | (state[i + 1] << np.uint64(32)) for i in range(0, 8, 2))


class _HashConstant:
    """The running constant of SeedSequence's hash: multiplied after each use."""

    def __init__(self, start: int, multiplier: int):
        self.value, self.multiplier = start, multiplier

    def hash(self, word: NDArray[np.uint32]) -> NDArray[np.uint32]:
        word = word ^ np.uint32(self.value)
        self.value = self.value * self.multiplier & 0xFFFFFFFF
        word = word * np.uint32(self.value)
        return word ^ (word >> np.uint32(16))


def _mix_words(x: NDArray[np.uint32], y: NDArray[np.uint32]) -> NDArray[np.uint32]:
    mixed = np.uint32(0xCA01F9DD) * x - np.uint32(0x4973F715) * y
    return mixed ^ (mixed >> np.uint32(16))
