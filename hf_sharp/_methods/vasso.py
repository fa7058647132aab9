"""VaSSO (Li & Giannakis, NeurIPS 2023): ascend along a running mean of gradients, less noisy than one. Cost: 2.

d <- (1 - theta) d + theta g  (first step: d = g);  e = rho d / ||d||;  descend grad L(w + e)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_sharp._checks import check_share
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.ascent import Ascent
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.kept import LIKE_WEIGHTS
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._tensors.vector import ParamVector


@dataclass(frozen=True)
class VaSSO(Ascent):
    """SAM whose ascent direction is suppressed in variance by averaging over steps.

    Args:
        perturbation: where the second evaluation is taken.
        fraction: the share of the window that the ascent gradient is taken on.
        per_rank: refused, since the mean would differ from rank to rank.
        theta: weight of the present gradient, in (0, 1]; 1 gives SAM. The authors' code has 0.9.

    Example:
        >>> from hf_sharp import Perturbation
        >>> VaSSO(Perturbation(rho=0.05), theta=0.9).cost
        2.0
    """

    remembers: ClassVar = {"direction": LIKE_WEIGHTS}

    theta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.theta, "theta", "the weight of the present gradient")

    def direction(self, gradient: ParamVector, landscape: Landscape) -> ParamVector:
        """The running mean, kept without the loss scale."""
        gradient, old = gradient.scale_(1 / landscape.facts.loss_scale), self._state.get("direction")
        mean = (
            gradient if old is None else gradient.scale_(self.theta).add_(landscape.facts.vector(old), 1 - self.theta)
        )
        mean.donated = False  # it is kept: the perturbation takes a copy
        self._state["direction"] = landscape.facts.named(mean)
        return mean


@remembered
def vasso(rho: Rho = 0.05, theta: float = 0.9, fraction: float = 1.0, interval: int = 1, start: float = 0.0) -> Method:
    """VaSSO (Li & Giannakis, 2023): SAM whose ascent follows a running mean of gradients.

    Args:
        rho: the radius; 0.2 on CIFAR-100 in the authors' code.
        theta: weight of the present gradient in (0, 1]; 1 gives SAM.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 3 copies.
    """
    return timed(VaSSO(Perturbation(rho), fraction, theta=theta), interval, start)
