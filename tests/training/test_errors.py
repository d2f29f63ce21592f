"""A user's mistake: one line that names the setting, its value and the remedy, and an exit code that is not 0."""

import re

import pytest

SETTINGS_MISTAKES = [
    (["--optim.lrr", "1e-4"], "optim.lrr .*did you mean 'optim.lr'"),
    (["--max-stepz", "5"], "'max_stepz' .*did you mean 'max_steps'"),
    (["--max-steps", "many"], "--max-steps 'many' is not an integer"),
    (["--wandb"], "--wandb has no value"),
    (["--dataset.data-path", "datasets/absent.csv"], "datasets/absent.csv"),
    (["--load", "outputs/absent"], "outputs/absent"),
    (["--ae.from-pretrained", "ckpts/absent.safetensors"], "ckpts/absent.safetensors"),
    (["--plugin", "hybrid", "--plugin_config", "dict(sp_size=2)"], "sp_size=2 = 2 does not divide .* 1 processes"),
    (["--plugin-config", "{'reduce_bucket_sise_in_m': 1}"], "reduce_bucket_sise_in_m"),
    (["--lora-config", "{'r': 8}"], "lora_config"),
]


@pytest.fixture
def train_main(shapes, monkeypatch):
    """train.py's main in this process, at the user's place: for mistakes that are found before a group is made."""
    import importlib.util

    from shapes_world import REPOSITORY

    monkeypatch.chdir(shapes.root)
    spec = importlib.util.spec_from_file_location("train_script", REPOSITORY / "scripts/diffusion/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(("mistake", "message"), SETTINGS_MISTAKES)
def test_settings(train_main, shapes, mistake, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train_main(shapes.train_arguments(*mistake))
    assert "\n" not in str(error.value)


def fails_on_two_ranks(shapes, *arguments: str) -> str:
    """What rank 0 says; both ranks must end."""
    result = shapes.run("scripts/diffusion/train.py", *arguments, ranks=2, check=False)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr[-3000:]
    assert not re.search(r"Traceback \(most recent call last\):(?s:.*)train\.py\", line \d+, in main", result.stderr)
    return lines[0]


def test_two_ranks_say_a_wrong_key_once(shapes):
    assert "did you mean 'max_steps'" in fails_on_two_ranks(shapes, *shapes.train_arguments("--max-stepz", "5"))


@pytest.mark.slow
def test_two_ranks_say_once_that_no_batch_can_form(shapes):
    huge = ["--bucket-config", "{'64px': {9: (1.0, 4000)}}"]
    line = fails_on_two_ranks(shapes, *shapes.train_arguments(*huge))
    assert "no batch can be formed" in line and "4000" in line


@pytest.mark.slow
def test_two_ranks_say_once_which_columns_are_missing(shapes):
    line = fails_on_two_ranks(shapes, *shapes.train_arguments("--dataset.data-path", "datasets/shapes.csv"))
    assert "num_frames" in line and "scripts/cnv/meta.py" in line


@pytest.mark.slow
def test_two_ranks_say_once_that_nothing_can_be_read(shapes, tmp_path):
    header, *rows = (shapes.root / shapes.table).read_text().splitlines()
    table = tmp_path / "moved.csv"
    table.write_text("\n".join([header, *("moved/" + row for row in rows)]) + "\n")
    line = fails_on_two_ranks(shapes, *shapes.train_arguments("--dataset.data-path", str(table), "--num-workers", "1"))
    assert "no sample of a batch can be read" in line
