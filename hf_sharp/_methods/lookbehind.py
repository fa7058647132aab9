"""Lookbehind-SAM (Mordido et al., ICML 2024): climb several times, descend what was met on the way. Cost: 1 + steps.

    w'_0 = w,  w'_i = w'_{i-1} + e_i,  e_i = rho g_{i-1} / ||g_{i-1}||,  g_i = grad L(w'_i)
    w_0 = w,   w_i = w_{i-1} - lr g_i;  w <- w + alpha (w_k - w):  with alpha = 1 / k the mean of g_1, ..., g_k

The authors' inner descent has the optimizer's momentum in each of its k steps; here the optimizer gets the mean once.
Another alpha is a factor alpha k on the learning rate. Their adaptive alpha is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._checks import check_count
from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method, check_perturbation
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.perturbation import Perturbation


@dataclass(frozen=True)
class LookbehindSAM(Method):
    """The mean gradient along a path that climbs in several steps of SAM.

    Args:
        perturbation: each step of the climb, of radius rho; the last point is up to `steps` times as far.
        steps: how many; 1 gives SAM.

    Example:
        >>> LookbehindSAM(Perturbation(rho=0.05), steps=2).cost
        3.0
    """

    perturbation: Perturbation
    steps: int = 2

    def __post_init__(self) -> None:
        check_perturbation(self)
        check_count(self.steps, "steps", "a number of ascent steps")

    @property
    def cost(self) -> float:
        """One evaluation here and one after each step."""
        return 1.0 + self.steps

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The running mean over the path; each of its gradients is also the next step's direction."""
        here = landscape.evaluate()
        path = self.perturbation(here.donate(), landscape).epsilon
        with landscape.shifted(path):
            there = landscape.evaluate()
        mean = there.grad.scale(1.0) if self.steps > 1 else there.donate()
        for k in range(2, self.steps + 1):
            path.add_(self.perturbation(there.donate(), landscape).epsilon)
            with landscape.shifted(path):
                there = landscape.evaluate()
            mean.zip_(there.grad, lambda m, g, k=k: m + (g - m) / k)  # exact where gradients are equal
        return here.with_grad(mean)


@remembered
def lookbehind_sam(rho: Rho = 0.05, steps: int = 2, interval: int = 1, start: float = 0.0) -> Method:
    """Lookbehind-SAM (Mordido et al., 2024): the mean gradient along several steps of SAM's ascent.

    Args:
        rho: the radius; that of each step of the ascent. The authors' example has 0.05 on CIFAR.
        steps: ascent steps; the authors' example has 2. 1 gives SAM.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1 + steps (3); memory: 3 copies.
    """
    return timed(LookbehindSAM(Perturbation(rho), steps), interval, start)
