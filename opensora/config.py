"""A config file and the command line -> one resolved config, in which every setting is known and has its type."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from opensora.common import get_logger, rank
from opensora.registry import nearest
from opensora.schema import ABSENT, REQUIRED, Mismatch, Node, coerce, describe, literal, members, read, root, walk


class Override(NamedTuple):
    """What the command line gives for a setting: the flag as it was written, and the texts after it."""

    flag: str
    texts: list[str]

    def __str__(self) -> str:
        return " ".join((self.flag, *self.texts))


Overrides = dict[str, Override]  # by dotted name


def load_config(argv: Sequence[str], settings: type) -> Config:
    """The config that a command line means: `CONFIG --a.b-c value --a.b-c=value ...`.

    Args:
        argv: the command line after the program's name.
        settings: the schema, a dataclass whose fields are made by `opensora.schema.setting`. Its `aliases` (name ->
            dotted name) are settings that stand for another one.

    Returns:
        All settings with their defaults. A value has the type that the schema, or the signature of the component it
        belongs to, names.

    Raises:
        FileNotFoundError: there is no such config file.
        ValueError: a setting is unknown, has a value of another type or none, or two settings contradict each other.
    """
    if argv[:1] == ["-h"] or "--help" in argv:
        print_settings(settings)
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise ValueError("the first argument is the config file, e.g. configs/diffusion/train/stage1.py")
    schema, aliases = root(settings), settings.aliases
    in_file = read_file(argv[0])
    overrides = parse_overrides(argv[1:], _several_names(schema, aliases).__contains__)
    overrides = _without_aliases(overrides, aliases, schema, in_file)
    values = _merge(in_file, overrides, aliases, schema)
    resolved = _Resolver(schema, values, retyped={n.rpartition(".")[0] for n in overrides if _selects(n)}).resolve()
    for alias in aliases.keys() & schema.children().keys():  # listed in the schema too: shows what it stands for
        resolved[alias] = _get(resolved, aliases[alias].split("."))
    return Config(resolved, filename=argv[0])


def dump_config(cfg: Config) -> str:
    """The config as JSON."""
    return json.dumps(cfg.to_dict(), indent=2)


def print_settings(settings: type) -> None:
    """The schema, a setting per line, on rank 0."""
    if rank() != 0:
        return
    print("CONFIG [--setting value ...]    (a.b is b of a; - and _ are the same)")
    for node in walk(root(settings)):
        if node.metadata.get("doc"):
            print(f"  --{node.name.replace('_', '-'):36} {node.metadata['doc']} ({describe(node.annotation)})")


# ------------------------------------------------------------------------------------------------ file and flags


def read_file(path: str) -> dict[str, Any]:
    """The top-level names of a config file, with `_base_` files merged; names that start with `_` are the file's own.

    Raises:
        FileNotFoundError: it, or a file that it builds on, does not exist.
        ValueError: it is no config: the wrong kind of file, a syntax error, an error while it runs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        values = Config.fromfile(path, lazy_import=False, format_python_code=False).to_dict()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config file {path}: {_one_line(error)}") from None
    except SyntaxError as error:
        raise ValueError(f"config file {path}: {_syntax_error(path, error)}") from None
    except Exception as error:  # the file is a program: it may raise anything
        raise ValueError(f"config file {path}: {type(error).__name__}: {_one_line(error)}") from None
    return _without_deletions({key: value for key, value in values.items() if not key.startswith("_")})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _syntax_error(path: str, error: SyntaxError) -> str:
    """Where the error is: mmengine does not say whether in the file or in one that it builds on."""
    try:
        compile(Path(path).read_text(encoding="utf-8"), path, "exec")
    except SyntaxError as own:
        return f"line {own.lineno}: {own.msg}"
    return f"in a _base_ file: {_one_line(error)}"


def _without_deletions(value: Any) -> Any:
    """`_delete_` has done its work when the files are merged; mmengine leaves it where there was nothing to delete."""
    if not isinstance(value, dict):
        return value
    return {key: _without_deletions(item) for key, item in value.items() if key != "_delete_"}


def parse_overrides(arguments: Sequence[str], takes_several: Callable[[str], bool]) -> Overrides:
    """`--a.b-c value` and `--a.b-c=value` -> {"a.b_c": (flag, [value])}; the last one counts.

    Only what begins with `--` is a flag, so that a value may be a negative number. Settings for which `takes_several`
    holds take all values up to the next flag.
    """
    overrides: Overrides = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        flag, equals, value = argument.partition("=")
        position += 1
        if not flag.startswith("--") or flag == "--":
            raise ValueError(
                f"unexpected argument '{argument}': settings are given as --name value (quote a value that has spaces; "
                "`colossalai run` takes one pair of quotes off: give it two, \"'raining, sea'\")"
            )
        name = flag[2:].replace("-", "_")
        texts = [value] if equals else []
        while not equals and position < len(arguments) and not arguments[position].startswith("--"):
            if texts and not takes_several(name):
                break
            texts.append(arguments[position])
            position += 1
        if not texts:
            raise ValueError(f"{flag} has no value: {flag} VALUE ({flag}=VALUE if it begins with --)")
        overrides[name] = Override(flag, texts)
    return overrides


def _several_names(schema: Node, aliases: Mapping[str, str]) -> set[str]:
    names = {node.name for node in walk(schema) if node.metadata.get("several")}
    return names | {alias for alias, target in aliases.items() if target in names}


# ------------------------------------------------------------------------------------------- file + flags, aliases


def _without_aliases(overrides: Overrides, aliases: Mapping[str, str], schema: Node, in_file: dict) -> Overrides:
    """Overrides by the name that an alias stands for; ValueError if two names of one setting disagree."""
    found: Overrides = {}
    for name, override in overrides.items():
        target = aliases.get(name, name)
        if target in found:
            _, node, replaces = locate(schema, in_file, target)
            if _read(node, found[target], replaces) != _read(node, override, replaces):
                raise ValueError(f"{found[target]} and {override} are the same setting: give one of them")
        found[target] = override
    return found


def _selects(name: str) -> bool:
    """Whether a setting selects a component's type."""
    return name.endswith((".type", ".cls"))


def _merge(in_file: dict, overrides: Overrides, aliases: Mapping[str, str], schema: Node) -> dict[str, Any]:
    """The file's values under what the command line gives; no alias is left in them.

    Whole sections and the types of components come first: they decide what the other keys are.
    """
    values = copy.deepcopy(in_file)
    for key, node in schema.children().items():  # an override may name a part of a section that the file lacks
        if node.is_section and isinstance(node.default, Mapping):
            values.setdefault(key, node.default)
    first = {name: o for name, o in overrides.items() if "." not in name or _selects(name)}
    for name in sorted(first, key=lambda name: name.count(".")):
        _override(schema, values, name, first[name])
    _merge_aliases(in_file, values, aliases, overrides, schema)
    for name in sorted(overrides.keys() - first.keys(), key=lambda name: name.count(".")):
        _override(schema, values, name, overrides[name])
    return values


def _merge_aliases(in_file: dict, values: dict, aliases: Mapping[str, str], given: Overrides, schema: Node) -> None:
    """Move a file's aliases to what they stand for. What the command line gives goes before them."""
    moved: dict[str, Any] = {}
    for alias, target in aliases.items():
        keys = target.split(".")
        value = _pop(values, alias.split("."))
        if value is None or target in given:
            continue
        stated = moved.get(target, _get(in_file, keys))
        if keys[0] in given:  # the whole section is from the command line: what it leaves out and takes
            section = schema.children()[keys[0]]
            stated = _get(values, keys) if keys[-1] in section.children(values[keys[0]]) else value
        elif stated is not None and _plain(stated) != _plain(value):
            raise ValueError(
                f"{alias}={value!r} and {target}={stated!r} are the same setting: give both one value in the config "
                f"file (a file that inherits both sets both), or override one with --{alias} VALUE"
            )
        if stated is None:
            _put(values, keys, value)
        moved[target] = value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _get(values: Any, keys: Sequence[Any]) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _put(values: dict, keys: Sequence[Any], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def _pop(values: dict, keys: Sequence[str]) -> Any:
    parent = _get(values, keys[:-1])
    return parent.pop(keys[-1], None) if isinstance(parent, dict) else None


# --------------------------------------------------------------------------------------------------- overrides


def locate(schema: Node, values: Mapping[str, Any], name: str) -> tuple[list[Any], Node, Any]:
    """(its keys, the setting, the value it has) for a dotted name; ValueError if there is no such setting."""
    keys, node, value = [], schema, values
    for key in name.split("."):
        if node.is_section:
            children = node.children(value)
            if key not in children:
                raise unknown(name, node, value, schema, values)
            node = children[key]
        else:
            key, node = node.item(key)
        keys.append(key)
        value = value.get(key) if isinstance(value, Mapping) else None
    return keys, node, value


def _override(schema: Node, values: dict, name: str, override: Override) -> None:
    keys, node, replaces = locate(schema, values, name)
    _put(values, keys, _read(node, override, replaces))


def _read(node: Node, override: Override, replaces: Any) -> Any:
    """The value that an override means for a setting; ValueError if none."""
    if len(override.texts) > 1:
        return override.texts
    text = override.texts[0]
    if node.is_section and text not in ("none", "None"):
        try:
            value = literal(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"{override.flag} '{text}' is not a dict: give it as \"dict(key=value, ...)\"")
        return value
    try:
        return read(text, node.annotation, replaces)
    except Mismatch as error:
        where = ".".join(map(str, (override.flag, *error.keys)))
        raise ValueError(f"{where} {error.value if error.keys else text!r} is not {error.expected}") from None


def unknown(name: str, parent: Node, value: Any, schema: Node, values: Mapping[str, Any]) -> ValueError:
    """The error for a setting that does not exist, with the nearest one that does."""
    if parent.registry is not None and not isinstance(value, Mapping):
        return ValueError(
            f"{name}: {parent.name} is not set; give the whole component: "
            f'--{parent.name} "dict({parent.selector}=..., ...)"'
        )
    names = [node.name for node in walk(schema, values) if not name.startswith(node.name + ".")]

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, name, known).ratio()
        return max(whole, 0.9 * difflib.SequenceMatcher(None, name.split(".")[-1], known.split(".")[-1]).ratio())

    remedy = f"did you mean '{max(names, key=likeness)}'?"
    if parent.registry is not None:
        kind, selected = parent.registry.kind, value.get(parent.selector)
        return ValueError(f"{name} is not a setting of {kind} '{selected}' ({remedy})")
    return ValueError(f"unknown setting '{name}' ({remedy})")


# --------------------------------------------------------------------------------------------------- resolution


class _Resolver:
    """Checks every value against its setting, brings it to its type and fills in the defaults.

    retyped: the components whose type alone was overridden.
    """

    def __init__(self, schema: Node, values: Mapping[str, Any], retyped: set[str]):
        self.schema, self.values, self.retyped = schema, values, retyped
        self.ignored: list[str] = []
        self.missing: list[str] = []

    def resolve(self) -> dict[str, Any]:
        resolved = self._section(self.schema, self.values)
        if self.missing:  # last: what is given wrong is more helpful to hear of than what is not given
            raise ValueError(self.missing[0])
        if self.ignored:
            get_logger().info("settings that have no effect in this version: " + ", ".join(self.ignored))
        return resolved

    def _section(self, node: Node, values: Mapping[str, Any]) -> dict[str, Any]:
        if node.registry is not None:
            self._check_selected(node, values)
        children = node.children(values)
        for key in values:
            if key not in children:
                name = f"{node.name}.{key}" if node.name else str(key)
                if node.name in self.retyped:
                    raise self._left_over(node, f"{name} is not a setting of it")
                raise unknown(name, node, values, self.schema, self.values)
        resolved = {key: self._value(children[key], value) for key, value in values.items()}
        for key, child in children.items():
            if key not in values and child.default is not ABSENT:
                resolved[key] = self._default(node, child)
        return resolved

    def _value(self, node: Node, value: Any) -> Any:
        if node.metadata.get("legacy"):
            self.ignored.append(f"{node.name} ({node.metadata['legacy']})")
        if node.is_section and isinstance(value, Mapping):
            return self._section(node, value)
        if node.is_section and (value is not None or type(None) not in members(node.annotation)):
            raise ValueError(f"{node.name}={value!r} is not a dict")
        try:
            return coerce(value, node.annotation)
        except Mismatch as error:
            name = ".".join(map(str, (node.name, *error.keys)))
            raise ValueError(f"{name}={error.value!r} is not {error.expected}") from None

    def _default(self, parent: Node, node: Node) -> Any:
        if node.default is REQUIRED and parent.name in self.retyped:
            raise self._left_over(parent, f"{node.name} is not set")
        if node.default is REQUIRED:
            flag = f"--{node.name.replace('_', '-')}"
            self.missing.append(f"{node.name} is not set: give it in the config file or as {flag} VALUE")
        if node.is_section and isinstance(node.default, Mapping):
            return self._section(node, node.default)
        return node.default

    def _check_selected(self, node: Node, values: Mapping[str, Any]) -> None:
        known, selected = node.registry.names(), values.get(node.selector)
        where = f"{node.name}.{node.selector}"
        if selected is None:
            raise ValueError(f"{where} is missing: one of {', '.join(known)}")
        if selected not in known:
            raise ValueError(f"{where}='{selected}' is no known {node.registry.kind}{nearest(str(selected), known)}")

    def _left_over(self, node: Node, problem: str) -> ValueError:
        """The error for settings that were meant for the type that a component had before."""
        selected = self.values[node.name][node.selector]
        return ValueError(
            f"{node.name}.{node.selector}='{selected}' does not go with the rest of {node.name}: {problem}; give the "
            f"whole component, --{node.name} \"dict({node.selector}='{selected}', ...)\""
        )
