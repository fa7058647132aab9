"""Curvature regularisation (CR in Fan et al., ICML 2025), by differences of gradients. Cost: 4. Float32 only.

    L + lam ||D||,  D = grad L(w + mu v) - grad L(w),  v = g / ||g|| held constant

    its gradient is g + lam (H(w + mu v) - H(w)) n,  n = D / ||D||, each product a difference of length r along n

The released code adds ||D|| as a Python number, a penalty without any gradient.
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
class CurvatureRegularization(Method):
    """The gradient of the loss plus `lam` times how much its gradient turns along itself.

    Args:
        lam: weight of the penalty; 0 gives plain training.
        mu: how far along the gradient the turn is measured.
        r: length of the differences; in float32 errors grow below 1e-3.

    Example:
        >>> CurvatureRegularization(lam=1.0).cost
        4.0
    """

    lam: float = 1.0
    mu: float = 0.01
    r: float = 0.001

    def __post_init__(self) -> None:
        check_at_least_zero(self.lam, "lam")
        check_positive(self.mu, "mu")
        check_positive(self.r, "r")

    @property
    def cost(self) -> float:
        """Four evaluations."""
        return 4.0

    def check(self, landscape: Landscape) -> None:
        """Refuse 16-bit weights and autocast: a difference of differences is noise there.

        Raises:
            ValueError: naming what computes in 16 bits.
        """
        narrow = [name for name, p in landscape.facts.parameters.items() if p.dtype.itemsize < 4]
        if narrow or landscape.facts.autocast is not None:
            what = f"the weights ({narrow[0]}, for one)" if narrow else f"autocast to {landscape.facts.autocast}"
            raise ValueError(
                f"CurvatureRegularization takes differences of differences of gradients, which {what} in 16 bits turn "
                "into noise. Use float32 without bf16=True and fp16=True, or GradientPenalty."
            )

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """Everything moves, by mu and r."""
        return dict.fromkeys(landscape.facts.names, 1.0)

    def gradient(self, landscape: Landscape) -> Evaluation:
        """G + (lam/r) [(grad L(w + mu v + r n) - grad L(w + mu v)) - (grad L(w + r n) - g)]."""
        here = landscape.evaluate()
        step = Perturbation(self.mu)(here.grad, landscape).epsilon
        with landscape.shifted(step):
            there = landscape.evaluate()
        nudge = Perturbation(self.r)(there.grad.sub(here.grad), landscape).epsilon
        with landscape.shifted(nudge):
            here_nudged = landscape.evaluate()
        bend = there.donate().add_(here_nudged.donate()).add_(here.grad, -1.0)
        with landscape.shifted(step.add_(nudge).donate()):
            there_nudged = landscape.evaluate()
        return here.with_grad(here.donate().add_(there_nudged.donate().add_(bend, -1.0), self.lam / self.r))


@remembered
def curvature_regularization(
    lam: float = 1.0, mu: float = 0.01, r: float = 0.001, interval: int = 1, start: float = 0.0
) -> Method:
    """Curvature regularisation (Fan et al., 2025): the loss plus lam times its gradient's turn. Float32 only.

    Args:
        lam: weight of the penalty.
        mu: how far along the gradient its turn is measured; 0.01 in the authors' code.
        r: length of the differences.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 4; memory: 5 copies.
    """
    return timed(CurvatureRegularization(lam, mu, r), interval, start)
