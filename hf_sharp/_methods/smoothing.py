"""Randomized smoothing (of the forget loss in Fan et al., ICML 2025): the mean gradient under noise. Cost: samples.

    descend mean_k grad L(w + sigma z_k),  z_k ~ N(0, 1)

The noise comes from a private generator seeded by (seed, step, k, parameter), equal on all ranks. The authors' code
steps the optimizer inside, past gradient clipping; here clipping applies. The logged loss is that of the first sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._checks import check_at_least_zero, check_count
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import remembered, timed
from hf_sharp._perturbation.noise import gaussian


@dataclass(frozen=True)
class RandomizedSmoothing(Method):
    """The gradient of the loss smoothed by a Gaussian, by Monte Carlo.

    Args:
        sigma: standard deviation of the noise on every weight.
        samples: how many draws a step.

    Example:
        >>> RandomizedSmoothing(sigma=0.001, samples=3).cost
        3.0
    """

    ahead = True

    sigma: float = 0.001
    samples: int = 3

    def __post_init__(self) -> None:
        check_at_least_zero(self.sigma, "sigma")
        check_count(self.samples, "samples", "a number of draws")

    @property
    def cost(self) -> float:
        """One evaluation a sample."""
        return float(self.samples)

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """All parameters, unless `sigma` is 0."""
        return dict.fromkeys(landscape.facts.names, 1.0) if self.sigma else {}

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The first draw is known before the data; it is made anew for each micro-batch."""
        return FirstPass(shift=lambda: gaussian(landscape, self.sigma, "0"))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The running mean over the draws."""
        first = landscape.evaluate()
        mean = first.donate()
        for k in range(1, self.samples):
            with landscape.shifted(gaussian(landscape, self.sigma, str(k))):
                another = landscape.evaluate()
            mean.add_(another.donate().add_(mean, -1.0), 1 / (k + 1))
        return first.with_grad(mean)


@remembered
def randomized_smoothing(sigma: float = 0.001, samples: int = 3, interval: int = 1, start: float = 0.0) -> Method:
    """Randomized smoothing (Fan et al., 2025): the mean gradient over weights with Gaussian noise.

    Args:
        sigma: standard deviation of the noise on every weight; the authors launch with 1e-4.
        samples: draws a step; the authors' 3.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost `samples` (3); memory: 2 copies.
    """
    return timed(RandomizedSmoothing(sigma, samples), interval, start)
