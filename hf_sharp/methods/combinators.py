"""Methods made of another method and a rule for when it is used; at all other steps training is plain."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_sharp.answers import Evaluation, Opening
from hf_sharp.methods.base import Method, share, steps

if TYPE_CHECKING:
    from hf_sharp.landscape import Landscape


@dataclass(frozen=True)
class Sometimes(Method):
    """A method at some steps, plain training at the others."""

    @property
    @abstractmethod
    def inner(self) -> Method:
        """The method."""

    @abstractmethod
    def due(self, landscape: Landscape) -> bool:
        """Whether the method is used at this step.

        Args:
            landscape: where this is, nothing evaluated yet.

        Returns:
            The same answer on every rank, and whenever it is asked in a step.
        """

    def start(self, landscape: Landscape) -> Opening:
        """The method's opening, or the plain one."""
        return self.inner.start(landscape) if self.due(landscape) else Opening()

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The method's gradient, or the plain one."""
        return self.inner.gradient(landscape) if self.due(landscape) else landscape.evaluate()


@dataclass(frozen=True)
class Every(Sometimes):
    """The method at every `interval`-th step only, the first included (composer's SAM: interval 10 with rho 0.5).

    Args:
        interval: used at steps that this divides.
        method: the method.

    Example:
        >>> from hf_sharp import SAM, Perturbation
        >>> Every(10, SAM(Perturbation(rho=0.5))).cost
        1.1
    """

    interval: int
    method: Method

    def __post_init__(self) -> None:
        steps(self.interval, "interval")
        _is_method(self.method)

    @property
    def inner(self) -> Method:
        """The method."""
        return self.method

    @property
    def cost(self) -> float:
        """The mean over `interval` steps."""
        return (self.method.cost + self.interval - 1) / self.interval

    def due(self, landscape: Landscape) -> bool:
        """At steps that `interval` divides."""
        return landscape.step % self.interval == 0


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
        share(self.ratio, "start", "the share of training before the method starts", zero=True)
        _is_method(self.method)

    @property
    def inner(self) -> Method:
        """The method."""
        return self.method

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
        if landscape.total_steps is None:
            raise ValueError("A late start needs the number of training steps, unknown here: set max_steps.")
        return landscape.step >= self.ratio * landscape.total_steps


@dataclass(frozen=True)
class WithProbability(Sometimes):
    """The method with a probability at each step (SS-SAM, Zhao et al. 2022: randomised SAM steps).

    Args:
        p: the probability; the draw is private to (seed, step) and equal on all ranks.
        method: the method.

    Example:
        >>> from hf_sharp import SAM, Perturbation
        >>> WithProbability(0.5, SAM(Perturbation(rho=0.05))).cost
        1.5
    """

    p: float
    method: Method

    def __post_init__(self) -> None:
        share(self.p, "p", "the probability of a step with the method", zero=True)
        _is_method(self.method)

    @property
    def inner(self) -> Method:
        """The method."""
        return self.method

    @property
    def cost(self) -> float:
        """The expected value."""
        return 1 + self.p * (self.method.cost - 1)

    def due(self, landscape: Landscape) -> bool:
        """By the step's own draw."""
        return bool(torch.rand((), generator=landscape.random("WithProbability")) < self.p)


def _is_method(method: object) -> None:
    if not isinstance(method, Method):
        raise ValueError(f"method is a Method, such as SAM(Perturbation(rho=0.05)); got {method!r}.")
