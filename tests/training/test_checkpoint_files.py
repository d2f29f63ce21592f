"""The bytes of a checkpoint: how they are framed, copied, written, and found to be whole."""

import ctypes
import io
import json
import logging
import os
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from opensora.checkpoint_folder import list_checkpoints, resolve_checkpoint
from opensora.checkpoint_manifest import (
    CHUNK_BYTES,
    MANIFEST,
    FileRecord,
    checksum,
    format_manifest,
    problems,
    weight_problems,
)
from opensora.common import get_logger
from opensora.parallel.shards import LogicalTensor, ParameterShard
from opensora.parallel.snapshot import Piece, SnapshotMemory
from opensora.training import sharded_state
from opensora.training.background_save import Retention, prune
from opensora.training.file_writer import choose_writer, write_files, write_files_by_tensornvme
from opensora.training.tensor_frame import ALIGNMENT, frame

SIZES = {"empty": 0, "one": 1, "short": 4095, "page": 4096, "more": 4097, "chunk": CHUNK_BYTES + 12345}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 1, 2, 4), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_torch_load_reads_a_framed_tensor(shape, dtype, tmp_path):
    tensor = torch.randn(shape).to(dtype)
    before, after = frame(shape, dtype)
    assert len(before) % ALIGNMENT == 0
    path = tmp_path / "tensor.pt"
    path.write_bytes(before + raw(tensor) + after)
    for options in ({"weights_only": True}, {"weights_only": False}, {"mmap": True}):
        loaded = torch.load(path, **options)
        assert torch.equal(loaded, tensor) and loaded.dtype == dtype and loaded.stride() == tensor.stride()


def test_large_boxes_are_written_in_parts(monkeypatch):
    monkeypatch.setattr(sharded_state, "MAX_BYTES", 3 * 4 * 6)
    master = torch.arange(35.0)
    shard = ParameterShard("m", torch.Size((5, 7)), 0, 35, master)
    stack = [shard.as_logical(master), shard.as_logical(-master), shard.as_logical(2 * master)]
    file = sharded_state.ShardFile({"m": stack}, 0)
    assert all(4 * torch.Size(entry.sizes).numel() <= 3 * 4 * 6 for entry in file.entries)
    contents = SnapshotMemory(torch.device("cpu")).take({file.name: file.nbytes}, file.pieces(file.name))[file.name]
    found = torch.full((3, 5, 7), torch.nan)
    for entry in file.entries:
        saved = torch.load(io.BytesIO(contents[entry.place : entry.place + entry.nbytes]))
        found[tuple(slice(o, o + s) for o, s in zip(entry.offsets, entry.sizes, strict=True))] = saved
    whole = master.view(5, 7)
    assert torch.equal(found, torch.stack([whole, -whole, 2 * whole]))


def test_a_tensor_without_boxes_is_not_written():
    absent = LogicalTensor(torch.Size((4,)), torch.float32, [])
    assert sharded_state.ShardFile({"a": [absent]}, 1).nbytes == 0


def test_a_snapshot_does_not_change_and_its_memory_is_used_again():
    memory, tensor = SnapshotMemory(torch.device("cpu")), torch.arange(6000.0)
    pieces = [Piece("a", 4, b"head"), Piece("a", 64, tensor), Piece("b", 0, tensor[:3])]
    contents = memory.take({"a": 64 + tensor.nbytes + 10, "b": 12}, iter(pieces))
    expected = bytes(4) + b"head" + bytes(56) + raw(tensor) + bytes(10)
    tensor.zero_()
    assert contents["a"] == expected and contents["b"] == raw(torch.arange(3.0))
    size = memory.nbytes
    again = memory.take({"c": 5000}, iter([Piece("c", 4000, b"x")]))
    assert memory.nbytes == size and again["c"] == bytes(4000) + b"x" + bytes(999)  # nothing of what was there


@pytest.fixture
def files():
    memory = SnapshotMemory(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    data = {n: torch.randint(256, (size,), dtype=torch.uint8, generator=generator) for n, size in SIZES.items()}
    return memory.take(SIZES, (Piece(name, 0, tensor) for name, tensor in data.items()))


def check_written(folder: Path, files, records) -> None:
    for name, data in files.items():
        assert (folder / name).read_bytes() == data
    (folder / MANIFEST).write_text(format_manifest(records, {}))
    assert problems(folder) == []


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_files_are_written_as_they_are(files, tmp_path, place):
    folder = tmp_path if place == "disk" else Path(f"/dev/shm/{tmp_path.name}-{os.getpid()}")
    folder.mkdir(exist_ok=True)
    try:
        (folder / "one").write_bytes(b"longer than what comes")
        check_written(folder, files, write_files(folder, files))
    finally:
        shutil.rmtree(folder)


def test_memory_that_begins_anywhere_is_written_too(tmp_path):
    data = memoryview(bytearray(os.urandom(10000)))[3:]
    check_written(tmp_path, {"a": data}, write_files(tmp_path, {"a": data}))


class DocumentedWriter:
    """The interface of TensorNVMe's AsyncFileWriter, which needs CUDA: opens without truncation, writes later."""

    lost = False

    def __init__(self, path, n_entries=16, backend="pthread", n_tasks=0):
        self._file, self._writes = os.open(path, os.O_WRONLY | os.O_CREAT), []

    def write_raw(self, keep_alive, address, n_bytes, offset):
        self._writes.append((keep_alive, address, n_bytes, offset))

    def synchronize(self):
        for _, address, n_bytes, offset in self._writes[: -1 if self.lost else None]:
            os.pwrite(self._file, ctypes.string_at(address, n_bytes), offset)

    def __del__(self):
        os.close(self._file)


class LosingWriter(DocumentedWriter):
    lost = True


def test_tensornvme_writes_the_same_bytes(files, tmp_path):
    """Against a stand-in of its documented interface: the real one cannot be built without CUDA."""
    (tmp_path / "more").write_bytes(bytes(10000))
    check_written(tmp_path, files, write_files_by_tensornvme(tmp_path, files, DocumentedWriter))


def test_what_tensornvme_loses_is_noticed(files, tmp_path):
    with pytest.raises(OSError, match=r"of .* bytes"):
        write_files_by_tensornvme(tmp_path, {"page": files["page"]}, LosingWriter)


def test_the_writer_that_is_installed_is_chosen(monkeypatch, said):
    monkeypatch.setitem(__import__("sys").modules, "tensornvme", types.ModuleType("tensornvme"))  # as PyPI's: without
    assert choose_writer(in_background=True) is write_files
    assert "TensorNVMe" in said.messages[-1] and "pip install git+" in said.messages[-1]
    module = types.ModuleType("tensornvme.async_file_io")
    module.AsyncFileWriter = DocumentedWriter
    monkeypatch.setitem(__import__("sys").modules, "tensornvme.async_file_io", module)
    assert choose_writer(in_background=True) is not write_files


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error(files, small_disk):
    with pytest.raises(OSError, match="No space left"):
        write_files(small_disk, files)


# ------------------------------------------------------------------------------------------------ whole or not


@pytest.fixture
def said(caplog, monkeypatch):
    """The logger's lines."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO, logger="opensora")
    return caplog


def write_checkpoint(run: Path, step: int) -> Path:
    checkpoint = run / f"epoch0-global_step{step}"
    contents = {"running_states.json": b"{}", "model/model-00001.safetensors": b"weights", "optimizer/a": b"moments"}
    records = {}
    for name, content in contents.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
        records[name] = FileRecord(len(content), (checksum(content),))
    (checkpoint / MANIFEST).write_text(format_manifest(records, {"versions": {}}))
    return checkpoint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


HARMS = [
    (lambda c: flip(c / "optimizer/a"), "optimizer/a is corrupt"),
    (lambda c: (c / "optimizer/a").write_bytes(b"mom"), "optimizer/a has 3 bytes of 7"),
    (lambda c: (c / "optimizer/a").unlink(), "optimizer/a is missing"),
    (lambda c: (c / MANIFEST).write_text('{"files": 3}'), "manifest.json cannot be read"),
]


@pytest.mark.parametrize(("harm", "said_of_it"), HARMS)
def test_what_is_not_whole_is_named_and_the_one_before_taken(tmp_path, said, harm, said_of_it):
    older, newest = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert problems(newest) == [] and resolve_checkpoint(tmp_path, problems) == newest
    harm(newest)
    assert resolve_checkpoint(tmp_path, problems) == older
    assert resolve_checkpoint(f"{tmp_path}/epoch*", problems) == older
    assert any("skipping" in line and newest.name in line and said_of_it in line for line in said.messages)
    with pytest.raises(ValueError, match=rf"{newest.name} is not whole: {said_of_it}.*; use another") as error:
        resolve_checkpoint(newest, problems)
    assert "\n" not in str(error.value)
    harm(older)
    with pytest.raises(ValueError, match=r"none of 2 checkpoints is whole"):
        resolve_checkpoint(tmp_path, problems)


def test_weights_are_used_without_the_rest(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 1)
    shutil.rmtree(checkpoint / "optimizer")
    assert resolve_checkpoint(tmp_path) == checkpoint and weight_problems(checkpoint) == []
    (checkpoint / "model/model-00001.safetensors").write_bytes(b"w")
    with pytest.raises(ValueError, match=r"model-00001.safetensors has 1 bytes of 7"):
        resolve_checkpoint(checkpoint)


def test_a_checkpoint_without_a_manifest_is_taken_as_it_is(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 1)
    (checkpoint / MANIFEST).unlink()
    assert resolve_checkpoint(checkpoint, problems) == checkpoint


def test_a_manifest_tells_every_chunk(tmp_path):
    data = os.urandom(1000)
    (tmp_path / "a").write_bytes(data)
    manifest = json.loads(format_manifest({"a": FileRecord(1000, (checksum(data[:600]), checksum(data[600:])))}, {}))
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "chunk_bytes": 600}))
    assert problems(tmp_path) == []
    flip(tmp_path / "a")
    assert problems(tmp_path) == ["a is corrupt"] and problems(tmp_path, checksums=False) == []


@pytest.mark.parametrize(
    ("latest", "every", "left"),
    [
        (None, None, [1, 2, 3, 4, 5, 6]),
        (2, None, [5, 6]),
        (1, 2, [2, 4, 6]),
        (2, 3, [3, 5, 6]),
        (9, None, [1, 2, 3, 4, 5, 6]),
        (None, 2, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_newest_and_milestones_are_kept(tmp_path, latest, every, left):
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, Retention(latest, every))
    assert list_checkpoints(tmp_path) == [tmp_path / f"epoch0-global_step{step}" for step in left]
    assert len(list(tmp_path.iterdir())) == len(left)


def test_what_is_not_whole_does_not_count_as_newest(tmp_path):
    for step in range(1, 5):
        write_checkpoint(tmp_path, step)
    (tmp_path / "epoch0-global_step3/model/model-00001.safetensors").write_bytes(b"")
    prune(tmp_path, Retention(2))
    assert [c.name[-1] for c in list_checkpoints(tmp_path)] == ["2", "3", "4"]
