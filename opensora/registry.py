"""Names in a config -> components. `build` refuses settings that the component does not take."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def nearest(name: str, known) -> str:
    """A remedy for a misspelt name: ` (did you mean 'x'?)`, or the known names where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(known)})"


class Registry:
    """Components of one kind by the name that a config's `type` gives.

    A component is a class or a function that takes plain keyword arguments; its signature is the list of settings
    that a config may hold. Arguments whose names are in `supplied` come from the program, not from the config.
    """

    def __init__(self, kind: str, supplied: tuple[str, ...] = ()):
        self.kind = kind
        self.supplied = frozenset(supplied)
        self._components: dict[str, Callable] = {}

    def register(self, name: str) -> Callable:
        def add(component):
            if name in self._components:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._components[name] = component
            return component

        return add

    def names(self) -> list[str]:
        return sorted(self._components)

    def get(self, name: str) -> Callable:
        if name not in self._components:
            raise ValueError(f"unknown {self.kind} type '{name}'{nearest(str(name), self._components)}")
        return self._components[name]

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """The settings that component `name` takes, by name."""
        found = inspect.signature(self.get(name)).parameters.values()
        return {
            p.name: p
            for p in found
            if p.name not in self.supplied and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }

    def check(self, settings: Mapping[str, Any], where: str) -> None:
        """ValueError that names the first setting the component does not take, or lacks."""
        if "type" not in settings:
            raise ValueError(f"{where}.type is missing: one of {', '.join(self.names())}")
        parameters = self.parameters(settings["type"])
        for key in settings:
            if key != "type" and key not in parameters:
                raise ValueError(
                    f"{where}.{key} is not a setting of {self.kind} '{settings['type']}'{nearest(key, parameters)}"
                )
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and key not in settings:
                raise ValueError(f"{where}.{key} is required by {self.kind} '{settings['type']}'")

    def build(self, settings: Mapping[str, Any], where: str | None = None, **supplied: Any) -> Any:
        """The component that `settings['type']` names, called with the other settings and what the program supplies."""
        where = where or self.kind
        self.check(settings, where)
        arguments = {key: value for key, value in settings.items() if key != "type"}
        return self.get(settings["type"])(**arguments, **supplied)


MODELS = Registry("model")
AUTOENCODERS = Registry("autoencoder", supplied=("dtype", "device"))
TEXT_ENCODERS = Registry("text encoder", supplied=("dtype", "device"))
DATASETS = Registry("dataset")
