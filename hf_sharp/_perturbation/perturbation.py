"""From an ascent gradient to the perturbation of length rho, in a ball, on a mask."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_sharp._checks import check_radius
from hf_sharp._engine.evaluation import Shift
from hf_sharp._engine.landscape import Landscape
from hf_sharp._perturbation.balls import Ball, L2Ball
from hf_sharp._perturbation.masks import Entries, Mask
from hf_sharp._perturbation.part import Part
from hf_sharp._perturbation.schedules import Constant, Schedule
from hf_sharp._tensors.shards import local
from hf_sharp._tensors.vector import TINY, ParamVector, nan_unless_finite


@dataclass(frozen=True)
class Perturbation(Part):
    """The step to the worst point nearby: e = rho M g / sqrt(g' M g), M the ball's metric, on the mask's entries.

    Args:
        rho: the radius, a number, a schedule such as `Linear`, or a function of the step's facts.
        ball: in which metric the radius is measured.
        mask: which weights may move; None for all.

    Example:
        >>> Perturbation(rho=0.05)
        Perturbation(rho=0.05, ball=L2Ball(), mask=None)
    """

    rho: float | Schedule
    ball: Ball = field(default_factory=L2Ball)
    mask: Mask | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rho, Constant):
            object.__setattr__(self, "rho", self.rho.rho)
        if not callable(self.rho) or isinstance(self.rho, type):
            object.__setattr__(self, "rho", check_radius(self.rho))
        if not isinstance(self.ball, Ball):
            raise ValueError(f"ball is a Ball, such as AdaptiveBall(eta=0.01); got {self.ball!r}.")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(f"mask is a Mask, such as NormLayers(), or None; got {self.mask!r}.")

    def radius(self, landscape: Landscape) -> float:
        """The radius at this step.

        Args:
            landscape: the step's; a schedule reads its facts.

        Returns:
            rho, or what its schedule says, which must be a radius too.
        """
        return check_radius(self.rho(landscape.facts), "what the schedule gives") if callable(self.rho) else self.rho

    def names(self, landscape: Landscape) -> list[str] | None:
        """The parameters that the ascent needs a gradient for.

        Args:
            landscape: the step's, or the model's before training; a mask reads names and modules.

        Returns:
            Their names, None for all.
        """
        return None if self.mask is None else self.mask.names(landscape)

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """The parameters that may move.

        Args:
            landscape: the model's, without data.

        Returns:
            The (mean) share of entries that move, by parameter name.
        """
        return dict.fromkeys(landscape.facts.names, 1.0) if self.mask is None else self.mask.perturbed(landscape)

    def __call__(self, grad: ParamVector, landscape: Landscape, radius: Tensor | None = None) -> Shift:
        """The perturbation of a gradient.

        Args:
            grad: the ascent gradient; changed in place if its owner has donated it, else copied. A norm that is not
                finite makes all of the perturbation NaN, so that the host's scaler sees it.
            landscape: the step's; a mask or a ball may read it.
            radius: the radius, a 0-dim tensor that the method has computed; None takes `rho`.

        Returns:
            Epsilon, None where nothing moves, and its slope.
        """
        rho, wanted = self.radius(landscape) if radius is None else radius, self.names(landscape)
        of_gradient, epsilon = grad.is_gradient, grad.own()
        if wanted is not None:
            keep = set(wanted)
            pairs = zip(landscape.facts.names, epsilon.tensors, strict=True)
            epsilon = ParamVector(t if n in keep else None for n, t in pairs)
        full, entries = None, None if self.mask is None else self.mask.entries(epsilon, landscape)
        if self.mask is not None and entries is not None:
            full = None if self.mask.renormalise else self.ball.length(epsilon, landscape)
            epsilon = _drop_(epsilon, entries, landscape)
        inside = self.ball.stretch_(epsilon, landscape)
        length = inside if full is None else full
        factor = rho / length.clamp_min(TINY) + nan_unless_finite(length)
        if entries is not None and entries.overflow is not None:
            factor = factor + entries.overflow
        return Shift(epsilon.scale_(factor), factor * inside.square() if of_gradient else None)


def _drop_(vector: ParamVector, entries: Entries, landscape: Landscape) -> ParamVector:
    kept = []
    for name, tensor in zip(landscape.facts.names, vector.tensors, strict=True):
        mask = entries.kept[name]
        if tensor is None or mask is False:
            kept.append(None)
        else:
            if mask is not True:
                local(tensor).mul_(local(mask).to(tensor.device))
            kept.append(tensor)
    return ParamVector(kept)
