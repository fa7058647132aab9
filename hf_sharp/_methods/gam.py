"""GAM (Zhang et al., CVPR 2023): penalise the largest gradient norm nearby, first-order flatness. Cost: 4.

    h = grad ||grad L(w)||,  w' = w + rho h / ||h||;  descend grad L(w) + alpha rho grad ||grad L(w')||

Both gradients of norms are differences of length r along the normalised gradient. The authors' code descends another
combination, with coefficients that the paper does not have (its `grad_beta_0` is never read), so alpha is not
settled; its rho' = 0.2 and rho = 0.02 are `rho` and `r` here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._checks import check_at_least_zero, check_positive
from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method, check_perturbation
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._tensors.vector import TINY


@dataclass(frozen=True)
class GAM(Method):
    """The gradient plus that of the gradient norm at the point nearby where the norm is largest.

    Args:
        perturbation: the neighbourhood, of radius rho.
        r: length of the differences.
        alpha: weight of the flatness; 0 gives plain training.

    Example:
        >>> GAM(Perturbation(rho=0.2)).cost
        4.0
    """

    perturbation: Perturbation
    r: float = 0.02
    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_perturbation(self)
        check_positive(self.r, "r")
        check_at_least_zero(self.alpha, "alpha")

    @property
    def cost(self) -> float:
        """Four evaluations."""
        return 4.0

    def gradient(self, landscape: Landscape) -> Evaluation:
        """G + (alpha rho / r) (grad L(w' + r g'/||g'||) - g'), g' = grad L(w')."""
        here, little = landscape.evaluate(), Perturbation(self.r)
        with landscape.shifted(little(here.grad, landscape)):
            probe = landscape.evaluate()
        rho = self.perturbation.radius(landscape)
        ascent = self.perturbation(probe.donate().add_(here.grad, -1.0), landscape).epsilon
        with landscape.shifted(ascent):
            worst = landscape.evaluate()
        nudge = self.r / worst.grad.norm().clamp_min(TINY)
        with landscape.shifted(ascent.add_(worst.grad, nudge).donate()):
            beyond = landscape.evaluate()
        rise = beyond.donate().add_(worst.donate(), -1.0)
        return here.with_grad(here.donate().add_(rise, self.alpha * rho / self.r))


@remembered
def gam(rho: Rho = 0.2, r: float = 0.02, alpha: float = 0.1, interval: int = 1, start: float = 0.0) -> Method:
    """GAM (Zhang et al., 2023): a penalty on the largest gradient norm nearby.

    Args:
        rho: the radius; that of the neighbourhood, 0.2 in the authors' CIFAR runs (`grad_norm_rho`).
        r: length of the differences; 0.02 there (`grad_rho`).
        alpha: weight of the flatness; not settled between paper and code, this value is our choice.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 4; memory: 3 copies.
    """
    return timed(GAM(Perturbation(rho), r, alpha), interval, start)
