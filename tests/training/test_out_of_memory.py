import subprocess
import sys

import pytest
import torch

from opensora.training.memory import is_out_of_memory, read_shrunk

DEVICE = [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
]


@pytest.mark.parametrize("message", DEVICE)
def test_what_says_that_memory_ran_out(message):
    assert is_out_of_memory(RuntimeError(message))


def test_what_does_not():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError(DEVICE[0]))


def test_half_a_note_is_skipped(tmp_path):
    note = '{"resolution": "64px", "num_frames": 9, "batch_size": 4}'
    (tmp_path / "shrunk_buckets.jsonl").write_text(f"{note}\n{note[:20]}")
    assert read_shrunk(tmp_path) == {("64px", 9): 4}


FAILING = """
import threading, time
from pathlib import Path
from opensora.training import memory
from opensora.training.memory import naming_failures

memory._CLOSING_S = 0.2
class Place:
    phase, micro_batches = "optimizer", []
    def __str__(self):
        return "here"

def finish_save():
    time.sleep(0.5)
    print("published", flush=True)
    {failure}

with naming_failures(Place(), Path(), False, finish_save):
    try:
        raise MemoryError
    finally:
        threading.Thread(target=time.sleep, args=(600,)).start()  # closing that waits for ever
"""


@pytest.mark.parametrize("failure", ["pass", "raise OSError('no space')"])
def test_a_save_is_finished_before_the_process_ends(failure):
    """It may take longer than the rest, for which there is a limit."""
    command = [sys.executable, "-c", FAILING.format(failure=failure)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "error: out of memory (MemoryError): here" in result.stdout and "published" in result.stdout
    assert ("no space" in result.stdout) == (failure != "pass")
