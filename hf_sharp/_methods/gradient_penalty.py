"""Gradient-norm penalty (Zhao et al., ICML 2022; GP in Fan et al., ICML 2025), by a difference of gradients. Cost: 2.

    grad (L + lam ||grad L||) = g + lam H g / ||g|| ~ g + (lam / r) (grad L(w + r g / ||g||) - g)

No double backward, so fused attention and quantised bases work. lam = r is SAM of radius r. The released unlearning
code adds the norm as a Python number, a penalty without any gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._checks import check_at_least_zero, check_positive
from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import remembered, timed
from hf_sharp._perturbation.perturbation import Perturbation


@dataclass(frozen=True)
class GradientPenalty(Method):
    """The gradient of the loss plus `lam` times the norm of its gradient.

    Args:
        lam: weight of the penalty; 0 gives plain training.
        r: length of the difference. Small enough for the curvature, large enough for the precision: in bf16 autocast
            not below 0.05, in float32 not below 1e-3.

    Example:
        >>> GradientPenalty(lam=0.04, r=0.05).cost
        2.0
    """

    lam: float = 0.04
    r: float = 0.05

    def __post_init__(self) -> None:
        check_at_least_zero(self.lam, "lam")
        check_positive(self.r, "r")

    @property
    def cost(self) -> float:
        """Two evaluations."""
        return 2.0

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """All parameters, along the gradient by r."""
        return dict.fromkeys(landscape.facts.names, 1.0)

    def gradient(self, landscape: Landscape) -> Evaluation:
        """(1 - lam/r) g + (lam/r) gs, in the memory of g."""
        here, share = landscape.evaluate(), self.lam / self.r
        with landscape.shifted(Perturbation(self.r)(here.grad, landscape)):
            there = landscape.evaluate()
        return here.with_grad(here.donate().scale_(1 - share).add_(there.donate(), share))


@remembered
def gradient_penalty(lam: float = 0.04, r: float = 0.05, interval: int = 1, start: float = 0.0) -> Method:
    """Gradient-norm penalty (Zhao et al., 2022): the loss plus lam times its gradient's norm, by a difference.

    Args:
        lam: weight of the penalty; lam = r is SAM of radius r.
        r: length of the difference.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 2 copies.
    """
    return timed(GradientPenalty(lam, r), interval, start)
