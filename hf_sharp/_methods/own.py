"""Methods that a user writes: what is missing in one is said before training, with what to write."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields
from functools import cached_property
from typing import Any

from hf_sharp._checks import is_number
from hf_sharp._methods.base import Method
from hf_sharp._perturbation.part import Part

FIELDS = "@dataclass(frozen=True) above the class, and its settings as fields (`rho: float = 0.05`), not in __init__"
STATE = (
    "{name} changes self.{what} while it trains, which no checkpoint holds and no failed step puts back. Write "
    "remembers = True in the class and keep it in self._state: self._state['{what}'] = self._state.get('{what}', 0) "
    "+ 1, for one. A tensor is replaced there, never changed in place."
)


def check_is_method(method: Any) -> None:
    """Check what an integration was given as its method.

    Args:
        method: that.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(method, Method):
        raise ValueError(
            f"method is a Method, such as sam(rho=0.05); got {method!r}. Call the preset, or build settings: "
            "SharpConfig(method='sam').build()."
        )
    check_class(method)


def check_class(part: Part) -> None:
    """Check that a part's class says what the library asks it for, and those of the parts inside.

    Args:
        part: the part.

    Raises:
        TypeError: naming the class, what it lacks, and what to write.
    """
    name, own = type(part).__name__, {field.name for field in fields(part)}
    unset = sorted(key for key in own if key not in vars(part) and not hasattr(type(part), key))
    if unset:
        raise TypeError(
            f"{name}.__init__ leaves {', '.join(unset)} unset. Write {FIELDS}; or call super().__init__() first in it."
        )
    hidden = sorted(key for key, value in vars(part).items() if isinstance(value, Part) and key not in own)
    if hidden:
        kind = type(vars(part)[hidden[0]]).__name__
        raise TypeError(
            f"{name} holds a {kind} in self.{hidden[0]}, which is no field, so that its checks and what it keeps "
            f"would be left out. Write {FIELDS}: `{hidden[0]}: {kind}`."
        )
    for _, inner in part._parts():
        check_class(inner)
    if isinstance(part, Method):
        _check_rule(part, name)


def _check_rule(method: Method, name: str) -> None:
    if callable(getattr(type(method), "start", None)):
        raise TypeError(f"{name}.start is never called. Its new name is `def plan_first_pass(self, landscape):`.")
    if type(method).gradient is Method.gradient:
        raise TypeError(
            f"{name} has no gradient. Write `def gradient(self, landscape):`, which returns an Evaluation, such as "
            "landscape.evaluate()."
        )
    if not is_number(method.cost) or method.cost <= 0:
        raise TypeError(
            f"{name} says no cost (it is {method.cost!r}). Write `cost = 2.0` in the class: the mean number of passes "
            "over the data that a step makes, of which plain training makes 1."
        )


@contextmanager
def settings_stay(method: Method) -> Iterator[None]:
    """While open, the method's own code runs, which must leave the settings alone.

    Args:
        method: the method.

    Yields:
        Nothing.

    Raises:
        TypeError: if it kept something in an attribute, saying where it belongs.
    """
    before = [(part, dict(vars(part))) for _, part in method.named_parts()]
    try:
        yield
    except FrozenInstanceError as error:
        what = str(error).rpartition(" ")[2].strip("'")
        raise TypeError(STATE.format(name=type(method).__name__, what=what)) from error
    for part, old in before:
        now = vars(part)
        for key in {**old, **now}:
            moved = key not in now or key not in old or now[key] is not old[key]
            if moved and not isinstance(inspect.getattr_static(type(part), key, None), cached_property):
                raise TypeError(STATE.format(name=type(part).__name__, what=key))
