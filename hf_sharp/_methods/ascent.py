"""The two-pass family: descend the gradient at one shifted point. Members differ in the direction of the ascent."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from hf_sharp._checks import check_share
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._tensors.vector import ParamVector


@dataclass(frozen=True)
class Ascent(Method):
    """e = perturbation of a direction; descend grad L(w + e).

    Args:
        perturbation: where the second evaluation is taken.
        fraction: the share of the window that the ascent gradient is taken on (Bahri et al., 2022). Below 1 a step
            costs 1 + fraction, and its logged loss is that of the shifted weights, the only one taken over the window.
        per_rank: each rank ascends by the gradient of its own rows, m-sharpness, as SAM's authors do: nothing is
            reduced during the ascent. The descent gradient is reduced as always, so that all ranks stay the same.
    """

    perturbation: Perturbation
    fraction: float = 1.0
    per_rank: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.perturbation, Perturbation):
            name = type(self).__name__
            raise ValueError(
                f"{name} takes a Perturbation, such as Perturbation(rho=0.05); got {self.perturbation!r}."
            )
        check_share(self.fraction, "fraction", "the share of the window for the ascent")
        if self.per_rank and any(part.remembers for _, part in self.named_parts()):
            raise ValueError(
                f"{type(self).__name__} keeps a memory of the ascent (a mask, a mean), which with per_rank=True would "
                "differ from rank to rank. Use a method without memory, such as SAM or ASAM."
            )

    def check(self, landscape: Landscape) -> None:
        """Refuse an ascent for each rank where no rank has a gradient by itself.

        Raises:
            ValueError: if parameters are sharded.
        """
        if self.per_rank and landscape.facts.sharded:
            raise ValueError(
                "per_rank=True ascends by each rank's own gradient, and gradients of sharded parameters (FSDP) exist "
                "only where they have been reduced over ranks. Use DDP, or per_rank=False."
            )

    @property
    def ahead(self) -> bool:
        """On a fraction the host's own pass is the shifted one."""
        return self.fraction < 1

    @property
    def apart(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """An ascent on a part of the window, or for each rank, is not reduced as the host's passes are."""
        return self.per_rank or self.fraction < 1

    @property
    def needs(self) -> frozenset[str]:
        """A part of the window is chosen before its first pass; a rank's own gradient is seen before it is reduced."""
        return frozenset(({"window"} if self.fraction < 1 else set()) | ({"ranks"} if self.per_rank else set()))

    @property
    def cost(self) -> float:
        """Two evaluations, the first on a fraction; an ascent for some parameters alone counts as one too."""
        return 1.0 + self.fraction

    @abstractmethod
    def direction(self, gradient: ParamVector, landscape: Landscape) -> ParamVector:
        """The direction of the ascent.

        Args:
            gradient: the ascent gradient, loss-scaled and donated: it may be changed in place.
            landscape: the step's, for what a direction reads beside the gradient.

        Returns:
            The vector that the perturbation follows.
        """

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The ascent needs the gradient only where it moves; on a fraction, it comes before the host's own pass."""
        names = self.perturbation.names(landscape)
        if self.fraction == 1:
            return FirstPass(only=names, synced=not self.per_rank)
        part = landscape.evaluate(self.fraction, only=names, synced=not self.per_rank)
        return FirstPass(shift=self.perturbation(self.direction(part.donate(), landscape), landscape))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The gradient at w + e; the ascent gradient becomes e in place and is gone before the second evaluation."""
        if self.fraction < 1:
            return landscape.evaluate()  # the first one, which `plan_first_pass` has shifted
        here = landscape.evaluate(only=landscape.plan.only, synced=not self.per_rank)
        with landscape.shifted(self.perturbation(self.direction(here.donate(), landscape), landscape)):
            return landscape.evaluate()
