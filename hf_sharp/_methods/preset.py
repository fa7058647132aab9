"""What presets are made with. A preset is a function under a name of the literature that makes a method of numbers.

It stands behind the class that it makes, in the same file, or in `hf_sharp/_presets` if it puts several together. Its
signature and the Args of its docstring are the only place where an option of the command line is written.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import abc
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

from hf_sharp._checks import check_kind
from hf_sharp._methods.after import After
from hf_sharp._methods.base import Method
from hf_sharp._methods.every import Every
from hf_sharp._perturbation.schedules import Schedule

Rho = float | Schedule
BASIC = (bool, int, float, str)  # what a flat file and a command line can say
BESIDE = {type(None), abc.Callable}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
P = ParamSpec("P")
M = TypeVar("M", bound=Method)


def remembered(function: Callable[P, M]) -> Callable[P, M]:
    """A preset whose methods remember its name and all arguments of the call, those by default too.

    Args:
        function: makes a method. All its parameters have defaults, and types that a command line can give: numbers,
            texts, true or false, None beside one of these, or a schedule beside a number.

    Returns:
        The same function; each call checks its arguments' types and notes itself in the method.
    """
    kinds, signature, name = kinds_of(function), inspect.signature(function), function.__name__

    @functools.wraps(function)
    def preset(*args: P.args, **kwargs: P.kwargs) -> M:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}.") from None
        given.apply_defaults()
        for option, value in given.arguments.items():
            check_option(value, option, kinds[option])
        method = function(*args, **kwargs)
        if not isinstance(method, Method):
            raise TypeError(f"{name}() is a preset and returns a Method, such as sam(0.05); got {method!r}.")
        object.__setattr__(method, "_call", {"method": name, **given.arguments})
        return method

    return preset


def kinds_of(function: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """What each option of a preset may be.

    Args:
        function: the preset.

    Returns:
        By option a type of `BASIC`, beside it None's where it will do, and `abc.Callable` where a schedule will do.

    Raises:
        TypeError: if a parameter has no default, or a type that no command line can give.
    """
    found = {}
    for option in inspect.signature(function, eval_str=True).parameters.values():
        hint = option.annotation
        choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kinds = tuple(abc.Callable if get_origin(choice) is abc.Callable else choice for choice in choices)
        one = len({*kinds} - BESIDE) == 1 and {*kinds} - BESIDE <= set(BASIC)
        if not one or option.kind not in NAMED or option.default is option.empty:
            raise TypeError(
                f"{function.__name__} cannot be a preset: its parameter '{option}' needs a name, a default and a type "
                "that a command line can give: float, int, bool or str, with `| None` or a schedule beside it."
            )
        found[option.name] = kinds
    return found


def check_option(value: Any, name: str, kinds: tuple[type, ...]) -> None:
    """Check that an option's value is of its kind; its size is the method's to judge.

    Args:
        value: the value.
        name: the option.
        kinds: as `kinds_of` gives them.
    """
    if abc.Callable not in kinds or not callable(value) or isinstance(value, type):
        check_kind(value, name, [kind for kind in kinds if kind is not abc.Callable])


def timed(method: Method, interval: int, start: float) -> Method:
    """The method at some steps, plain training at the others.

    Args:
        method: the method.
        interval: at every so many steps only; 1 for all.
        start: the share of training that is plain before; 0 for none.

    Returns:
        The method itself where nothing is left out.
    """
    every, after = Every(interval, method), After(start, method)
    if start == 0:
        return method if interval == 1 else every
    return after if interval == 1 else After(start, every)


def scheduled(rho: Rho, make: Callable[[float], Rho]) -> Rho:
    """The schedule that a preset's method has by default, unless the user gives one.

    Args:
        rho: the user's radius.
        make: from a number to the default schedule.

    Returns:
        The schedule.
    """
    return rho if callable(rho) else make(rho)
