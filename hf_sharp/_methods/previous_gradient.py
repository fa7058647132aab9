"""SAM along the gradient of the step before (S2-SAM 2024; AsyncSAM with delay 1; DP-SAT 2023). Cost: 1.

    e_t = rho g_{t-1} / ||g_{t-1}||,  e_0 = 0;  descend g_t = grad L(w_t + e_t)

g_{t-1} is the gradient that the optimizer was given, before clipping. The logged loss is that of the shifted weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method, check_perturbation
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.kept import LIKE_WEIGHTS
from hf_sharp._perturbation.perturbation import Perturbation


@dataclass(frozen=True)
class PreviousGradientSAM(Method):
    """The gradient at the weights shifted along the last gradient: SAM at the price of plain training.

    Args:
        perturbation: of the last gradient.

    Example:
        >>> PreviousGradientSAM(Perturbation(rho=0.05)).cost
        1.0
    """

    remembers: ClassVar = {"previous": LIKE_WEIGHTS}
    ahead = True

    perturbation: Perturbation

    def __post_init__(self) -> None:
        check_perturbation(self)

    @property
    def cost(self) -> float:
        """One evaluation."""
        return 1.0

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The shift is known before the data."""
        previous = self._state.get("previous")
        if previous is None or self.perturbation.radius(landscape) == 0:
            return FirstPass()
        return FirstPass(shift=lambda: self.perturbation(landscape.facts.vector(previous), landscape))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The first evaluation, which `plan_first_pass` has shifted, remembered without the loss scale."""
        there = landscape.evaluate()
        self._state["previous"] = landscape.facts.named(there.grad.scale(1 / landscape.facts.loss_scale))
        return there


@remembered
def previous_gradient_sam(rho: Rho = 0.05, interval: int = 1, start: float = 0.0) -> Method:
    """SAM along the last step's gradient (S2-SAM, 2024; AsyncSAM, 2025; DP-SAT, 2023): no second pass.

    Args:
        rho: the radius.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: 2 copies.
    """
    return timed(PreviousGradientSAM(Perturbation(rho)), interval, start)
