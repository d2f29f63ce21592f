"""Batches on their way to the device: all of them, in order, no further ahead than they should be."""

import gc
import mmap
import threading
import time
import weakref
from contextlib import suppress

import pytest
import torch

from opensora.data.batch import Batch
from opensora.parallel.staging import AHEAD, IN_FLIGHT, StagedBatches, StagingBuffers
from opensora.parallel.streams import NoStream

CPU = torch.device("cpu")


def make_batch(number: int, size: int = 4) -> Batch:
    video = torch.full((1, 3, 1, size, size), number % 256, dtype=torch.uint8)
    encoded = {"text": torch.full((1, 5, 7), number, dtype=torch.bfloat16)}
    return Batch(video, ["a"], [number], [24.0], [number], 0, number, 0, encoded=encoded)


def no_thread_left() -> bool:
    return not any(thread.name == "staging" for thread in threading.enumerate())


def wait_until(reached) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_batches_come_in_order_and_whole():
    batches = [make_batch(number) for number in range(20)]
    with StagedBatches(iter(batches), CPU) as staged:
        received = list(staged)
    assert [batch.index for batch in received] == [batch.index for batch in batches]
    for ours, theirs in zip(received, batches, strict=True):
        assert torch.equal(ours.video, theirs.video) and torch.equal(ours.encoded["text"], theirs.encoded["text"])
    assert no_thread_left()


def test_reading_ahead_is_bounded():
    read = []

    def source():
        for number in range(100):
            read.append(number)
            yield make_batch(number)

    with StagedBatches(source(), CPU) as staged:
        for number in range(3):
            next(staged)
            # this one, those that wait on the device, and one before the device
            most = number + 1 + AHEAD + 1
            wait_until(lambda most=most: len(read) >= most)
            time.sleep(0.05)
            assert len(read) == most
    assert no_thread_left()


def test_an_error_of_the_source_is_raised_where_batches_are_taken():
    def source():
        yield make_batch(0)
        raise ValueError("no sample of a batch can be read")

    staged = StagedBatches(source(), CPU)
    assert next(staged).index == [0]
    with pytest.raises(ValueError, match="no sample"):
        next(staged)
    assert next(staged, None) is None  # and it has ended
    assert no_thread_left()


def test_buffers_are_taken_in_turns_whatever_the_shapes():
    buffers = StagingBuffers(NoStream())
    shapes = [(2, 3, 8), (5, 9), (2, 3, 8), (1,), (100,)] * 20
    for number, shape in enumerate(shapes):
        tensors = [torch.randint(0, 255, shape, dtype=torch.uint8), torch.randn(shape)]
        copies = [buffers.fill(tensor) for tensor in tensors]
        buffers.sent(None)
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True)), number
    # two tensors of each batch in flight; none is larger than the largest tensor
    assert len(buffers.sizes) <= 2 * (IN_FLIGHT + 1) and max(buffers.sizes) == 400


def test_a_buffer_is_left_alone_while_its_copy_is_under_way():
    buffers, tensors, copies = StagingBuffers(NoStream()), [], []
    for number in range(6):
        tensors.append(torch.full((10,), number, dtype=torch.uint8))
        copies.append(buffers.fill(tensors[-1]))
        buffers.sent(None)
        for copy, tensor in list(zip(copies, tensors, strict=True))[-IN_FLIGHT:]:
            assert torch.equal(copy, tensor)


def test_buffers_from_the_start_are_used():
    buffers = StagingBuffers(NoStream(), [1000, 64])
    buffers.fill(torch.zeros(60, dtype=torch.uint8))
    buffers.fill(torch.zeros(900, dtype=torch.uint8))
    buffers.sent(None)
    assert buffers.sizes == [64, 1000]
    buffers.fill(torch.zeros(2000, dtype=torch.uint8))
    assert buffers.sizes == [64, 1000, 2000]


@pytest.mark.parametrize("broken_off", [True, False])
def test_only_a_run_that_comes_to_its_end_waits_for_what_is_read(broken_off):
    last_is_there, was_waited_for = threading.Event(), []

    def source():
        yield make_batch(0)
        last_is_there.wait(240)
        was_waited_for.append(True)
        yield make_batch(1)

    staged = StagedBatches(source(), CPU)
    with suppress(KeyboardInterrupt), staged:
        next(staged)
        if broken_off:
            raise KeyboardInterrupt
        threading.Timer(0.3, last_is_there.set).start()
    assert was_waited_for == ([] if broken_off else [True])
    last_is_there.set()
    wait_until(no_thread_left)


def test_buffers_have_pages_of_their_own():
    """A page that two buffers shared would be locked twice, which fails, and unlocked by the first that ends."""
    locked = []

    class Recording(NoStream):
        def page_lock(self, memory, owner):
            locked.append((memory.data_ptr(), memory.nbytes))

    buffers = StagingBuffers(Recording(), [1, 0, 100, 4097])
    for size in (3, 20, 5000):
        buffers.fill(torch.zeros(size, dtype=torch.uint8))
    pages = [page for start, length in locked for page in range(start, start + length, mmap.PAGESIZE)]
    assert len(set(pages)) == len(pages) and all(page % mmap.PAGESIZE == 0 for page in pages)


class Refusing(NoStream):
    def page_lock(self, memory, owner):
        raise RuntimeError("cudaHostRegister returned error 2")


def test_without_page_locked_memory_it_goes_on(caplog):
    import logging

    from opensora.common import get_logger

    get_logger().addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            buffers = StagingBuffers(Refusing())
            for number in range(3):
                assert buffers.fill(torch.full((5,), number)).tolist() == [number] * 5
                buffers.sent(None)
    finally:
        get_logger().removeHandler(caplog.handler)
    assert caplog.text.count("page-locked") == 1


def test_a_batch_is_not_held_once_the_next_is_there():
    def source():
        for number in range(5):
            yield make_batch(number)

    with StagedBatches(source(), CPU) as staged:
        video = weakref.ref(next(staged).video)
        next(staged), next(staged)
        gc.collect()
        assert video() is None


@pytest.mark.gpu
@pytest.mark.parametrize("pre_alloc", [None, [1 << 20, 1 << 24, 7]])
def test_on_the_device_batches_are_right_under_load(pre_alloc):
    """Long work keeps the device behind the host, so that a buffer or tensor reused too early would show."""
    device = torch.device("cuda")
    load = torch.randn(4096, 4096, device=device)
    sums = []
    with StagedBatches((make_batch(n, 64 + 8 * (n % 7)) for n in range(200)), device, pre_alloc) as staged:
        for batch in staged:
            for _ in range(5):
                load = torch.nn.functional.normalize(load @ load)
            sums.append((batch.video.amin(), batch.video.amax(), batch.encoded["text"].float().mean(), batch.index[0]))
            assert batch.video.is_cuda
    for low, high, text, number in sums:
        assert int(low) == int(high) == number % 256 and float(text) == float(torch.tensor(number).bfloat16())
