"""The role of methods made of another method and a rule for when it is used; at all other steps training is plain."""

from __future__ import annotations

from abc import abstractmethod

from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method


class Sometimes(Method):
    """A method at some steps, plain training at the others; subclasses are dataclasses with a field `method`."""

    method: Method

    @property
    def period(self) -> int:
        """That of the method inside; `Every` multiplies it by its interval."""
        return self.method.period

    @abstractmethod
    def due(self, landscape: Landscape) -> bool:
        """Whether the method is used at this step.

        Args:
            landscape: the step's, nothing evaluated yet.

        Returns:
            The same answer on every rank, and whenever it is asked in a step.
        """

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The method's own plan at its steps, the plain one at others."""
        return self.method.plan_first_pass(landscape) if self.due(landscape) else FirstPass()

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The method's gradient, or the plain one."""
        return self.method.gradient(landscape) if self.due(landscape) else landscape.evaluate()


def check_method(method: object) -> None:
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
