"""A method in the later part of training only, plain training before. Cost: between 1 and the method's."""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._checks import check_share
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.sometimes import Sometimes, check_method


@dataclass(frozen=True)
class After(Sometimes):
    """The method from a share of training on, plain before: late start (Andriushchenko & Flammarion, 2022).

    Args:
        ratio: the share of the optimizer steps that are plain, in [0, 1].
        method: the method.

    Example:
        >>> from hf_sharp import SAM, Perturbation
        >>> After(0.5, SAM(Perturbation(rho=0.05))).cost
        1.5
    """

    ratio: float
    method: Method

    def __post_init__(self) -> None:
        check_share(self.ratio, "start", "the share of training before the method starts", zero=True)
        check_method(self.method)

    @property
    def needs(self) -> frozenset[str]:
        """When to start is a share of the length of training."""
        return frozenset({"length"})

    @property
    def cost(self) -> float:
        """The mean over the whole training."""
        return self.ratio + (1 - self.ratio) * self.method.cost

    def due(self, landscape: Landscape) -> bool:
        """From the given share of the steps on.

        Returns:
            Whether it is so late.

        Raises:
            ValueError: if the length of training is not known.
        """
        if landscape.facts.total_steps is None:
            raise ValueError(
                "A late start needs the number of training steps, unknown here: set max_steps, or total_steps= of "
                "SharpStep."
            )
        return landscape.facts.step >= self.ratio * landscape.facts.total_steps
