"""TRAM-Fisher (Sherborne et al., ICLR 2024): Fisher-metric SAM, the metric seen through noisy inputs. Cost: 3.

    F = (grad L at embedded inputs + z)^2,  z ~ N(0, sigma^2);  D = 1 / (1 + eta F);  e = rho D g / sqrt(g' D g)

The paper's algorithm takes F at noisy and g at clean inputs, three passes, while its cost table counts two; it has no
released code. The damping is that of Kim et al. (2022), with the paper's values for its Fisher-SAM baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_sharp._checks import check_at_least_zero, check_radius
from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._perturbation.noise import input_embeddings, noisy_inputs
from hf_sharp._perturbation.schedules import Schedule
from hf_sharp._tensors.vector import TINY, ParamVector, nan_unless_finite


@dataclass(frozen=True)
class TRAMFisher(Method):
    """The gradient at the worst point of a ball in the Fisher metric of noisy inputs.

    Args:
        rho: the radius in that metric, a number or a schedule.
        sigma: standard deviation of the noise on the embedded inputs.
        eta: weight of the Fisher diagonal; 0 gives SAM.

    Example:
        >>> TRAMFisher(rho=0.1).cost
        3.0
    """

    weighs = True

    rho: float | Schedule = 0.1
    sigma: float = 0.1
    eta: float = 0.1

    def __post_init__(self) -> None:
        if not callable(self.rho):
            object.__setattr__(self, "rho", check_radius(self.rho))
        check_at_least_zero(self.sigma, "sigma")
        check_at_least_zero(self.eta, "eta")

    @property
    def needs(self) -> frozenset[str]:
        """The input embedding is one of the modules; noise goes by row."""
        return frozenset({"modules", "rows"})

    @property
    def cost(self) -> float:
        """Three evaluations."""
        return 3.0

    def check(self, landscape: Landscape) -> None:
        """Refuse a model whose input embedding cannot be found."""
        input_embeddings(landscape.model)

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """All parameters, wherever the radius is not 0."""
        return dict.fromkeys(landscape.facts.names, 1.0) if callable(self.rho) or self.rho else {}

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The gradient at w + e."""
        here = landscape.evaluate()
        with noisy_inputs(landscape, self.sigma):
            noisy = landscape.evaluate()
        with landscape.shifted(self._epsilon(here.donate(), noisy.donate(), landscape)):
            return landscape.evaluate()

    def _epsilon(self, grad: ParamVector, noisy: ParamVector, landscape: Landscape) -> ParamVector:
        facts = landscape.facts

        def stretched(f: Tensor, g: Tensor) -> Tensor:
            return g / (1 + self.eta * (f / (facts.loss_scale.to(f.device) * facts.inflation)).square())

        overflow = nan_unless_finite(noisy.norm())  # an infinite F would make a finite e; the host must see it
        direction = noisy.zip_(grad, stretched)
        length = direction.dot(grad).sqrt()
        rho = check_radius(self.rho(landscape.facts)) if callable(self.rho) else self.rho
        return direction.scale_(rho / length.clamp_min(TINY) + nan_unless_finite(length) + overflow)
