"""What settings there are and of what type: dataclasses are the schema that a config is read against."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from opensora.registry import Registry


class _Mark:
    def __init__(self, name: str):
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def __deepcopy__(self, memo) -> _Mark:
        return self


REQUIRED = _Mark("required")  # in place of a default: the setting must be given
ABSENT = _Mark("absent")  # in place of a default: the setting stays out of the resolved config until it is given


def setting(
    default: Any = REQUIRED,
    doc: str = "",
    *,
    several: bool = False,
    legacy: str | None = None,
    registry: Registry | None = None,
    selector: str = "type",
    also: type | None = None,
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: what the setting is where no config gives it, or REQUIRED, or ABSENT. A nested settings class needs
            none: it is made of its own defaults.
        doc: one line for `--help`.
        several: the command line takes several values after the flag, which make a list.
        legacy: the setting is accepted and does nothing; why.
        registry: the setting is a component: a dict whose `selector` names one of the registry, and whose other keys
            are the arguments of that one.
        also: a settings dataclass of what the component's builder takes beside the component's own arguments.
    """
    metadata = {
        "doc": doc,
        "several": several,
        "legacy": legacy,
        "registry": registry,
        "selector": selector,
        "also": also,
    }
    return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Node:
    """A setting in the tree of settings: its dotted name, its type, its default and what `setting` said of it."""

    name: str
    annotation: Any
    default: Any = REQUIRED
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def registry(self) -> Registry | None:
        return self.metadata.get("registry")

    @property
    def selector(self) -> str:
        return self.metadata["selector"]

    @property
    def is_section(self) -> bool:
        """Whether the setting is a dict whose keys are settings themselves."""
        return self.registry is not None or dataclasses.is_dataclass(strip_none(self.annotation))

    def children(self, value: Any = None) -> dict[str, Node]:
        """The settings of a section, by key. For a component they depend on the type that `value` selects; without
        one, its selector and what its builder takes is all that is known."""
        if self.registry is None:
            return self._fields_of(strip_none(self.annotation))
        children = {self.selector: Node(f"{self.name}.{self.selector}", str)}
        if isinstance(value, Mapping) and value.get(self.selector) in self.registry.names():
            children |= self._arguments_of(value[self.selector])
        if self.metadata["also"]:
            children |= self._fields_of(self.metadata["also"])
        return children

    def item(self, key: str) -> tuple[Any, Node]:
        """(key, setting) of an entry of a free-form dict, such as a resolution of `bucket_config`."""
        found = strip_none(self.annotation)
        if found is Any:
            return key, Node(f"{self.name}.{key}", Any)
        if found is not dict and typing.get_origin(found) is not dict:
            raise ValueError(f"{self.name} is {describe(self.annotation)}: it has no setting '{key}'")
        key_type, value_type = typing.get_args(found) or (str, Any)
        if key_type is int and not key.isdigit():
            raise ValueError(f"{self.name}.{key}: '{key}' is not an integer")
        return int(key) if key_type is int else key, Node(f"{self.name}.{key}", value_type)

    def _fields_of(self, settings: type) -> dict[str, Node]:
        types_of = typing.get_type_hints(settings)
        prefix = f"{self.name}." if self.name else ""
        return {
            f.name: Node(prefix + f.name, types_of[f.name], _default_of(f, types_of[f.name]), f.metadata)
            for f in dataclasses.fields(settings)
        }

    def _arguments_of(self, name: str) -> dict[str, Node]:
        component = self.registry.get(name)
        try:
            types_of = typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
        except (NameError, TypeError):  # names that only a type checker sees: then values tell the types
            types_of = {}
        return {
            key: Node(f"{self.name}.{key}", types_of.get(key, _type_of(p.default)), _optional(p.default))
            for key, p in self.registry.parameters(name).items()
        }


def _default_of(field: dataclasses.Field, annotation: Any) -> Any:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default in (REQUIRED, dataclasses.MISSING):
        return {} if dataclasses.is_dataclass(annotation) else REQUIRED
    return default


def _optional(default: Any) -> Any:
    """A component's own defaults stay with the component: only whether there is one matters."""
    return REQUIRED if default is inspect.Parameter.empty else ABSENT


def _type_of(value: Any) -> Any:
    return Any if value is None or value is inspect.Parameter.empty else type(value)


def root(settings: type) -> Node:
    """The whole config as a section of settings."""
    return Node("", settings)


def walk(node: Node, value: Any = None) -> Iterator[Node]:
    """All settings below a section that have a name of their own."""
    for key, child in node.children(value).items():
        yield child
        if child.is_section:
            yield from walk(child, value.get(key) if isinstance(value, Mapping) else None)


# ---------------------------------------------------------------------------------------------------- values


def members(annotation: Any) -> tuple:
    """The types that a value may have: those of a union, or the one."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def strip_none(annotation: Any) -> Any:
    """`X` for `X | None`."""
    rest = [m for m in members(annotation) if m is not type(None)]
    return rest[0] if len(rest) == 1 else annotation


class Mismatch(TypeError):
    """A value is not what its setting takes. keys: where in the setting; value: what is there; expected: in words."""

    def __init__(self, value: Any, annotation: Any, keys: tuple = ()):
        self.value, self.expected, self.keys = value, describe(annotation), keys
        super().__init__(f"{value!r} is not {self.expected}")

    def inside(self, key: Any) -> Mismatch:
        """The same, seen from the dict that holds the value under `key`."""
        self.keys = (key, *self.keys)
        return self


def read(text: str, annotation: Any, replaces: Any = None) -> Any:
    """The value that a command-line text means for a setting of type `annotation` (Any: of the type it replaces).

    Raises:
        Mismatch: the text is no such value.
    """
    if annotation is Any and replaces is None:
        return _guess(text)
    if annotation is Any:
        annotation = type(replaces) | None
    if text in ("none", "None"):
        return coerce(None, annotation)
    if str in members(annotation):
        return text
    choices = [m for m in members(annotation) if typing.get_origin(m) is Literal and text in typing.get_args(m)]
    if choices:
        return text
    try:
        value = literal(text)
    except ValueError:
        raise Mismatch(text, annotation) from None
    return coerce(value, annotation)


def literal(text: str) -> Any:
    """The value of a Python literal; `dict(a=1)` and true, false, none, null are literals here too.

    Raises:
        ValueError: it is none.
    """
    try:
        tree = _Literals().visit(ast.parse(text.strip(), mode="eval"))
        return ast.literal_eval(tree)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"not a value: {text}") from None


class _Literals(ast.NodeTransformer):
    """Spells in Python's literals what people write for them."""

    names: typing.ClassVar[dict[str, Any]] = {"true": True, "false": False, "none": None, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(self.names[node.id]) if node.id in self.names else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        is_dict = isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args
        if not is_dict or any(k.arg is None for k in node.keywords):
            return node
        return ast.Dict([ast.Constant(k.arg) for k in node.keywords], [k.value for k in node.keywords])


def _guess(text: str) -> Any:
    try:
        return literal(text)
    except ValueError:
        return text


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as the type that `annotation` names: an int where a float is meant, lists and tuples for each other.

    Raises:
        Mismatch: it is of another type.
    """
    if isinstance(annotation, typing.TypeVar) or annotation in (Any, inspect.Parameter.empty):
        return value
    options = members(annotation)
    if len(options) > 1:
        return _coerce_to_first(value, annotation, options)
    origin = typing.get_origin(annotation) or annotation
    if origin in (list, tuple, Sequence):
        return _coerce_sequence(value, annotation, origin)
    if origin in (dict, Mapping):
        return _coerce_dict(value, annotation)
    if origin is Literal and value in typing.get_args(annotation):
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is float and is_number and math.isfinite(value):
        return float(value)
    if annotation is int and is_number and isinstance(value, int):
        return value
    plain = str if annotation is Path else annotation
    if plain not in (int, float) and inspect.isclass(plain) and isinstance(value, plain):
        return value
    raise Mismatch(value, annotation)


def _coerce_to_first(value: Any, annotation: Any, options: Sequence) -> Any:
    mismatch = Mismatch(value, annotation)
    exact = [m for m in options if m is type(value)]  # 1 stays an int where both int and float are possible
    for option in [*exact, *options]:
        try:
            return coerce(value, option)
        except Mismatch as error:
            mismatch = error if error.keys else mismatch  # of a dict, the entry that is wrong
    raise mismatch


def _coerce_sequence(value: Any, annotation: Any, origin: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise Mismatch(value, annotation)
    build = tuple if origin is tuple else list
    item_types = typing.get_args(annotation)
    if not item_types:
        return build(value)
    if origin is not tuple or item_types[-1] is Ellipsis:
        item_types = item_types[:1] * len(value)
    if len(item_types) != len(value):
        raise Mismatch(value, annotation)
    try:
        return build(coerce(v, t) for v, t in zip(value, item_types, strict=True))
    except Mismatch:
        raise Mismatch(value, annotation) from None


def _coerce_dict(value: Any, annotation: Any) -> dict:
    if not isinstance(value, Mapping):
        raise Mismatch(value, annotation)
    key_type, value_type = typing.get_args(annotation) or (Any, Any)
    found = {}
    for key, item in value.items():
        is_digits = key_type is int and isinstance(key, str) and key.isdigit()
        try:
            found[coerce(int(key) if is_digits else key, key_type)] = coerce(item, value_type)
        except Mismatch as error:
            raise error.inside(key) from None
    return found


_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    type(None): "None",
    list: "a list",
    tuple: "a tuple",
    dict: "a dict",
    Any: "any value",
}


def describe(annotation: Any) -> str:
    """What a setting of this type is, in words."""
    options, arguments = members(annotation), typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if len(options) > 1:
        return " or ".join(describe(m) for m in options)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a tuple ({', '.join(describe(a) for a in arguments)})"
    if origin in (list, tuple, Sequence):
        return f"a list (each: {describe(arguments[0])})"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(annotation):
        return "a dict"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
