"""A radius that varies: functions of the step and learning rate. A plain number is a constant schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_sharp._checks import check_count, check_radius
from hf_sharp._engine.facts import StepFacts

Schedule = Callable[[StepFacts], float]


def check_strength(value: float | Schedule, name: str) -> None:
    """Check a strength that may vary.

    Args:
        value: a number, or a function of the step's facts.
        name: what to call it in the error.
    """
    if not callable(value) or isinstance(value, type):
        check_radius(value, name)


def strength_at(value: float | Schedule, facts: StepFacts, name: str) -> float:
    """A strength that may vary, at the step.

    Args:
        value: a number, or a function of the step's facts.
        facts: of the step.
        name: what to call it in the error.

    Returns:
        The number, which must be finite and at least 0.
    """
    return check_radius(value(facts), f"what {name}'s schedule gives") if callable(value) else float(value)


def _check_length(steps: int | None) -> None:
    if steps is not None:
        check_count(steps, "steps", "a number of optimizer steps, or None,", least=0)


def _progress(facts: StepFacts, steps: int | None, who: str) -> float:
    steps = facts.total_steps if steps is None else steps
    if steps is None:
        raise ValueError(f"{who} needs the number of training steps, which is not known here: give it as `steps=`.")
    return min(facts.step / max(steps, 1), 1.0)


@dataclass(frozen=True)
class Constant:
    """The same radius at every step, where a method would otherwise have a schedule of its own.

    Args:
        rho: the radius.
    """

    rho: float

    def __post_init__(self) -> None:
        check_radius(self.rho)

    def __call__(self, facts: StepFacts) -> float:
        """The same radius at every step."""
        del facts
        return self.rho


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in a straight line over `steps` steps, then `end`.

    Args:
        start: the first radius.
        end: the last radius.
        steps: over how many optimizer steps; None takes the length of training.
    """

    start: float
    end: float
    steps: int | None = None

    def __post_init__(self) -> None:
        check_radius(self.start, "start")
        check_radius(self.end, "end")
        _check_length(self.steps)

    @property
    def needs(self) -> frozenset[str]:
        """What an integration must know, keys of `WANTED` in `refusals.py`: the length of training, unless given."""
        return frozenset({"length"} if self.steps is None else ())

    def __call__(self, facts: StepFacts) -> float:
        """The radius at the step."""
        return self.start + (self.end - self.start) * _progress(facts, self.steps, "Linear")


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine over `steps` steps, then `end`.

    Args:
        start: the first radius.
        end: the last radius.
        steps: over how many optimizer steps; None takes the length of training.
    """

    start: float
    end: float
    steps: int | None = None

    def __post_init__(self) -> None:
        check_radius(self.start, "start")
        check_radius(self.end, "end")
        _check_length(self.steps)

    @property
    def needs(self) -> frozenset[str]:
        """What an integration must know, keys of `WANTED` in `refusals.py`: the length of training, unless given."""
        return frozenset({"length"} if self.steps is None else ())

    def __call__(self, facts: StepFacts) -> float:
        """The radius at the step."""
        share = (1 + math.cos(math.pi * _progress(facts, self.steps, "Cosine"))) / 2
        return self.end + (self.start - self.end) * share


@dataclass(frozen=True)
class FollowsLearningRate:
    """In proportion to the learning rate, as in GSAM: rho_min + (rho - rho_min) lr / lr_max (Zhuang et al., 2022).

    Args:
        rho: the radius at the largest learning rate.
        rho_min: the radius at learning rate zero.
    """

    rho: float
    rho_min: float = 0.0

    def __post_init__(self) -> None:
        check_radius(self.rho)
        check_radius(self.rho_min, "rho_min")
        if self.rho_min > self.rho:
            raise ValueError(f"rho_min is the radius at learning rate zero, at most rho: {self.rho_min} > {self.rho}.")

    def __call__(self, facts: StepFacts) -> float:
        """The radius at the step's learning rate."""
        share = facts.lr / facts.lr_max if facts.lr_max else 1.0
        return self.rho_min + (self.rho - self.rho_min) * min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class ZeroDuringWarmup:
    """Zero while the learning rate warms up, then `rho` (essential for MSAM on ViT: Becker et al., 2025).

    Args:
        rho: the radius after the warm-up.
        steps: length of the warm-up in optimizer steps; None takes that of the learning-rate schedule.
    """

    rho: float
    steps: int | None = None

    def __post_init__(self) -> None:
        check_radius(self.rho)
        _check_length(self.steps)

    @property
    def needs(self) -> frozenset[str]:
        """What an integration must know (keys of `WANTED`, `refusals.py`): the length of the warm-up, unless given."""
        return frozenset({"warmup"} if self.steps is None else ())

    def __call__(self, facts: StepFacts) -> float:
        """The radius at the step; refuses when the length of the warm-up is not known."""
        steps = facts.warmup_steps if self.steps is None else self.steps
        if steps is None:
            raise ValueError(
                "ZeroDuringWarmup needs the length of the warm-up, which is not known here: give it as `steps=`."
            )
        return 0.0 if facts.step < steps else self.rho
