"""The READMEs and the Makefile say only what works: every command is parsed by what would run it.

A command's script, config, flags and settings, Make targets and files must exist; so must what the annotated tree
names. Nothing is trained or downloaded here.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.config import load_config
from opensora.inference.settings import InferenceSettings
from opensora.inference.settings import validate as validate_inference
from opensora.training.cache_settings import CacheSettings
from opensora.training.settings import TrainSettings
from opensora.training.settings import validate as validate_training

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "datasets/README.md", ROOT / "ckpts/README.md", ROOT / "benchmarks/README.md"]
MAKEFILE = ROOT / "Makefile"

TRAIN = "torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage1.py"
TRAIN_PEXELS = f"{TRAIN} --dataset.data-path datasets/pexels_45k_necessary.csv"
RESUME = f"{TRAIN_PEXELS} --load outputs/your_experiment/epoch*-global_step*"
META = "python scripts/cnv/meta.py --input datasets/pexels_45k.csv --output datasets/pexels_45k_nec.csv --num_workers"
PROMISED = [
    f"{META} 0",
    f"{META} 64",
    TRAIN_PEXELS,
    f"{TRAIN_PEXELS} --lr 1e-5 --wandb True",
    RESUME,
    f"{RESUME} --start-step 0 --start-epoch 0",
    "torchrun --nproc_per_node 1 --standalone scripts/diffusion/inference.py "
    'configs/diffusion/inference/t2i2v_256px.py --save-dir samples --prompt "raining, sea" '
    "--model.from_pretrained outputs/your_experiment/epoch*-global_step*",
]


def script_module(path: str):
    """A script of the repository, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their annotations there
    spec.loader.exec_module(module)
    return module


LOADED_BY = {
    "scripts/diffusion/train.py": (TrainSettings, validate_training),
    "scripts/diffusion/inference.py": (InferenceSettings, validate_inference),
    "scripts/diffusion/app.py": (script_module("scripts/diffusion/app.py").AppSettings, lambda cfg, world_size: None),
    "scripts/cnv/cache.py": (CacheSettings, validate_training),
    "scripts/cnv/buckets.py": (script_module("scripts/cnv/buckets.py").BucketsSettings, validate_training),
}
PLAIN = {"cat", "cd", "export", "git", "ls", "mv", "source", "tail", "tar", "tensorboard", "touch"}  # not ours to check
SEPARATORS = {"&&", "||", "|", ";"}


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(script: str) -> list[list[str]]:
    """The simple commands of a shell text, as argument lists without leading assignments."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
            words = []
    return found


def documented_commands() -> list[tuple[str, list[str]]]:
    return [
        (str(document.relative_to(ROOT)), command)
        for document in DOCUMENTS
        for block in code_blocks(document.read_text(encoding="utf-8"), "bash")
        for command in commands(block)
    ]


# ------------------------------------------------------------------------------------------- one check per program


def check_make(arguments: list[str]) -> None:
    makefile = MAKEFILE.read_text(encoding="utf-8")
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        pattern = rf"^{re.escape(name)} \?=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, flags=re.MULTILINE), f"the Makefile has no {name}"


def check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(arguments)
    check_script(launch.training_script, launch.training_script_args, int(launch.nproc_per_node))


def check_colossalai(arguments: list[str]) -> None:
    from colossalai.cli.launcher import run

    known = {option for parameter in run.params for option in parameter.opts}
    assert arguments[0] == "run"
    script = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
    flags = dict(itertools.pairwise(arguments[1:script]))
    assert set(filter(lambda word: word.startswith("--"), flags)) <= known
    hosts = 2  # of the hostfile
    check_script(arguments[script], arguments[script + 1 :], hosts * int(flags["--nproc_per_node"]))


def check_sbatch(arguments: list[str]) -> None:
    script = next(i for i, word in enumerate(arguments) if word.endswith(".sbatch"))
    assert (ROOT / arguments[script]).is_file(), f"there is no {arguments[script]}"
    check_script("scripts/diffusion/train.py", arguments[script + 1 :], world_size=16)


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert arguments[1] in ("pip", "pytest", "venv"), f"python -m {arguments[1]}: teach this test to check it"
        return
    check_script(arguments[0], arguments[1:], world_size=1)


def check_script(script: str, arguments: list[str], world_size: int) -> None:
    assert (ROOT / script).is_file(), f"there is no {script}"
    if script in LOADED_BY:
        settings, validate = LOADED_BY[script]
        if arguments == ["--help"]:
            with pytest.raises(SystemExit, match=r"^0$"):
                load_config(arguments, settings)
            return
        validate(load_config(arguments, settings), world_size)
    else:
        check_flags(f"{sys.executable} {script}", arguments)


def check_hf(arguments: list[str]) -> None:
    program = Path(sys.executable).with_name("hf")
    if program.exists():
        check_flags(f"{program} {arguments[0]}", arguments[1:])


def check_flags(program: str, arguments: list[str]) -> None:
    known = set(re.findall(r"--[a-z][\w-]*", usage(program)))
    unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in known]
    assert not unknown, f"{program} takes no {unknown}"


@functools.cache
def usage(program: str) -> str:
    run = subprocess.run(
        [*shlex.split(program), "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def check_pip(arguments: list[str]) -> None:
    for flag, name in itertools.pairwise(arguments):
        assert flag != "-r" or (ROOT / name).is_file(), f"pip install -r {name}: there is no such file"
    pins = [word for word in arguments if word.startswith("colossalai")]
    assert all(pin in MAKEFILE.read_text(encoding="utf-8") for pin in pins), f"{pins}: the Makefile installs another"


CHECKS = {
    "make": check_make,
    "torchrun": check_torchrun,
    "python": check_python,
    "python3": check_python,
    "hf": check_hf,
    "colossalai": check_colossalai,
    "sbatch": check_sbatch,
    "pip": check_pip,
}


def check(command: list[str]) -> None:
    program, *arguments = command
    if program in CHECKS:
        CHECKS[program](arguments)
    else:
        assert program in PLAIN, f"{program}: teach this test to check it"


# ------------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=f"{d}: {shlex.join(c)[:100]}") for d, c in documented_commands()]
)
def test_command_is_right(command):
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make demmo",
        "make demo COLOUR=red",
        "torchrun --nproc_per_node 8 scripts/diffusion/trian.py configs/diffusion/train/stage1.py",
        f"{TRAIN} --dataset.data-path x.csv --learning-rate 1e-5",
        f"{TRAIN} --dataset.data-path x.csv --lr fast",
        "torchrun --ranks 8 scripts/diffusion/train.py configs/diffusion/train/stage1.py",
        "python scripts/cnv/meta.py --inputs x.csv",
        "pip install --no-deps colossalai==0.4.0",
        "conda install torch",
    ],
)
def test_wrong_command_is_found(command):
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(shlex.split(command))


@pytest.mark.parametrize("promised", PROMISED)
def test_promised_command_is_in_the_readme(promised):
    blocks = code_blocks(README.read_text(encoding="utf-8"), "bash")
    assert any(shlex.split(promised) == command for block in blocks for command in commands(block))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_demo_runs_documented_commands():
    """What `make demo` would run, on a machine with nothing made yet, takes the flags that it is given."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    text = run.stdout.replace("$processes", "2").replace("$resume", "--load outputs/shapes")
    ours = [c for c in commands(text) if c[0] in ("torchrun", "python") and any(w.startswith("scripts/") for w in c)]
    for command in ours:
        check(command)
    scripts = [next(word for word in command if word.startswith("scripts/")) for command in ours]
    assert [Path(script).stem for script in scripts] == ["make_shapes", "meta", "train", "inference", "score"]


def test_tree_exists():
    (tree,) = code_blocks(README.read_text(encoding="utf-8"), "tree")
    folders: list[str] = []
    for line in tree.splitlines():
        names, depth = re.split(r"\s{2,}", line.strip())[0].split(), (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        for name in names:
            assert (ROOT / "/".join([*folders, name])).exists(), f"the tree names {'/'.join([*folders, name])}"
        folders.append(names[-1].rstrip("/"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_quoted_errors_are_ours():
    """The fixed words of each message in the troubleshooting table occur in the source."""
    source = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))  # adjacent strings are one
        for folder in ("opensora", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    )
    section = README.read_text(encoding="utf-8").split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert len(messages) >= 10
    for message in messages:
        for words in message.split("…"):
            assert words.strip() in source, f"no message says '{words.strip()}'"
