"""LookSAM (Liu et al., 2022): SAM every few steps, and what it adds to the gradient reused between. Cost: 1 + 1/every.

    step % every == 0:  gs = grad L(w + e);  o = (gs - (gs.v) v) / ||...||,  v = g / ||g||;  descend gs
    else:               descend g + alpha ||g|| o

All norms are over the whole vector, as in the paper; several public versions take them tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_sharp._checks import check_at_least_zero, check_count
from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method, check_perturbation
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.kept import LIKE_WEIGHTS
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._tensors.vector import TINY


@dataclass(frozen=True)
class LookSAM(Method):
    """SAM every few steps; between them, the part of the SAM gradient that the plain one lacks is reused.

    Args:
        perturbation: where the second evaluation of a SAM step is taken.
        every: SAM at steps that this divides.
        alpha: weight of the reused part.

    Example:
        >>> LookSAM(Perturbation(rho=0.05), every=5).cost
        1.2
    """

    remembers: ClassVar = {"orthogonal": LIKE_WEIGHTS}

    perturbation: Perturbation
    every: int = 5
    alpha: float = 0.7

    def __post_init__(self) -> None:
        check_perturbation(self)
        check_count(self.every, "every")
        check_at_least_zero(self.alpha, "alpha")

    @property
    def cost(self) -> float:
        """One evaluation, and a second every so many steps."""
        return 1.0 + 1 / self.every

    @property
    def period(self) -> int:
        """From one second evaluation to the next."""
        return self.every

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The SAM gradient, or the plain one with the remembered part stretched to its length."""
        here = landscape.evaluate()
        orthogonal, last = self._state.get("orthogonal"), (landscape.facts.step + 1) % self.every == 0
        if orthogonal is None or landscape.facts.step % self.every == 0:
            with landscape.shifted(self.perturbation(here.grad, landscape)):
                there = landscape.evaluate()
            rest = here.donate().rest_of_(there.grad)
            if not last:
                self._state["orthogonal"] = landscape.facts.named(rest.scale_(1 / rest.norm().clamp_min(TINY)))
            return here.with_grad(there.donate())
        if last:
            del self._state["orthogonal"]  # the next step draws another; until then its memory is free
        length = here.grad.norm()
        return here.with_grad(here.donate().add_(landscape.facts.vector(orthogonal), self.alpha * length))


@remembered
def looksam(rho: Rho = 0.05, every: int = 5, alpha: float = 0.7, interval: int = 1, start: float = 0.0) -> Method:
    """LookSAM (Liu et al., 2022): SAM every few steps, what it adds to the gradient reused between.

    Args:
        rho: the radius.
        every: SAM at steps that this divides; the paper's 5.
        alpha: weight of the reused part; the paper's 0.7 (another group found 0.1 best).
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1 + 1/every; memory: 2 copies at SAM steps, 1 between.
    """
    return timed(LookSAM(Perturbation(rho), every, alpha), interval, start)
