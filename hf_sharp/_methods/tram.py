"""TRAM (Sherborne et al., ICLR 2024): ASAM whose radius is how far the model's outputs have moved. Cost: 2 + 1/3.

    e = d w^2 g / ||w g||  (Eq. 7),  d = KL(p_reference || p(.|x, w));  descend grad L(w + e)

The published code leaves g out of e. d is taken in float32 or better, as a mean over the positions that the loss looks
at, over the window and all ranks; it is logged as `sharp_radius`. TRAM-Fisher is `TRAMFisher`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, stack

from hf_sharp._checks import check_at_least_zero
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._perturbation.balls import AdaptiveBall, Ball
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._perturbation.references import PreviousWeights, Reference
from hf_sharp._tensors.divergences import KINDS, kl_sum, positions


@dataclass(frozen=True)
class TRAM(Method):
    """SAM in the adaptive ball, as far as the outputs have moved from a reference's.

    Args:
        reference: what the outputs are compared with: `PreviousWeights()`, `PretrainedWeights()`, `NoisyInputs()`.
        kl: "forward" KL(reference || model) as in the paper, "reverse", or "symmetric", their mean.
        scale: times the divergence.
        max_radius: the radius is at most this; None for no limit, as in the paper.
        ball: the paper's has T = |w| everywhere; for LoRA, whose B starts as zero, AdaptiveBall(eta=0.01, on="all").

    Example:
        >>> TRAM(PreviousWeights()).cost
        2.3333333333333335
    """

    reference: Reference = field(default_factory=PreviousWeights)
    kl: str = "forward"
    scale: float = 1.0
    max_radius: float | None = None
    ball: Ball = field(default_factory=lambda: AdaptiveBall(eta=0.0, on="all"))

    def __post_init__(self) -> None:
        if not isinstance(self.reference, Reference):
            raise ValueError(f"reference is a Reference, such as PreviousWeights(); got {self.reference!r}.")
        if self.kl not in KINDS:
            raise ValueError(f"kl is one of {', '.join(KINDS)}; got {self.kl!r}.")
        check_at_least_zero(self.scale, "scale")
        check_at_least_zero(math.inf if self.max_radius is None else self.max_radius, "max_radius", infinite=True)
        Perturbation(1.0, self.ball)

    @property
    def needs(self) -> frozenset[str]:
        """The outputs, whose divergence from the reference's is the radius."""
        return frozenset({"outputs"})

    @property
    def cost(self) -> float:
        """Two evaluations and the reference's forward, which counts as a third."""
        return 2.0 + 1 / 3

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """All parameters, unless `scale` is 0."""
        return dict.fromkeys(landscape.facts.names, 1.0) if self.scale else {}

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The first evaluation's outputs serve for the divergence too, micro-batch by micro-batch."""
        return FirstPass(reduce=lambda outputs, batch: self._divergence(outputs, batch, landscape))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The gradient at w + e."""
        here = landscape.evaluate()
        divergence, count = landscape.ranks.sum(here.reduced)
        radius = (self.scale * divergence / count.clamp_min(1)).clamp(0, self.max_radius)
        with landscape.shifted(Perturbation(1.0, self.ball)(here.donate(), landscape, radius)):
            there = landscape.evaluate()
        self.reference.remember(landscape)
        return there.with_metrics(sharp_radius=radius)

    def _divergence(self, outputs: Any, batch: Any, landscape: Landscape) -> Tensor:
        other, shifted = self.reference.outputs(batch, landscape), landscape.facts.shifts_labels
        summed = kl_sum(other, outputs, batch, shifted, self.kl)
        return stack([summed, positions(batch, shifted).to(summed.device, summed.dtype)])
