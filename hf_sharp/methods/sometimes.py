"""The role of methods made of another method and a rule for when it is used; at all other steps training is plain."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from hf_sharp.answers import Evaluation, Opening
from hf_sharp.methods.base import Method

if TYPE_CHECKING:
    from hf_sharp.landscape import Landscape


class Sometimes(Method):
    """A method at some steps, plain training at the others; subclasses are dataclasses with a field `method`."""

    method: Method

    @property
    def period(self) -> int:
        """The method's own."""
        return self.method.period

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
        return self.method.start(landscape) if self.due(landscape) else Opening()

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The method's gradient, or the plain one."""
        return self.method.gradient(landscape) if self.due(landscape) else landscape.evaluate()


def is_method(method: object) -> None:
    """Check what a combinator was given.

    Args:
        method: what should be a `Method`.

    Raises:
        ValueError: if it is none, or cannot be left out.
    """
    if not isinstance(method, Method):
        raise ValueError(f"method is a Method, such as SAM(Perturbation(rho=0.05)); got {method!r}.")
    if "terms" in method.needs:
        raise ValueError(f"{method!r} has named terms at every step: put the combinator inside, around a term.")
