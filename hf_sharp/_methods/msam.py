"""Momentum-SAM (Becker et al., 2025): look ahead along the optimizer's momentum instead of a gradient. Cost: 1.

    e = -rho m / ||m||,  m the momentum of SGD or exp_avg of Adam over all groups;  descend grad L(w + e)

Mind the minus sign: the gradient is taken further along the coming update. Weight decay acts at the unshifted weights
(the authors' SGD code decays the shifted ones, a difference of lr x decay x rho). The weights are shifted within the
passes only, so evaluation, saving and generation need no care. The logged loss is that of the shifted weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method, check_perturbation
from hf_sharp._methods.preset import Rho, remembered, scheduled, timed
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._perturbation.schedules import ZeroDuringWarmup
from hf_sharp._tensors.vector import ParamVector


@dataclass(frozen=True)
class MSAM(Method):
    """The gradient at the weights shifted against the momentum; the present weights while there is none.

    Args:
        perturbation: its radius; zero during the warm-up of the learning rate (`ZeroDuringWarmup`) in the paper.

    Example:
        >>> MSAM(Perturbation(rho=1.0)).cost
        1.0
    """

    ahead = True

    perturbation: Perturbation

    def __post_init__(self) -> None:
        check_perturbation(self)

    @property
    def cost(self) -> float:
        """One evaluation."""
        return 1.0

    def check(self, landscape: Landscape) -> None:
        """Refuse an optimizer whose momentum cannot be read."""
        landscape.momentum()

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The shift is known before the data; it is made anew for each micro-batch, so that no copy of it is kept."""
        if landscape.momentum() is None or self.perturbation.radius(landscape) == 0:
            return FirstPass()
        return FirstPass(shift=lambda: self._ahead(landscape))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The first evaluation, which `plan_first_pass` has shifted."""
        return landscape.evaluate()

    def _ahead(self, landscape: Landscape) -> ParamVector:
        momentum = landscape.momentum()
        assert momentum is not None
        return self.perturbation(momentum, landscape).epsilon.scale_(-1.0)


@remembered
def msam(rho: Rho = 1.0, interval: int = 1, start: float = 0.0) -> Method:
    """Momentum-SAM (Becker et al., 2025): the gradient further along the momentum; no second pass.

    Args:
        rho: the radius; zero while the learning rate warms up. 1 is the authors' AdamW class default, 0.3 that for
            SGD; their runs use about fifteen times SAM's.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: 1 copy.
    """
    return timed(MSAM(Perturbation(scheduled(rho, ZeroDuringWarmup))), interval, start)
