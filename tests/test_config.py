"""Config files, command-line overrides, and what they say of a mistake."""

# ruff: noqa: RUF009 (`setting` makes a dataclass field)

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from opensora.config import dump_config, load_config, parse_overrides
from opensora.registry import Registry
from opensora.schema import ABSENT, REQUIRED, Mismatch, coerce, literal, read, setting

SHAPES = Registry("shape")
TOOLS = Registry("tool", supplied=("stock",))


@SHAPES.register("circle")
def circle(radius: float, filled: bool = True, dashes: Sequence[int] = (), label: str | None = None, untyped=3): ...


@SHAPES.register("square")
def square(side: int, filled: bool = True): ...


@SHAPES.register("star")
class Star:
    def __init__(self, points: int = 5): ...


@TOOLS.register("pen")
def pen(stock, lr: float = 0.1, eps: float = 0.5): ...


@TOOLS.register("brush")
def brush(stock, lr: float = 0.1, hairs: int = 9): ...


@dataclass(kw_only=True)
class Building:
    source: str | list[str] | None = setting(None, "where from", several=True)
    corners: tuple[int, int] | None = setting(None)


@dataclass(kw_only=True)
class ToolExtras:
    lr: float = setting()
    old_way: bool = setting(ABSENT, legacy="there is a new way")


@dataclass(kw_only=True)
class Ink:
    colour: str = setting("black")
    drops: int | None = setting(None)
    mode: Literal["wet", "dry"] = setting("wet")
    rare: int = setting(ABSENT)


@dataclass(kw_only=True)
class Settings:
    shape: dict = setting(registry=SHAPES, also=Building)
    inlay: dict | None = setting(None, registry=SHAPES)
    tool: dict = setting({"cls": "pen", "lr": 0.1, "eps": 0.5}, registry=TOOLS, selector="cls", also=ToolExtras)
    ink: Ink = setting()
    lr: float | None = setting(None)
    steps: int | None = setting(None, "how many")
    scale: float = setting(1.0)
    fast: bool = setting(False)
    title: str | None = setting(None)
    folder: str = setting("out")
    load: str | list[str] | None = setting(None, several=True)
    weights: dict[str, float] | None = setting(None)
    table: dict[str, dict[int, tuple[float | tuple[float, float], int]]] = setting({})
    pair: tuple[int, int] = setting((1, 2))
    names: list[str] = setting([])
    anything: Any = setting(None)
    workers: int = setting(ABSENT, legacy="there are none")

    aliases: ClassVar[dict[str, str]] = {
        "lr": "tool.lr",
        "eps": "tool.eps",
        "corner": "shape.corners",
        "shape.corner": "shape.corners",
        "colour": "ink.colour",
        "from_file": "shape.source",
    }


@pytest.fixture
def file(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str = 'shape = dict(type="circle", radius=2)', name: str = "config.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def load(file):
    """load(*overrides, text=...) -> the resolved config as a plain dict."""

    def run(*overrides: str, **text: str) -> dict[str, Any]:
        return load_config([file(**text), *overrides], Settings).to_dict()

    return run


def message_of(load, *overrides: str, error: type = ValueError, **text: str) -> str:
    with pytest.raises(error) as found:
        load(*overrides, **text)
    message = str(found.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------ the file


def test_defaults_are_filled_in_and_values_brought_to_their_type(load):
    cfg = load(
        text='shape = dict(type="circle", radius=2, dashes=(1, 2))\npair = [3, 4]\nnames = ("a",)\nink = dict(drops=1)'
    )
    assert cfg["shape"] == {
        "type": "circle", "radius": 2.0, "dashes": [1, 2], "source": None, "corners": None,
    }  # fmt: skip
    assert type(cfg["shape"]["radius"]) is float
    assert cfg["pair"] == (3, 4) and cfg["names"] == ["a"]
    assert cfg["ink"] == {"colour": "black", "drops": 1, "mode": "wet"}
    assert cfg["tool"] == {"cls": "pen", "lr": 0.1, "eps": 0.5}
    assert cfg["steps"] is None and cfg["scale"] == 1.0 and cfg["inlay"] is None
    assert "workers" not in cfg


def test_config_gives_attributes_and_its_file_name(file):
    path = file()
    cfg = load_config([path], Settings)
    assert cfg.shape.radius == 2.0 and cfg.tool.lr == cfg.lr == 0.1
    assert cfg.filename == path
    assert json.loads(dump_config(cfg))["shape"]["type"] == "circle"


def test_base_files_merge_and_private_names_stay_private(file):
    file('_r = 2\nshape = dict(type="circle", radius=_r)\ntable = {"a": {1: (1.0, 2)}, "b": {1: (1.0, 1)}}', "base.py")
    path = file('_base_ = ["base.py"]\nshape = dict(filled=False)\ntable = {"_delete_": True, "a": {5: (0.5, 3)}}')
    cfg = load_config([path], Settings)
    assert (cfg.shape.radius, cfg.shape.filled) == (2.0, False)
    assert cfg.to_dict()["table"] == {"a": {5: (0.5, 3)}}
    assert "_r" not in cfg


def test_delete_without_a_base_is_no_setting(load):
    assert load(text='shape = dict(type="square", side=1, _delete_=True)')["shape"]["side"] == 1


def test_defaults_are_not_shared_between_configs(file):
    first = load_config([file()], Settings)
    first.names.append("x")
    assert load_config([file()], Settings).names == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("shape = dict(type='circle', radius=2)\nstep = 3", "unknown setting 'step' (did you mean 'steps'?)"),
        ("shape = dict(type='circle', radius=2)\nink = dict(color='red')", "'ink.color' (did you mean 'ink.colour'?)"),
        ("shape = dict(type='circle', radios=2)", "shape.radios is not a setting of shape 'circle' (did you mean"),
        ("shape = dict(type='circle')", "shape.radius is not set: give it in the config file or as --shape.radius"),
        ("steps = 3", "shape is not set"),
        ("shape = dict(radius=2)", "shape.type is missing: one of circle, square, star"),
        ("shape = dict(type='circel', radius=2)", "shape.type='circel' is no known shape (did you mean 'circle'?)"),
        ("shape = 3", "shape=3 is not a dict"),
        ("shape = dict(type='circle', radius='2')", "shape.radius='2' is not a number"),
        ("shape = dict(type='square', side=2.5)", "shape.side=2.5 is not an integer"),
        ("shape = dict(type='square', side=True)", "shape.side=True is not an integer"),
        ("shape = dict(type='square', side=1)\nfast = 1", "fast=1 is not True or False"),
        ("shape = dict(type='square', side=1)\ntable = {'a': {1: (1.0, 'x')}}", "table.a.1=(1.0, 'x') is not a tuple"),
        ("shape = dict(type='square', side=1)\nweights = {'a': 1, 'b': 'x'}", "weights.b='x' is not a number"),
        ("shape = dict(type='square', side=1)\nink = dict(mode='dri')", "ink.mode='dri' is not one of 'wet', 'dry'"),
        ("shape = dict(type='square', side=1)\ntool = dict(cls='pen')", "tool.lr is not set"),
        ("shape = dict(\n\n", "line 1: "),
        ("_base_ = ['absent.py']", "absent.py"),
        ("scale = 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_mistakes_in_the_file(load, text, complaint):
    error = FileNotFoundError if "absent" in text else ValueError
    assert complaint in message_of(load, text=text, error=error)


def test_a_syntax_error_in_a_base_file_is_one_line(file):
    file("shape = (", "base.py")
    with pytest.raises(ValueError, match="in a _base_ file: ") as error:
        load_config([file("_base_ = ['base.py']")], Settings)
    assert "\n" not in str(error.value)


def test_no_such_file_and_no_file_at_all(file):
    with pytest.raises(FileNotFoundError, match=r"config file configs/none\.py does not exist"):
        load_config(["configs/none.py"], Settings)
    for argv in ([], ["--steps", "1"]):
        with pytest.raises(ValueError, match="the first argument is the config file"):
            load_config(argv, Settings)
    with pytest.raises(ValueError, match=r"notes\.txt"):
        load_config([file("hello", "notes.txt")], Settings)


def test_help_lists_the_settings(file, capsys):
    with pytest.raises(SystemExit) as end:
        load_config([file(), "--help"], Settings)
    assert not end.value.code
    assert "--steps" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--a.b-c", "1"], {"a.b_c": ["1"]}),
        (["--a.b_c=1"], {"a.b_c": ["1"]}),
        (["--a=x=--y"], {"a": ["x=--y"]}),
        (["--a", "-1.5", "--b", "- a dash"], {"a": ["-1.5"], "b": ["- a dash"]}),
        (["--a="], {"a": [""]}),
        (["--a", "1", "--a", "2"], {"a": ["2"]}),
        (["--many", "1", "2", "--a", "3"], {"many": ["1", "2"], "a": ["3"]}),
    ],
)
def test_parse_overrides(argv, expected):
    found = parse_overrides(argv, {"many"}.__contains__)
    assert {name: override.texts for name, override in found.items()} == expected


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--a"], "--a has no value: --a VALUE"),
        (["--a", "--b", "1"], "--a has no value"),
        (["--b-c", "--d"], "--b-c has no value"),
        (["1"], "unexpected argument '1'"),
        (["--a", "raining,", "sea"], "unexpected argument 'sea': settings are given as --name value (quote"),
        (["--a=1", "2"], "unexpected argument '2'"),
        (["-a", "1"], "unexpected argument '-a'"),
        (["--"], "unexpected argument '--'"),
    ],
)
def test_parse_overrides_refuses(argv, complaint):
    with pytest.raises(ValueError) as error:
        parse_overrides(argv, lambda name: False)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("--steps", "12", 12),
        ("--steps", "-3", -3),
        ("--steps", "none", None),
        ("--steps", "None", None),
        ("--scale", "1e-5", 1e-5),
        ("--scale", "3", 3.0),
        ("--fast", "True", True),
        ("--fast", "true", True),
        ("--fast", "false", False),
        ("--title", "raining, 'sea' \"5\" [1] #", "raining, 'sea' \"5\" [1] #"),
        ("--title", "12", "12"),
        ("--title", "['a', 'b']", "['a', 'b']"),
        ("--title", "none", None),
        ("--title", "", ""),
        ("--folder", "1e-5", "1e-5"),
        ("--pair", "(3, 4)", (3, 4)),
        ("--pair", "[3,4]", (3, 4)),
        ("--pair", "3,4", (3, 4)),
        ("--names", "['a', 'b']", ["a", "b"]),
        ("--weights", "{'a': 1}", {"a": 1.0}),
        ("--weights", "dict(a=1, b=2.5)", {"a": 1.0, "b": 2.5}),
        ("--table", "{'256px': {1: (1.0, 2)}}", {"256px": {1: (1.0, 2)}}),
        ("--table", "{'256px': {'1': ((0.5, 0.5), 2)}}", {"256px": {1: ((0.5, 0.5), 2)}}),
        ("--anything", "12", 12),
        ("--anything", "[1, true, none]", [1, True, None]),
        ("--anything", "just text", "just text"),
    ],
)
def test_a_value_is_read_as_the_type_of_its_setting(load, flag, text, expected):
    for argv in ([flag, text], [f"{flag}={text}"]):
        value = load(*argv)[flag[2:]]
        assert value == expected and type(value) is type(expected)


def test_nested_values(load):
    cfg = load("--ink.drops", "3", "--shape.dashes", "(1, 2)", "--shape.label=a, b", "--tool.eps", "1e-3")
    assert cfg["ink"]["drops"] == 3 and cfg["shape"]["dashes"] == [1, 2] and cfg["shape"]["label"] == "a, b"
    assert cfg["tool"] == {"cls": "pen", "lr": 0.1, "eps": 1e-3}


def test_dashes_and_underscores_are_the_same(load):
    text = 'shape = dict(type="circle", radius=2, untyped=5)'
    assert load("--tool.old-way", "True", text=text) == load("--tool.old_way", "True", text=text)


def test_a_parameter_without_annotation_takes_its_defaults_type(load):
    assert load("--shape.untyped", "4")["shape"]["untyped"] == 4
    assert "--shape.untyped 'x' is not an integer" in message_of(load, "--shape.untyped", "x")


def test_entries_of_free_form_dicts(load):
    text = 'shape = dict(type="square", side=1)\ntable = {"256px": {1: (1.0, 2), 5: (1.0, 1)}}\nweights = dict(a=1)'
    cfg = load("--table.256px.1", "(0.5, 8)", "--weights.b", "2", text=text)
    assert cfg["table"] == {"256px": {1: (0.5, 8), 5: (1.0, 1)}}
    assert cfg["weights"] == {"a": 1.0, "b": 2.0}
    assert "'x' is not an integer" in message_of(load, "--table.256px.x", "(1, 1)", text=text)
    assert "steps is an integer or None: it has no setting 'x'" in message_of(load, "--steps.x", "1", text=text)


def test_a_glob_may_give_several_values(load):
    assert load("--load", "a/epoch0", "--fast", "True")["load"] == "a/epoch0"
    cfg = load("--load", "a/epoch0", "a/epoch1", "--shape.source", "b", "c", "--fast", "True")
    assert cfg["load"] == ["a/epoch0", "a/epoch1"] and cfg["shape"]["source"] == ["b", "c"] and cfg["fast"]
    assert load("--from-file", "b", "c")["shape"]["source"] == ["b", "c"]
    assert "unexpected argument 'b'" in message_of(load, "--title", "a", "b")


def test_a_whole_dict_swaps_a_component(load):
    cfg = load("--shape", "dict(type='square', side=3)", "--shape.filled", "False")
    assert cfg["shape"] == {"type": "square", "side": 3, "filled": False, "source": None, "corners": None}
    assert load("--inlay", "{'type': 'square', 'side': 1}")["inlay"] == {"type": "square", "side": 1}
    text = 'shape = dict(type="square", side=1)\ninlay = dict(type="square", side=1)'
    assert load("--inlay", "none", text=text)["inlay"] is None


def test_a_type_alone_may_be_changed_where_the_rest_fits(load):
    text = 'shape = dict(type="square", filled=False)'
    cfg = load("--shape.radius", "3", "--shape.type", "circle", text=text)
    assert (cfg["shape"]["type"], cfg["shape"]["radius"], cfg["shape"]["filled"]) == ("circle", 3.0, False)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--step", "3"], "unknown setting 'step' (did you mean 'steps'?)"),
        (["--radius", "3"], "unknown setting 'radius' (did you mean 'shape.radius'?)"),
        (["--shape.radios", "3"], "shape.radios is not a setting of shape 'circle' (did you mean 'shape.radius'?)"),
        (["--ink.drop", "3"], "unknown setting 'ink.drop' (did you mean 'ink.drops'?)"),
        (
            ["--inlay.side", "3"],
            'inlay.side: inlay is not set; give the whole component: --inlay "dict(type=..., ...)"',
        ),
        (["--tool.stock", "3"], "tool.stock is not a setting of tool 'pen'"),
        (
            ["--shape.type", "square"],
            'shape.radius is not a setting of it; give the whole component, --shape "dict(type=',
        ),
        (
            ["--tool.cls", "brush"],
            "tool.cls='brush' does not go with the rest of tool: tool.eps is not a setting of it",
        ),
        (["--shape.type", "pentagon"], "shape.type='pentagon' is no known shape (known: circle, square, star)"),
        (["--shape", "circle"], "--shape 'circle' is not a dict: give it as \"dict(key=value, ...)\""),
        (["--shape", "none"], "--shape 'none' is not a dict"),
        (["--shape", "dict(type='circle')"], "shape.radius is not set"),
        (["--weights", "dict(a='x')"], "--weights.a 'x' is not a number"),
        (["--weights", "dict(open('x'))"], "is not a dict or None"),
        (["--ink", "dict(drops='x')"], "ink.drops='x' is not an integer or None"),
        (["--ink.mode", "dri"], "--ink.mode 'dri' is not one of 'wet', 'dry'"),
        (["--steps", "ten"], "--steps 'ten' is not an integer or None"),
        (["--steps", "1e3"], "--steps '1e3' is not an integer"),
        (["--steps", "True"], "--steps 'True' is not an integer"),
        (["--steps="], "--steps '' is not an integer"),
        (["--scale", "fast"], "--scale 'fast' is not a number"),
        (["--scale", "none"], "--scale 'none' is not a number"),
        (["--scale", "1e999"], "--scale '1e999' is not a number"),
        (["--fast", "yes"], "--fast 'yes' is not True or False"),
        (["--fast", "1"], "--fast '1' is not True or False"),
        (["--pair", "(1, 2, 3)"], "--pair '(1, 2, 3)' is not a tuple (an integer, an integer)"),
        (["--names", "[1]"], "--names '[1]' is not a list (each: text)"),
        (["--folder", "none"], "--folder 'none' is not text"),
    ],
)
def test_mistakes_on_the_command_line(load, argv, complaint):
    assert complaint in message_of(load, *argv)


# ------------------------------------------------------------------------------------------------------- aliases


def test_either_name_of_a_setting_changes_the_run(load):
    for flag in ("--lr", "--tool.lr"):
        cfg = load(flag, "1e-5")
        assert cfg["lr"] == cfg["tool"]["lr"] == 1e-5
    for flag in ("--corner", "--shape.corner", "--shape.corners"):
        cfg = load(flag, "(1, 2)")
        assert cfg["shape"]["corners"] == (1, 2)
        assert "corner" not in cfg and "corner" not in cfg["shape"]


def test_both_names_must_agree(load):
    assert load("--lr", "1e-5", "--tool.lr", "0.00001")["lr"] == 1e-5
    complaint = message_of(load, "--lr", "1e-5", "--tool.lr", "2e-5")
    assert complaint == "--lr 1e-5 and --tool.lr 2e-5 are the same setting: give one of them"


def test_aliases_in_a_file(load):
    circle = 'shape = dict(type="circle", radius=2)\n'
    assert load(text=circle + "lr = 3")["tool"] == {"cls": "pen", "lr": 3.0, "eps": 0.5}
    assert load(text=circle + "lr = 3.0\ntool = dict(cls='pen', lr=3)")["lr"] == 3.0
    assert load(text=circle + "lr = None\ntool = dict(cls='pen', lr=3)")["lr"] == 3.0
    cfg = load(text='shape = dict(type="circle", radius=2, corner=[1, 2])\ncorner = (1, 2)')
    assert cfg["shape"]["corners"] == (1, 2) and "corner" not in cfg["shape"]
    for text in ("lr = 3\ntool = dict(cls='pen', lr=4)", "corner = (1, 2)\nshape['corner'] = (1, 3)"):
        assert "are the same setting" in message_of(load, text=circle + text)
        assert load("--lr", "5", "--corner", "(1, 4)", text=circle + text)["lr"] == 5


def test_a_whole_dict_goes_before_the_files_alias(load):
    text = 'shape = dict(type="circle", radius=2)\nlr = 3\neps = 0.25\ntool = dict(cls="pen", lr=lr, eps=eps)'
    assert load("--tool", "dict(cls='pen', lr=4)", text=text)["tool"] == {"cls": "pen", "lr": 4.0, "eps": 0.25}
    assert load("--tool", "dict(cls='pen')", text=text)["tool"] == {"cls": "pen", "lr": 3.0, "eps": 0.25}
    assert load("--tool", "dict(cls='brush')", text=text)["tool"] == {"cls": "brush", "lr": 3.0}
    cfg = load("--shape", "dict(type='square', side=1, corner=(1, 2))", text=text)
    assert cfg["shape"]["corners"] == (1, 2)


# ------------------------------------------------------------------------------------------------------- legacy


def test_legacy_settings_are_said_to_do_nothing(load, monkeypatch):
    lines = []
    monkeypatch.setattr(logging.getLogger("opensora"), "info", lines.append)
    cfg = load("--workers", "3", "--tool.old-way", "True")
    assert cfg["workers"] == 3 and cfg["tool"]["old_way"] is True
    expected = "workers (there are none), tool.old_way (there is a new way)"
    assert sorted(lines[0].partition(": ")[2].split(", ")) == sorted(expected.split(", "))
    load()
    assert len(lines) == 1


# ------------------------------------------------------------------------------------------------------- values


def test_literals():
    assert literal("dict(a=dict(b=[1, 2]), c=None)") == {"a": {"b": [1, 2]}, "c": None}
    assert literal(" -1e-5 ") == -1e-5
    for text in ("1 +", "open('x')", "dict([1])", "dict(**x)", "a b", "__import__('os')", "[" * 500):
        with pytest.raises(ValueError):
            literal(text)


def test_read_and_coerce_of_unions():
    assert read("4", str | int | float | None) == "4"
    assert coerce(4, float | int) == 4 and type(coerce(4, float | int)) is int
    assert read("a", Literal["a", "b"] | None) == "a"
    assert read("x", Any, replaces="y") == "x"
    assert read("[1]", Any, replaces=(2,)) == (1,)
    assert read("none", Any, replaces=3) is None
    with pytest.raises(Mismatch, match="'c' is not one of 'a', 'b'"):
        read("c", Literal["a", "b"])
    with pytest.raises(Mismatch, match="nan is not a number"):
        coerce(float("nan"), float)


def test_marks_are_not_values():
    assert repr(REQUIRED) == "required" and repr(ABSENT) == "absent"
