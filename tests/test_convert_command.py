"""scripts/ckpts/convert.py on small models: what it writes, loaded by ourselves, by safetensors and by diffusers."""

import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opensora.models.mmdit import MMDiT
from opensora.models.mmdit.convert import convert
from opensora.models.mmdit.layouts import DIFFUSERS, FLUX, OPEN_SORA
from opensora.models.weight_files import INDEX_NAME, format_index, open_weights, plan_shards, save_shard
from opensora.models.weights import build_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/ckpts/convert.py"
SMALL = {
    "in_channels": 16,
    "vec_in_dim": 10,
    "context_in_dim": 12,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [4, 6, 6],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": False,
    "fused_qkv": False,
    "use_liger_rope": True,
}
AXES = ["--axes-dim", "4", "6", "6"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script):
    """run(*arguments) does what the command does, in this process."""
    return lambda *arguments: script.main(list(map(str, arguments)))


def weights(dtype=torch.float32, **changes):
    """A random state dict in Open-Sora's layout."""
    state = MMDiT(**{**SMALL, **changes}).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in state.items()}


def flux_dev(**changes):
    """A file with the names of flux1-dev."""
    path = Path("flux1-dev.safetensors")
    save_file(convert(weights(guidance_embed=True, **changes), OPEN_SORA, FLUX), path)
    return path


def checkpoint(folder, state, ema=None, settings=None):
    """As the trainer writes it."""
    (folder / "model").mkdir(parents=True)
    shards = plan_shards(state, 50_000)
    for name, keys in shards:
        save_shard(folder / "model" / name, {key: state[key] for key in keys})
    (folder / "model" / INDEX_NAME).write_text(format_index(state, shards))
    if ema:
        dcp.save(dict(ema), storage_writer=dcp.FileSystemWriter(folder / "ema"), no_dist=True)
    (folder / "config.txt").write_text(json.dumps({"model": {**SMALL, **(settings or {})}}))
    (folder / "running_states.json").write_text("{}")
    return folder


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def everything(path):
    source = open_weights(Path(path))
    return source.read(list(source.shapes))


# ------------------------------------------------------------------------------------------------------ round trips


def test_layouts_and_back(run):
    """open-sora -> flux -> diffusers -> flux -> open-sora: every step by its formula, the end equal to the start."""
    state = weights(torch.bfloat16, guidance_embed=True)
    save_file(state, "start.safetensors")
    run("start.safetensors", "flux.safetensors", "--to", "flux")
    run("flux.safetensors", "diffusers.safetensors", "--to", "diffusers", *AXES)
    run("diffusers.safetensors", "flux2.safetensors", "--to", "flux")
    run("flux2.safetensors", "end.safetensors", "--to", "open-sora")
    assert_equal(load_file("flux.safetensors"), convert(state, OPEN_SORA, FLUX))
    assert_equal(load_file("diffusers.safetensors"), convert(state, OPEN_SORA, DIFFUSERS))
    assert_equal(load_file("flux2.safetensors"), load_file("flux.safetensors"))
    assert_equal(load_file("end.safetensors"), state)
    for name, layout in (("flux", "flux"), ("diffusers", "diffusers"), ("end", "open-sora")):
        with safe_open(f"{name}.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "layout": layout}
    assert sorted(path.name for path in Path().iterdir()) == [
        f"{name}.safetensors" for name in ("diffusers", "end", "flux", "flux2", "start")
    ]


def test_tensors_of_all_widths_lie_as_readers_expect(run):
    """A tensor that begins at an odd multiple of its element's size can't be mapped."""
    state = weights()
    state["img_in.bias"] = state["img_in.bias"].half()
    state["txt_in.weight"] = state["txt_in.weight"].bfloat16()
    state["vector_in.in_layer.weight"] = state["vector_in.in_layer.weight"].double()
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"].to(torch.float8_e4m3fn)
    save_file(state, "mixed.safetensors")
    run("mixed.safetensors", "out.safetensors", "--to", "open-sora")
    assert_equal(load_file("out.safetensors"), state)
    header_size = int.from_bytes(Path("out.safetensors").read_bytes()[:8], "little")
    header = json.loads(Path("out.safetensors").read_bytes()[8 : 8 + header_size])
    assert header_size % 8 == 0
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries)


def test_folder_in_shards(run):
    state = weights(torch.bfloat16, cond_embed=True)
    save_file(state, "a.safetensors")
    run("a.safetensors", "folder", "--to", "flux", "--max-shard-size", "40KB")
    files = sorted(Path("folder").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{k + 1:05d}-of-{len(files):05d}.safetensors" for k in range(len(files))
    ]
    index = json.loads(Path("folder/model.safetensors.index.json").read_text())
    expected = convert(state, OPEN_SORA, FLUX)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert_equal(everything("folder"), expected)
    assert len(files) > 3 and all(file.stat().st_size < 45_000 or len(load_file(file)) == 1 for file in files)
    run("folder", "back.safetensors", "--to", "open-sora")
    assert_equal(load_file("back.safetensors"), state)


def test_diffusers_loads_the_folder(run):
    diffusers = pytest.importorskip("diffusers")
    path = flux_dev()
    run(path, "flux", "--to", "diffusers", "--max-shard-size", "100KB", *AXES)
    assert len(list(Path("flux").glob("diffusion_pytorch_model-*.safetensors"))) > 1
    theirs, report = diffusers.FluxTransformer2DModel.from_pretrained("flux", output_loading_info=True)
    assert not any(report.values()), report
    ours = build_model(
        {"type": "flux", **SMALL, "guidance_embed": True, "from_pretrained": "flux"}, torch.float32, "cpu"
    )
    generator = torch.Generator().manual_seed(1)
    img, txt, vec = (torch.randn(shape, generator=generator) for shape in ((2, 6, 16), (2, 5, 12), (2, 10)))
    ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(2.0), torch.arange(3.0))
    t, g = torch.tensor([0.2, 0.9]), torch.tensor([3.5, 1.0])
    with torch.no_grad():
        found = theirs(img, txt, vec, t, ids, torch.zeros(5, 3), g).sample
        expected = ours(img, ids.expand(2, -1, -1), txt, torch.zeros(2, 5, 3), t, vec, guidance=g)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    theirs.save_pretrained("pipeline/transformer")  # a folder that diffusers wrote
    run("pipeline", "back.safetensors", "--to", "flux")
    assert_equal(load_file("back.safetensors"), load_file(path))


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_checkpoint_and_run_folder(run, caplog):
    state = weights(torch.bfloat16, cond_embed=True)
    newest = checkpoint(Path("outputs/exp/epoch0-global_step20"), state, {n: t.float() + 1 for n, t in state.items()})
    checkpoint(Path("outputs/exp/epoch0-global_step10"), {name: 0 * tensor for name, tensor in state.items()})
    run("outputs/exp", "exp.safetensors", "--to", "open-sora")
    assert_equal(load_file("exp.safetensors"), state)
    run(newest, "ema.safetensors", "--to", "open-sora", "--ema")
    assert_equal(load_file("ema.safetensors"), {name: tensor.float() + 1 for name, tensor in state.items()})
    run(newest, "ema16.safetensors", "--to", "flux", "--ema", "--dtype", "bf16")
    averages = {name: (tensor.float() + 1).bfloat16() for name, tensor in state.items()}
    assert_equal(load_file("ema16.safetensors"), convert(averages, OPEN_SORA, FLUX))
    settings = {"type": "flux", **SMALL, "cond_embed": True, "from_pretrained": "exp.safetensors"}
    assert_equal(build_model(settings, torch.bfloat16, "cpu").state_dict(), state)
    with pytest.raises(FileNotFoundError, match=r"asked for, and \S+global_step10 has none"):
        run("outputs/exp/epoch0-global_step10", "x.safetensors", "--to", "flux", "--ema")


def test_checkpoint_tells_its_layout_and_axes(run):
    """A model that trained with flux's rotary form under split names, which no published file has."""
    state = weights()
    path = checkpoint(Path("epoch0-global_step1"), state, settings={"use_liger_rope": False})
    run(path, "out", "--to", "diffusers")
    assert json.loads(Path("out/config.json").read_text())["axes_dims_rope"] == [4, 6, 6]
    run("out", "flux.safetensors", "--to", "flux")
    assert torch.equal(load_file("flux.safetensors")["single_blocks.0.linear1.weight"][:32],
                       state["single_blocks.0.q_proj.weight"])  # fmt: skip
    save_file(state, "unmarked.safetensors")
    run("unmarked.safetensors", "same.safetensors", "--to", "flux", "--from", "open-sora-interleaved")
    assert_equal(load_file("same.safetensors"), load_file("flux.safetensors"))


# ---------------------------------------------------------------------------------------------------- what is wrong


def write_some_inputs():
    save_file(weights(cond_embed=True), "i2v.safetensors")
    save_file(weights(), "small.safetensors")
    save_file(weights(mlp_ratio=2.0), "narrow.safetensors")
    save_file(weights(qkv_bias=False), "unbiased.safetensors")
    state = weights()
    save_file({name: tensor for name, tensor in state.items() if name != "txt_in.bias"}, "part.safetensors")
    save_file({"encoder.conv_in.weight": torch.zeros(3)}, "vae.safetensors")
    checkpoint(Path("turned/epoch0-global_step1"), state, settings={"theta": 500})
    Path("there.safetensors").write_bytes(b"mine")
    Path("folder").mkdir()
    Path("folder/precious.txt").write_text("mine")
    Path("full").mkdir()
    Path("full/config.json").write_text("{}")


@pytest.mark.parametrize(
    "command, message",
    [
        ("i2v.safetensors out --to diffusers", r"can't be written for diffusers'.*: its cond_in.* has no place there"),
        ("narrow.safetensors out --to diffusers", r"its mlp_ratio is 2, there it is 4"),
        ("unbiased.safetensors out --to diffusers", r"its q, k, v have no bias"),
        ("turned out --to diffusers", r"its theta is 500, there it is 10000"),
        ("small.safetensors out --to diffusers", r"heads of 16 dimensions; how rotary .* set --axes-dim"),
        ("small.safetensors out --to diffusers --axes-dim 16 56 56", r"not \[16, 56, 56\] = 128: set --axes-dim"),
        ("small.safetensors out --to flux --from flux", r"is not of layout 'flux': .* the names of 'open-sora'"),
        ("part.safetensors out --to flux", r"does not hold a whole MMDiT .*: 1 missing \(txt_in.bias\)"),
        ("vae.safetensors out --to flux", r"vae.safetensors does not hold the weights of an MMDiT"),
        ("small.safetensors there.safetensors --to flux", r"OUT=there.safetensors exists: .* replace it with --force"),
        ("small.safetensors full --to flux", r"OUT=full exists: .* --force"),
        ("small.safetensors folder --to flux --force", r"OUT=folder also holds other files \(precious.txt\)"),
        ("small.safetensors out.pt --to flux", r"OUT=out.pt: weights are written to a .safetensors file or"),
        ("small.safetensors none/out --to flux", r"OUT=none/out: there is no folder none: make it first"),
        ("none.safetensors out --to flux", r"none.safetensors: no such file or folder"),
        ("small.safetensors out --to flux --ema", r"averaged weights were asked for, and \S+ has none"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(run, command, message):
    write_some_inputs()
    before = sorted(Path().rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError), match=message) as error:
        run(*shlex.split(command))
    assert "\n" not in str(error.value)
    assert sorted(Path().rglob("*")) == before
    assert Path("there.safetensors").read_bytes() == b"mine" and Path("folder/precious.txt").is_file()


def test_force_replaces(run):
    write_some_inputs()
    for out in ("there.safetensors", "full", "full"):
        run("small.safetensors", out, "--to", "open-sora", "--force")
        assert_equal(everything(out), weights())
    assert not Path("full/config.json").exists()
    run("small.safetensors", "small.safetensors", "--to", "flux", "--force")  # onto itself
    assert_equal(load_file("small.safetensors"), convert(weights(), OPEN_SORA, FLUX))
    Path(".tmp-new.safetensors").write_bytes(b"left by a process that was killed")
    with pytest.raises(FileExistsError, match=r".tmp-new.safetensors exists: another process .* or use --force"):
        run("small.safetensors", "new.safetensors", "--to", "flux")
    run("small.safetensors", "new.safetensors", "--to", "flux", "--force")
    assert not list(Path().glob(".*"))


def test_disk_without_room(run, monkeypatch):
    write_some_inputs()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ValueError, match=r"OUT=out needs \d+\.\d KiB, but its disk has 1000 bytes free"):
        run("small.safetensors", "out", "--to", "flux")


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_failed_write_leaves_nothing(run, out):
    """The system refuses to let files grow beyond 100 kB."""
    write_some_inputs()
    before = sorted(Path().rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"writing .*/{out} failed, nothing is left of it: .*File too large"):
            run("small.safetensors", out, "--to", "flux")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(Path().rglob("*")) == before


def test_sizes(script):
    assert [script.parse_size(text) for text in ("4GB", "500 mb", "1.5GiB", "123")] == [
        4 * 10**9, 5 * 10**8, 1.5 * 2**30, 123
    ]  # fmt: skip
    for text in ("4 apples", "0GB", "-1", ""):
        with pytest.raises(Exception, match="is no size"):
            script.parse_size(text)


# ------------------------------------------------------------------------------------------- in a process of its own

MEASURED = """
import json, sys, threading, time
from pathlib import Path
import torch
from opensora.models.export import ExportOptions, export_weights
from opensora.models.weights import build_model
anonymous = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
before = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
if sys.argv[1] == "convert":
    export_weights(sys.argv[2], Path(sys.argv[3]), ExportOptions(to="open-sora"))
else:
    model = build_model({**json.loads(sys.argv[3]), "from_pretrained": sys.argv[2]}, torch.float32, "cpu")
print("MiB", (peak - before) / 2**10)
"""
LARGE = {"hidden_size": 512, "num_heads": 4, "axes_dim": [16, 56, 56], "depth": 4, "depth_single_blocks": 10}


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 300 MiB, whose largest tensor has 7 MiB."""
    with torch.device("meta"):
        shapes = MMDiT(**{**SMALL, **LARGE, "fused_qkv": True}).state_dict()
    numbers = torch.randn(2**21)
    state = {name: numbers[: tensor.numel()].reshape(tensor.shape).clone() for name, tensor in shapes.items()}
    path = tmp_path_factory.mktemp("large") / "flux.safetensors"
    save_file(state, path)
    assert path.stat().st_size > 250 * 2**20
    return path


def anonymous_mib(*arguments):
    """What a process of its own took of memory that no file stands behind, beside the interpreter's."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return float(result.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_file(large):
    assert anonymous_mib("convert", large, "out.safetensors") < 60
    assert Path("out.safetensors").stat().st_size == pytest.approx(large.stat().st_size, rel=0.001)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_loading_takes_little_more_than_the_model(large):
    """Though q and k are converted: benchmarks/load.py measures it at gigabytes."""
    settings = json.dumps({"type": "flux", **SMALL, **LARGE})
    assert anonymous_mib("load", large, settings) < 1.15 * large.stat().st_size / 2**20


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_leaves_nothing(large, number, code):
    command = [sys.executable, SCRIPT, large, "out", "--to", "diffusers"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(Path().glob(".tmp-out/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    assert not list(Path().iterdir())


def test_errors_are_one_line():
    result = subprocess.run(
        [sys.executable, SCRIPT, "./none.safetensors", "out", "--to", "flux"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1
    assert re.fullmatch(r"error: \./none\.safetensors: no such file or folder; .*\n", result.stderr)


# ---------------------------------------------------------------------------------------------------- documentation


def documented():
    text = (ROOT / "ckpts/README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^python scripts/ckpts/convert\.py (.*)$", text, flags=re.MULTILINE)


def adapters(folder, state):
    """A checkpoint of adapters of one layer, trained on Open_Sora_v2."""
    (folder / "lora").mkdir(parents=True)
    (folder / "running_states.json").write_text("{}")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["linear2"]}
    config["base_model_name_or_path"] = "ckpts/Open_Sora_v2.safetensors"
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    out, in_ = state["single_blocks.0.linear2.weight"].shape
    name = "base_model.model.single_blocks.0.linear2"
    pair = {f"{name}.lora_A.weight": torch.ones(2, in_), f"{name}.lora_B.weight": torch.ones(out, 2)}
    save_file(pair, folder / "lora" / "adapter_model.safetensors")


def test_commands_are_documented():
    commands = " ".join(documented())
    assert len(documented()) >= 4
    for word in ("--to open-sora", "--to flux", "--to diffusers", "--ema", "--dtype"):
        assert word in commands


@pytest.mark.parametrize("command", documented())
def test_documented_command(run, command):
    """Word for word, on small models under the documented names (heads of 128, as the published models have)."""
    wide = {"hidden_size": 128, "num_heads": 1, "axes_dim": [16, 56, 56], "depth": 1, "depth_single_blocks": 1}
    state = weights(**wide)
    Path("ckpts").mkdir()
    save_file(convert(weights(**wide, guidance_embed=True), OPEN_SORA, FLUX), "ckpts/flux1-dev.safetensors")
    save_file(state, "ckpts/flux1-dev-fused-rope.safetensors")
    save_file(weights(**wide, cond_embed=True), "ckpts/Open_Sora_v2.safetensors")
    save_file(convert(state, OPEN_SORA, DIFFUSERS), "ckpts/diffusion_pytorch_model.safetensors")
    Path("ckpts/FLUX.1-dev/transformer").mkdir(parents=True)
    Path("ckpts/diffusion_pytorch_model.safetensors").rename(
        "ckpts/FLUX.1-dev/transformer/diffusion_pytorch_model.safetensors"
    )
    checkpoint(Path("outputs/your_experiment/epoch0-global_step100"), state, state, wide)
    adapters(Path("outputs/your_style/epoch0-global_step10"), state)
    before = set(Path().rglob("*"))
    run(*shlex.split(command))
    out = Path(shlex.split(command)[1])
    assert out in set(Path().rglob("*")) - before or "--force" in command
    assert everything(out)
