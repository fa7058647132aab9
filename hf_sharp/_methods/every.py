"""A method at every k-th step only. Cost: (method + k - 1) / k.

The memory of a method that has one moves only at its own steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._checks import check_count
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.sometimes import Sometimes, check_method


@dataclass(frozen=True)
class Every(Sometimes):
    """The method at every `interval`-th step only, the first included (composer's SAM: interval 10 with rho 0.5).

    Args:
        interval: used at steps that this divides.
        method: the method.

    Example:
        >>> from hf_sharp import SAM, Perturbation
        >>> Every(10, SAM(Perturbation(rho=0.5))).cost
        1.1
    """

    interval: int
    method: Method

    def __post_init__(self) -> None:
        check_count(self.interval, "interval")
        check_method(self.method)

    @property
    def cost(self) -> float:
        """The mean over `interval` steps."""
        return (self.method.cost + self.interval - 1) / self.interval

    @property
    def period(self) -> int:
        """The interval, or as many of the method's own periods."""
        return self.interval * self.method.period

    def due(self, landscape: Landscape) -> bool:
        """At steps that `interval` divides."""
        return landscape.facts.step % self.interval == 0
