"""WSAM (Yue et al., KDD 2023): sharpness as a regulariser with a weight of its own, coupled form. Cost: 2.

    descend (1 - a) g + a gs,  a = gamma / (1 - gamma)

The authors' default is a *decoupled* form: the optimizer gets g, and w moves by -lr a (gs - g) besides. That second
part is not preconditioned; under Adam with a fine-tuning learning rate it is about 1e-5 of the first, so decoupled
WSAM is then nearly plain Adam. The coupled form here passes through the optimizer whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._checks import check_share
from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method, check_perturbation
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.perturbation import Perturbation


@dataclass(frozen=True)
class WSAM(Method):
    """The plain gradient plus a weighted step from it towards, or beyond, the SAM gradient.

    Args:
        perturbation: where the second evaluation is taken.
        gamma: weight of the sharpness in [0, 1); 0.5 gives SAM, 0 plain training, 0.9 nine times the difference.

    Example:
        >>> WSAM(Perturbation(rho=0.05), gamma=0.9).cost
        2.0
    """

    perturbation: Perturbation
    gamma: float = 0.9

    def __post_init__(self) -> None:
        check_perturbation(self)
        check_share(self.gamma, "gamma", "the weight of the sharpness", zero=True, one=False)

    @property
    def cost(self) -> float:
        """Two evaluations."""
        return 2.0

    def gradient(self, landscape: Landscape) -> Evaluation:
        """Gs + (a - 1)(gs - g), the difference built in the memory of g."""
        here = landscape.evaluate()
        with landscape.shifted(self.perturbation(here.grad, landscape)):
            there = landscape.evaluate()
        difference = here.donate().scale_(-1.0).add_(there.grad)
        return here.with_grad(there.donate().add_(difference, self.gamma / (1 - self.gamma) - 1))


@remembered
def wsam(rho: Rho = 0.05, gamma: float = 0.9, interval: int = 1, start: float = 0.0) -> Method:
    """WSAM (Yue et al., 2023), coupled form: sharpness as a regulariser with a weight of its own.

    Args:
        rho: the radius; the authors' code has 0.05.
        gamma: weight of the sharpness in [0, 1); 0.5 gives SAM.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 2 copies.
    """
    return timed(WSAM(Perturbation(rho), gamma), interval, start)
