"""A method at randomly chosen steps, plain training at the others (SS-SAM). Cost: 1 + p (method - 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_sharp._checks import check_share
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.sometimes import Sometimes, check_method


@dataclass(frozen=True)
class WithProbability(Sometimes):
    """The method with a probability at each step (SS-SAM, Zhao et al. 2022: randomised SAM steps).

    Args:
        p: the probability; the draw is private to (seed, step) and equal on all ranks.
        method: the method.

    Example:
        >>> from hf_sharp import SAM, Perturbation
        >>> WithProbability(0.5, SAM(Perturbation(rho=0.05))).cost
        1.5
    """

    p: float
    method: Method

    def __post_init__(self) -> None:
        check_share(self.p, "p", "the probability of a step with the method", zero=True)
        check_method(self.method)

    @property
    def cost(self) -> float:
        """The expected value."""
        return 1 + self.p * (self.method.cost - 1)

    def due(self, landscape: Landscape) -> bool:
        """By the step's own draw."""
        return bool(torch.rand((), generator=landscape.facts.random("WithProbability")) < self.p)
