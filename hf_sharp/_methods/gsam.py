"""Surrogate-gap guided SAM (Zhuang et al., 2022): descend the perturbed loss without letting the gap grow. Cost: 2.

    gs = grad L(w + e),  u = gs / ||gs||;  descend gs - alpha (g - (g.u) u)

The official ViT runs use rho 0.6 falling to 0.1 with the learning rate, alpha 0.6 and clip 1.0 on the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._checks import check_at_least_zero
from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method, check_perturbation
from hf_sharp._perturbation.perturbation import Perturbation


@dataclass(frozen=True)
class GSAM(Method):
    """The SAM gradient, less the part of the plain gradient that would only raise the gap between the two losses.

    Args:
        perturbation: where the second evaluation is taken; its radius follows the learning rate in the paper.
        alpha: how much of that part is removed; 0 gives SAM.
        minimize_fp: True descends the perturbed loss f_p, as above. False is the official code's other form:
            g + alpha (gs - (gs.v) v) with v = g / ||g||.

    Example:
        >>> GSAM(Perturbation(rho=0.05), alpha=0.4).cost
        2.0
    """

    perturbation: Perturbation
    alpha: float = 0.4
    minimize_fp: bool = True

    def __post_init__(self) -> None:
        check_perturbation(self)
        check_at_least_zero(self.alpha, "alpha")

    @property
    def cost(self) -> float:
        """Two evaluations."""
        return 2.0

    def gradient(self, landscape: Landscape) -> Evaluation:
        """Both gradients; the orthogonal part is built in the memory of the one that is not handed over."""
        here = landscape.evaluate()
        with landscape.shifted(self.perturbation(here.grad, landscape)):
            there = landscape.evaluate()
        if self.minimize_fp:
            rest = here.donate().reject_(there.grad)
            return here.with_grad(there.donate().add_(rest, -self.alpha))
        rest = there.donate().reject_(here.grad)
        return here.with_grad(here.donate().add_(rest, self.alpha))
