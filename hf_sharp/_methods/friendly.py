"""Friendly SAM (Li et al., CVPR 2024): ascend along the noise of the gradient, less its running mean. Cost: 2.

    d = g - sigma m  (first step: d = g);  m <- lam m + (1 - lam) g  (first step: m = g);  e = rho d / ||d||

This is the order of the official code; the paper writes d with the updated m. Not FSAM with a Fisher mask or metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_sharp._checks import check_at_least_zero, check_share
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.ascent import Ascent
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.kept import LIKE_WEIGHTS
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._tensors.vector import ParamVector


@dataclass(frozen=True)
class FriendlySAM(Ascent):
    """SAM whose ascent leaves out the full-batch part of the gradient, estimated by a running mean.

    Args:
        perturbation: where the second evaluation is taken.
        fraction: the share of the window that the ascent gradient is taken on.
        per_rank: refused, since the mean would differ from rank to rank.
        sigma: how much of the mean is taken away; 0 gives SAM.
        lam: how much of the old mean is kept.

    Example:
        >>> from hf_sharp import Perturbation
        >>> FriendlySAM(Perturbation(rho=0.05), sigma=1.0, lam=0.9).cost
        2.0
    """

    remembers: ClassVar = {"mean": LIKE_WEIGHTS}

    sigma: float = 1.0
    lam: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero(self.sigma, "sigma")
        check_share(self.lam, "lam", "how much of the old mean is kept", zero=True)

    def direction(self, gradient: ParamVector, landscape: Landscape) -> ParamVector:
        """G - sigma m with the old mean, which is then renewed; both without the loss scale."""
        gradient, old = gradient.scale_(1 / landscape.facts.loss_scale), self._state.get("mean")
        if old is None:
            self._state["mean"] = landscape.facts.named(gradient.scale(1.0))
            return gradient
        mean = landscape.facts.vector(old)
        self._state["mean"] = landscape.facts.named(mean.scale(self.lam).add_(gradient, 1 - self.lam))
        return gradient.add_(mean, -self.sigma)


@remembered
def friendly_sam(
    rho: Rho = 0.05,
    sigma: float = 1.0,
    lam: float = 0.9,
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
) -> Method:
    """Friendly SAM (Li et al., 2024): SAM whose ascent leaves out the running mean of the gradient.

    Args:
        rho: the radius; class default of the official code.
        sigma: how much of the mean is taken away; 0 gives SAM.
        lam: how much of the old mean a step keeps; 0.9 in the official class, 0.95 on its command line.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 3 copies.
    """
    return timed(FriendlySAM(Perturbation(rho), fraction, sigma=sigma, lam=lam), interval, start)
