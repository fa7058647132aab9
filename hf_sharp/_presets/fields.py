"""The fields of `SharpConfig`: one for each option of any preset, with a help text made of the presets' docstrings.

Editors and type checkers read `fields.pyi` beside this file, which `make generated` writes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hf_sharp._methods.preset import BASIC, kinds_of
from hf_sharp._perturbation import schedules
from hf_sharp._presets.texts import defaults_of, options_told

MethodName = str  # to a type checker the names that there are
SCHEDULES: dict[str, Callable[[float, float], schedules.Schedule]] = {
    "constant": lambda rho, end: schedules.Constant(rho),
    "linear": schedules.Linear,
    "cosine": schedules.Cosine,
    "follows_lr": schedules.FollowsLearningRate,
    "zero_during_warmup": lambda rho, end: schedules.ZeroDuringWarmup(rho),
}
SCHEDULE_OPTIONS = ("rho_schedule", "rho_end")
MANY = 6  # methods


def schedule_settings(rho: Any) -> dict[str, Any]:
    """A radius as flat settings.

    Args:
        rho: a number or a schedule.

    Returns:
        `rho`, and beside it `rho_schedule` and `rho_end` where it is a schedule that has a name.
    """
    match rho:
        case schedules.Constant(radius):
            return {"rho": radius, "rho_schedule": "constant"}
        case schedules.Linear(first, last, None):
            return {"rho": first, "rho_schedule": "linear", "rho_end": last}
        case schedules.Cosine(first, last, None):
            return {"rho": first, "rho_schedule": "cosine", "rho_end": last}
        case schedules.FollowsLearningRate(highest, lowest):
            return {"rho": highest, "rho_schedule": "follows_lr", "rho_end": lowest}
        case schedules.ZeroDuringWarmup(radius, None):
            return {"rho": radius, "rho_schedule": "zero_during_warmup"}
    return {"rho": rho}


class Option(NamedTuple):
    """An option of one or more methods.

    Attributes:
        kind: float, int, bool or str.
        help: what it is, and its default in each method.
    """

    kind: type
    help: str


class Options:
    """A method's name and all options there are; what is None is the default of the method's preset."""


def options_among(methods: Mapping[str, Callable[..., Any]]) -> dict[str, Option]:
    """All options of some presets, those that most have first, and the two of the radius' schedule.

    Args:
        methods: presets by name.

    Returns:
        The options by name.

    Raises:
        ValueError: if two presets have an option of the same name and different types.
    """
    takers: dict[str, dict[str, type]] = {}
    for method, preset in methods.items():
        for name, kinds in kinds_of(preset).items():
            takers.setdefault(name, {})[method] = next(kind for kind in kinds if kind in BASIC)
    for name, kinds in takers.items():
        if len(set(kinds.values())) > 1:
            said = ", ".join(f"{kind.__name__} in {method}" for method, kind in kinds.items())
            raise ValueError(f"The option {name} has different types: {said}. Give one of them another name.")
    order = sorted(takers, key=lambda name: (-len(takers[name]), name))
    found = {name: Option(next(iter(takers[name].values())), _help(name, takers[name], methods)) for name in order}
    found["rho_schedule"] = Option(str, f"Radius over time: {', '.join(SCHEDULES)}.")
    found["rho_end"] = Option(float, "Last radius of a schedule (0 where none is said).")
    return found


def _help(name: str, takers: Mapping[str, Any], methods: Mapping[str, Callable[..., Any]]) -> str:
    """What the presets say of an option, alike sayings once, each with the methods and their defaults."""
    sayings: dict[str, dict[str, str]] = {}
    for method in takers:
        told = options_told(methods[method]).get(name, "").split(";")[0].split(". ")[0].rstrip(".")
        sayings.setdefault(told, {})[method] = f"{defaults_of(methods[method])[name]}"
    return ". ".join(_said(text, defaults) for text, defaults in sayings.items()) + "."


def _said(text: str, defaults: Mapping[str, str]) -> str:
    """One saying, with its methods and their defaults; where most methods have one default, only the others' names."""
    ((common, times),) = Counter(defaults.values()).most_common(1)
    if times < MANY:
        return f"{', '.join(f'{method} ({default})' for method, default in defaults.items())}: {text}"
    others = [f"{method} {default}" for method, default in defaults.items() if default != common]
    return f"{text[:1].upper()}{text[1:]} ({', '.join([f'{common} by default', *others])})"


def declare(cls: type, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Make a class a dataclass with a field for the method's name and one for each option, again with new ones.

    Args:
        cls: the class.
        methods: presets by name.
    """
    known = options_among(methods)
    annotations: dict[str, Any] = {"method": str} | {name: option.kind | None for name, option in known.items()}
    cls.__annotations__ = annotations
    given: dict[str, Any] = {
        "method": dataclasses.field(default="sam", metadata={"help": f"Method: {', '.join(methods)}."})
    }
    for name, option in known.items():
        help_text = {"help": option.help.replace("%", "%%")}  # argparse formats it
        given[name] = dataclasses.field(default=None, kw_only=True, metadata=help_text)
    for name, value in given.items():
        setattr(cls, name, value)
    for made in ("__init__", "__repr__", "__eq__", "__match_args__"):
        if made in vars(cls):
            delattr(cls, made)
    dataclasses.dataclass(cls)
