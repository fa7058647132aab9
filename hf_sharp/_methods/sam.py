"""Sharpness-aware minimisation (Foret et al., 2021): descend the gradient at the worst point nearby. Cost: 2.

    e = rho g / ||g||,  g = grad L(w);  descend grad L(w + e)

ASAM, FSAM, SAM-ON and Fisher-metric SAM are this program with another `Perturbation` (`hf_sharp._presets`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.ascent import Ascent
from hf_sharp._tensors.vector import ParamVector


@dataclass(frozen=True)
class SAM(Ascent):
    """The gradient at the weights shifted along the gradient itself.

    Args:
        perturbation: where the second evaluation is taken.
        fraction: the share of the window that the ascent gradient is taken on.
        per_rank: each rank ascends by the gradient of its own rows (m-sharpness), without communication.

    Example:
        >>> from hf_sharp import Perturbation
        >>> SAM(Perturbation(rho=0.05)).cost
        2.0
    """

    def direction(self, gradient: ParamVector, landscape: Landscape) -> ParamVector:
        """The gradient."""
        del landscape
        return gradient
