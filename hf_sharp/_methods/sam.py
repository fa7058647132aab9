"""Sharpness-aware minimisation (Foret et al., 2021): descend the gradient at the worst point nearby. Cost: 2.

    e = rho g / ||g||,  g = grad L(w);  descend grad L(w + e)

ASAM, FSAM, SAM-ON and Fisher-metric SAM are this program with another `Perturbation` (`_presets/combinations.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.ascent import Ascent
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.perturbation import Perturbation
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


@remembered
def sam(
    rho: Rho = 0.05,
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
    per_rank: bool = False,
) -> Method:
    """Sharpness-aware minimisation (Foret et al., 2021): the gradient at the worst point within rho.

    Args:
        rho: the radius; the paper's 0.05. BERT-like encoders with AdamW: 0.005 to 0.05; T5: 0.05 to 0.15.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.
        per_rank: under DDP each rank ascends by its own rows (m-sharpness), without communication.

    Returns:
        The method, of cost 2; memory: 1 copy.
    """
    return timed(SAM(Perturbation(rho=rho), fraction, per_rank), interval, start)
