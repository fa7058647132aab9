"""Checks of arguments: one rule and one sentence for each kind of value, wherever it is given."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "None",
}


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; booleans are none.

    Args:
        value: anything.

    Returns:
        True for finite integers, floats and their kin.
    """
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def check_at_least_zero(value: Any, name: str, infinite: bool = False) -> None:
    """Check a number that must not be negative.

    Args:
        value: the number.
        name: what to call it in the error.
        infinite: whether infinity will do.

    Raises:
        ValueError: if it is not.
    """
    if infinite and value == math.inf:
        return
    if not is_number(value) or value < 0:
        raise ValueError(f"{name} is a number of at least 0; got {value!r}.")


def check_positive(value: Any, name: str) -> None:
    """Check a number that must be above zero.

    Args:
        value: the number.
        name: what to call it in the error.

    Raises:
        ValueError: if it is not.
    """
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} is a number above 0; got {value!r}.")


def check_share(value: Any, name: str, what: str, zero: bool = False, one: bool = True) -> None:
    """Check a share.

    Args:
        value: the number.
        name: what to call it in the error.
        what: what it is a share of.
        zero: whether 0 will do.
        one: whether 1 will do.

    Raises:
        ValueError: if it is not between 0 and 1.
    """
    if not is_number(value) or not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        limits = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name} is {what}, in {limits}; got {value!r}.")


def check_count(value: Any, name: str, what: str = "a number of steps", least: int = 1) -> None:
    """Check a whole number.

    Args:
        value: the number.
        name: what to call it in the error.
        what: what it counts.
        least: the smallest that will do.

    Raises:
        ValueError: if it is not a whole number, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {what} of at least {least}; got {value!r}.")


def check_choice(value: Any, name: str, choices: Collection[Any]) -> None:
    """Check one of a few values.

    Args:
        value: the value.
        name: what to call it in the error.
        choices: what will do.

    Raises:
        ValueError: if it is none of them.
    """
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise ValueError(f"{name} is one of {', '.join(map(str, choices))}; got {value!r}.")


def check_radius(value: Any, name: str = "rho") -> float:
    """Check a radius.

    Args:
        value: the number.
        name: what to call it in the error.

    Returns:
        The number as a float.

    Raises:
        ValueError: if it is negative, infinite or not a number.
    """
    if not is_number(value) or value < 0:
        raise ValueError(f"{name} is a radius, a number of at least 0 (papers use 0.005 to 2); got {value!r}.")
    return float(value)


def is_of_kind(value: Any, kind: type) -> bool:
    """Whether a value may stand where a type is asked for, as a reader of numbers would say.

    Args:
        value: anything.
        kind: a type; `float` takes every real number, infinite ones too, and no number is a boolean.

    Returns:
        True if it may.
    """
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, Integral if kind is int else Real)
    return isinstance(value, kind)


def check_kind(value: Any, name: str, kinds: Collection[type]) -> None:
    """Check that a value is a number, a text and so on, before anything is said about its size.

    Args:
        value: the value.
        name: what to call it in the error.
        kinds: the types that will do.

    Raises:
        ValueError: if it is of none of them.
    """
    if any(is_of_kind(value, kind) for kind in kinds):
        return
    said = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds)
    hint = ""
    if isinstance(value, str) and str not in kinds:
        yaml = ", and mind that YAML takes 1e-2 for text (it wants a point: 1.0e-2, or 0.01)" if float in kinds else ""
        hint = f" That is text: leave out the quotation marks{yaml}."
    raise ValueError(f"{name} is {said}; got {value!r}.{hint}")
