"""Saves of two ranks: in the background or not, with failures of one rank, of the disk and of the one that watches."""

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from opensora.checkpoint_folder import list_checkpoints
from opensora.checkpoint_manifest import problems
from opensora.models.weight_files import open_averages, open_weights
from opensora.parallel.engine import Engine
from opensora.training import background_save
from opensora.training import checkpoint as checkpoint_module
from opensora.training.checkpoint import Checkpointer
from opensora.training.ema import ExponentialMovingAverage
from opensora.training.file_writer import write_files
from opensora.training.state import TrainState


def make(context, width: int = 40) -> tuple[Engine, ExponentialMovingAverage]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, width), nn.LayerNorm(width), nn.Linear(width, 3)).to(torch.bfloat16)
    engine = Engine(
        context, model, lambda m: torch.optim.AdamW(m.parameters()), "zero2", {}, torch.bfloat16, grad_clip=0.0
    )
    return engine, ExponentialMovingAverage(engine.shards(), 0.9)


def update(context, engine, ema, step: int) -> None:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step + 100 * context.rank)).to(torch.bfloat16)
    engine.forward_backward(lambda model: model(x).float().square().mean())
    engine.step(1e-2)
    ema.update()


def state(step: int) -> TrainState:
    return TrainState(global_step=step)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_both_ways(context, folder: Path) -> None:
    engine, ema = make(context)
    update(context, engine, ema, 0)
    torch.manual_seed(5 + context.rank)
    release, original = threading.Event(), checkpoint_module.choose_writer
    foreground = Checkpointer(context, engine, ema)
    foreground.save(folder / "foreground", state(1), {"config.txt": "{}"}, {})
    checkpoint_module.choose_writer = lambda _: lambda *args: release.wait(240) and write_files(*args)
    try:
        background = Checkpointer(context, engine, ema, in_background=True)
        background.save(folder / "background", state(1), {"config.txt": "{}"}, {})
        update(context, engine, ema, 1)  # what is written meanwhile is not what is trained
        background.check()
        assert not list_checkpoints(folder / "background")
        release.set()
        background.save(folder / "background", state(2), {}, {})  # waits for the first
        assert len(list_checkpoints(folder / "background")) >= 1
        background.close()
    finally:
        checkpoint_module.choose_writer = original


def test_in_the_background_the_same_bytes_are_written(two_ranks, tmp_path):
    two_ranks(save_both_ways, tmp_path)
    foreground, background = (tmp_path / name / "epoch0-global_step1" for name in ("foreground", "background"))
    assert contents(foreground) == contents(background) and problems(background) == []
    later = tmp_path / "background/epoch0-global_step2"
    assert problems(later) == [] and contents(later)["ema/__0_0.distcp"] != contents(background)["ema/__0_0.distcp"]
    manifest = json.loads((background / "manifest.json").read_text())
    assert set(manifest["files"]) == set(contents(background)) - {"manifest.json"}
    assert manifest["layout"]["world_size"] == 2 and manifest["versions"]["torch"] == torch.__version__


def whole_state(context, engine, ema) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in engine.module.parameters()]
    for (shard, average), state_ in zip(ema.flats(), map(engine.optimizer_state, engine.shards()), strict=True):
        tensors += [shard.master.clone(), average.clone(), *(state_[key].clone() for key in sorted(state_))]
    return tensors


def save_and_go_on(context, folder: Path) -> list[torch.Tensor]:
    engine, ema = make(context)
    for step in range(4):
        update(context, engine, ema, step)
        if step == 1:
            checkpointer = Checkpointer(context, engine, ema, in_background=True)
            checkpointer.save(folder, state(2), {}, {})
    checkpointer.close()
    return whole_state(context, engine, ema)


def load_and_go_on(context, folder: Path) -> list[torch.Tensor]:
    checkpoint = folder / "epoch0-global_step2"
    engine, ema = make(context)
    source = open_weights(checkpoint)
    for name, parameter in engine.module.named_parameters():
        parameter.data.copy_(source.read([name])[name])
    Checkpointer(context, engine, ema).load(checkpoint)
    for step in (2, 3):
        update(context, engine, ema, step)
    return whole_state(context, engine, ema)


def test_what_is_restored_is_exact(two_ranks, tmp_path):
    whole, resumed = two_ranks(save_and_go_on, tmp_path), two_ranks(load_and_go_on, tmp_path)
    for a, b in zip(whole, resumed, strict=True):
        assert len(a) == len(b) and all(map(torch.equal, a, b))


def load_state(context, folder: Path) -> dict[str, torch.Tensor]:
    """The masters that this rank reads, put together over the ranks: what one rank alone would hold."""
    engine, ema = make(context)
    Checkpointer(context, engine, ema).load(folder / "epoch0-global_step2")
    parts = context.gather_objects({s.name: (s.start, s.master[: s.stop - s.start]) for s in engine.shards()})
    return {name: torch.cat([part[name][1] for part in parts]) for name in parts[0]}


def test_another_number_of_ranks_reads_the_same(one_rank, two_ranks, tmp_path):
    two_ranks(save_and_go_on, tmp_path)
    by_one, by_two = one_rank(load_state, tmp_path)[0], two_ranks(load_state, tmp_path)[0]
    assert by_one.keys() == by_two.keys() and all(torch.equal(by_one[name], by_two[name]) for name in by_one)
    weights = open_weights(tmp_path / "epoch0-global_step2")
    assert all(torch.equal(weights.read([n])[n].flatten(), by_one[n].to(torch.bfloat16)) for n in by_one)
    averages = open_averages(tmp_path / "epoch0-global_step2")
    assert averages.shapes == weights.shapes


def unstacked(context, folder: Path) -> None:
    """Write a checkpoint's optimizer/ as versions without stacks and manifest did, by torch's own reader and writer."""
    reader = dcp.FileSystemReader(folder / "optimizer")
    saved = {key: torch.empty(entry.size) for key, entry in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(saved, storage_reader=reader, process_group=context.host_group)
    shutil.rmtree(folder / "optimizer")
    (folder / "manifest.json").unlink()
    plain = {}
    for key, tensor in saved.items():
        kinds, name = key.split(".", 1)
        assert kinds == "master+exp_avg+exp_avg_sq"
        plain |= {f"{kind}.{name}": part for kind, part in zip(kinds.split("+"), tensor, strict=True)}
    dcp.save(plain, storage_writer=dcp.FileSystemWriter(folder / "optimizer"), process_group=context.host_group)


def test_checkpoints_of_older_versions_go_on(one_rank, two_ranks, tmp_path):
    whole = two_ranks(save_and_go_on, tmp_path)
    one_rank(unstacked, tmp_path / "epoch0-global_step2")
    for a, b in zip(whole, two_ranks(load_and_go_on, tmp_path), strict=True):
        assert all(map(torch.equal, a, b))


def fail_on_one_rank(context, folder: Path) -> tuple[str, int]:
    engine, ema = make(context)
    update(context, engine, ema, 0)

    def fail(*args):
        raise OSError("no more room")

    original = checkpoint_module.choose_writer
    checkpoint_module.choose_writer = lambda _: write_files if context.is_main else fail
    try:
        checkpointer = Checkpointer(context, engine, ema, in_background=True)
        checkpointer.save(folder, state(2), {}, {})
    finally:
        checkpoint_module.choose_writer = original
    message, step = "", 0
    while not message and step < 100_000:
        step += 1
        try:
            checkpointer.check()
        except OSError as error:
            message = str(error)
    checkpointer.close()
    return message, step


def save_one(context, folder: Path) -> None:
    engine, ema = make(context)
    update(context, engine, ema, 0)
    Checkpointer(context, engine, ema).save(folder, state(1), {}, {})


def test_what_one_rank_cannot_write_all_raise_and_the_one_before_stays(two_ranks, tmp_path):
    two_ranks(save_one, tmp_path)
    (first, step), (second, other_step) = two_ranks(fail_on_one_rank, tmp_path)
    assert first == second and step == other_step
    assert "step2 failed: rank 1: no more room; the checkpoints before it are intact" in first and "\n" not in first
    assert [path.name for path in tmp_path.iterdir()] == ["epoch0-global_step1"]
    assert problems(tmp_path / "epoch0-global_step1") == []


def save_to_own_disk(context, folder: Path) -> str:
    """Rank 1 writes where rank 0 does not see it."""
    engine, ema = make(context)
    update(context, engine, ema, 0)
    patience, background_save.VISIBLE_AFTER_S = background_save.VISIBLE_AFTER_S, 0.0
    try:
        Checkpointer(context, engine, ema).save(folder if context.is_main else folder / "other", state(1), {}, {})
    except OSError as error:
        return str(error)
    finally:
        background_save.VISIBLE_AFTER_S = patience


def test_outputs_that_hosts_do_not_share_are_no_checkpoint(two_ranks, tmp_path):
    first, second = two_ranks(save_to_own_disk, tmp_path)
    for message in (first, second):
        assert "rank 1's files are not there (" in message and "--outputs must be on storage that all hosts" in message
    assert list_checkpoints(tmp_path) == [] and not list(tmp_path.glob(".tmp-*"))


def save_until_full(context, folder: Path, hidden: bool) -> str:
    """`hidden`: the room is gone when it is written, though it was there when it was asked for."""
    engine, ema = make(context, width=12000)
    update(context, engine, ema, 0)
    checkpointer = Checkpointer(context, engine, ema, in_background=True)
    ample = shutil.disk_usage(folder)._replace(free=10**12)
    original = shutil.disk_usage
    if hidden:
        shutil.disk_usage = lambda _: ample
    try:
        for step in range(1, 9):
            checkpointer.save(folder, state(step), {}, {})
            checkpointer.wait()
    except OSError as error:
        return str(error)
    finally:
        shutil.disk_usage = original
        checkpointer.close()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_full_disk_leaves_what_was_saved(two_ranks, tmp_path, hidden):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        first, second = two_ranks(save_until_full, tmp_path, hidden)
        assert first == second and "\n" not in first
        assert ("No space left" if hidden else " free: make room") in first and "are intact" in first
        found = list_checkpoints(tmp_path)
        assert found and not any(map(problems, found)) and not list(tmp_path.glob(".tmp-*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
