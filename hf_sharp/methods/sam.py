"""Sharpness-aware minimisation (Foret et al., 2021): descend the gradient at the worst point nearby. Cost: 2.

    e = rho g / ||g||,  g = grad L(w);  descend grad L(w + e)

ASAM, FSAM, SAM-ON and Fisher-metric SAM are this program with another `Perturbation` (`hf_sharp.presets`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_sharp.answers import Evaluation, Opening
from hf_sharp.methods.base import Method
from hf_sharp.perturbation import Perturbation

if TYPE_CHECKING:
    from hf_sharp.landscape import Landscape


@dataclass(frozen=True)
class SAM(Method):
    """The gradient at the weights shifted by the perturbation.

    Args:
        perturbation: where the second evaluation is taken.

    Example:
        >>> SAM(Perturbation(rho=0.05)).cost
        2.0
    """

    perturbation: Perturbation

    def __post_init__(self) -> None:
        if not isinstance(self.perturbation, Perturbation):
            raise ValueError(f"SAM takes a Perturbation, such as Perturbation(rho=0.05); got {self.perturbation!r}.")

    @property
    def cost(self) -> float:
        """Two evaluations; an ascent for some parameters alone counts as one too, though it is cheaper."""
        return 2.0

    def start(self, landscape: Landscape) -> Opening:
        """The ascent needs the gradient only where the perturbation moves."""
        return Opening(only=self.perturbation.names(landscape))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The gradient at w + e; the ascent gradient becomes e in place and is gone before the second evaluation."""
        here = landscape.evaluate(only=landscape.opening.only)
        with landscape.shifted(self.perturbation(here.take(), landscape)):
            return landscape.evaluate()
