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
from hf_sharp._methods.preset import Rho, remembered, scheduled, timed
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._perturbation.schedules import FollowsLearningRate


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


@remembered
def gsam(
    rho: Rho = 0.05,
    rho_min: float | None = None,
    alpha: float = 0.4,
    minimize_fp: bool = True,
    interval: int = 1,
    start: float = 0.0,
) -> Method:
    """Surrogate-gap guided SAM (Zhuang et al., 2022): SAM that also closes the gap between the losses there and here.

    Args:
        rho: the radius; at the largest learning rate, for it follows that. The paper's ViT from scratch: 0.6.
        rho_min: the radius at learning rate zero; a sixth of rho if None, as the paper's 0.1 is of its 0.6.
        alpha: how much of the orthogonal part is removed; 0 gives SAM. The paper's ViT: 0.6.
        minimize_fp: True descends the perturbed loss, as in the paper; False is the official code's other form.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 2 copies.

    Raises:
        ValueError: if `rho_min` is given beside a schedule.
    """
    if callable(rho) and rho_min is not None:
        raise ValueError(
            "rho_min belongs to the schedule that gsam has by itself, and rho is another schedule. Leave rho_min out, "
            "or give rho as a number."
        )
    schedule = scheduled(rho, lambda radius: FollowsLearningRate(radius, radius / 6 if rho_min is None else rho_min))
    return timed(GSAM(Perturbation(schedule), alpha, minimize_fp), interval, start)
