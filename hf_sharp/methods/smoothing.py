"""Randomized smoothing (of the forget loss in Fan et al., ICML 2025): the mean gradient under noise. Cost: samples.

    descend mean_k grad L(w + sigma z_k),  z_k ~ N(0, 1)

The noise comes from a private generator seeded by (seed, step, k, parameter), equal on all ranks. The authors' code
steps the optimizer inside, past gradient clipping; here clipping applies. The logged loss is that of the first sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_sharp.answers import Evaluation, Opening
from hf_sharp.methods.base import Method, at_least, steps
from hf_sharp.noise import gaussian

if TYPE_CHECKING:
    from hf_sharp.landscape import Landscape


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
        at_least(self.sigma, "sigma")
        steps(self.samples, "samples", "a number of draws")

    @property
    def cost(self) -> float:
        """One evaluation a sample."""
        return float(self.samples)

    def moved(self, landscape: Landscape) -> dict[str, float]:
        """Everything moves."""
        return dict.fromkeys(landscape.names, 1.0) if self.sigma else {}

    def start(self, landscape: Landscape) -> Opening:
        """The first draw is known before the data; it is made anew for each micro-batch."""
        return Opening(shift=lambda: gaussian(landscape, self.sigma, "0"))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The running mean over the draws."""
        first = landscape.evaluate()
        mean = first.take()
        for k in range(1, self.samples):
            with landscape.shifted(gaussian(landscape, self.sigma, str(k))):
                another = landscape.evaluate()
            mean.add_(another.take().add_(mean, -1.0), 1 / (k + 1))
        return first.with_grad(mean)
