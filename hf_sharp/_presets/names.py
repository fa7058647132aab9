"""Which methods have a name, and how a method of one's own gets one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

from hf_sharp import _presets as presets
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import kinds_of, remembered
from hf_sharp._presets.fields import SCHEDULE_OPTIONS, Options, declare

METHODS: dict[str, Callable[..., Method]] = {  # every function that hf_sharp._presets exports, and users' own
    name: function for name, function in sorted(vars(presets).items()) if inspect.isfunction(function)
}
declare(Options, METHODS)
P = ParamSpec("P")
M = TypeVar("M", bound=Method)


def preset(function: Callable[P, M]) -> Callable[P, M]:
    """Gives a method of your own a name: `method="mine"`, the command line, YAML and a search know it from then on.

    The function makes the method of numbers, texts and booleans, each with a default; its name is the method's, and
    its parameters become options of `SharpConfig` (on a command line, if it is decorated before the line is read).

    Args:
        function: makes the method.

    Returns:
        The function. Its methods remember the call, so that trackers, checkpoints and a search know it.

    Raises:
        ValueError: if another method has the name, or another option of the same name is of another type.

    Example:
        >>> @preset  # doctest: +SKIP
        ... def head_sam(rho: float = 0.05, pattern: str = "classifier") -> Method:
        ...     return SAM(Perturbation(rho, mask=ByName(pattern)))
        >>> SharpTrainer(model, args, method={"method": "head_sam", "pattern": "head"})  # doctest: +SKIP
    """
    name, made = function.__name__, remembered(function)
    if name in METHODS and _place(METHODS[name]) != _place(function):  # the same place: a notebook's cell run again
        raise ValueError(f"There is a method '{name}' already: give the function another name.")
    declare(Options, {**METHODS, name: made})
    METHODS[name] = made
    return made


def _place(function: Callable[..., Method]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def options_of(method: str) -> tuple[str, ...]:
    """The options that a method takes.

    Args:
        method: a name in `METHODS`.

    Returns:
        The preset's keywords, and the two of the radius' schedule where there is a radius.

    Raises:
        ValueError: if there is no such method.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"There is no method '{method}'.{nearest(method, METHODS)} Known: {', '.join(METHODS)}.")
    own = tuple(kinds_of(METHODS[method]))
    return own + SCHEDULE_OPTIONS if "rho" in own else own


def nearest(name: object, known: Collection[str]) -> str:
    """The end of an error about a name that is not known.

    Args:
        name: the name that was given.
        known: those that there are.

    Returns:
        A sentence with the likely one, or nothing.
    """
    found = difflib.get_close_matches(str(name).partition("(")[0].lower(), known, n=1)
    return f" Did you mean '{found[0]}'?" if found else ""
