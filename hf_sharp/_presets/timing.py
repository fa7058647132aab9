"""What all presets share: a radius may be a schedule, and a method may be used at some steps only."""

from __future__ import annotations

from collections.abc import Callable

from hf_sharp._methods import After, Every, Method
from hf_sharp._perturbation.schedules import Schedule

Rho = float | Schedule


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
