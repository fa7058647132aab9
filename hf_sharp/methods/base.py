"""What a method is: a rule for getting a gradient; and the checks that methods share."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_sharp.answers import Evaluation, Opening
from hf_sharp.part import Part
from hf_sharp.perturbation import Perturbation

if TYPE_CHECKING:
    from torch import Tensor

    from hf_sharp.landscape import Landscape


@dataclass(frozen=True)
class Method(Part):
    """A rule for getting a gradient, asked once an optimizer step.

    A subclass is a frozen dataclass of settings with a `gradient`; what it remembers from step to step is in `_state`.
    """

    ahead = False  # whether its first evaluation is not the plain gradient at the present weights

    @property
    @abstractmethod
    def cost(self) -> float:
        """The mean number of forward-backward passes over the window a step; plain training is 1."""

    @property
    def period(self) -> int:
        """After how many steps what it does repeats; so many are measured for a line of the logs. The default is 1."""
        return 1

    @abstractmethod
    def gradient(self, landscape: Landscape) -> Evaluation:
        """The gradient to descend.

        Args:
            landscape: the loss around the present weights, for this step's window.

        Returns:
            An evaluation whose gradient is handed to the optimizer.
        """

    def start(self, landscape: Landscape) -> Opening:
        """How to make the first evaluation, decided before the window's data pass through the model.

        Args:
            landscape: the landscape of the step, nothing evaluated yet.

        Returns:
            The opening; the default is the present weights and all parameters.
        """
        del landscape
        return Opening()


def added_by(method: Method, landscape: Landscape) -> dict[str, Tensor]:
    """The parameters that a method trains beside the model's.

    Args:
        method: the method.
        landscape: the model's landscape, without data.

    Returns:
        The start values of all its parts' parameters, by name.
    """
    return {name: value for _, part in method.walk() for name, value in part.adds(landscape).items()}


def perturbing(method: Any) -> None:
    """Check a method's `perturbation`.

    Args:
        method: the method.

    Raises:
        ValueError: if it is not a `Perturbation`.
    """
    if not isinstance(method.perturbation, Perturbation):
        raise ValueError(
            f"{type(method).__name__} takes a Perturbation, such as Perturbation(rho=0.05); "
            f"got {method.perturbation!r}."
        )


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and not math.isnan(value)


def at_least(value: Any, name: str, infinite: bool = False) -> None:
    """Check a number that must not be negative.

    Args:
        value: the number.
        name: what to call it.
        infinite: whether infinity will do.

    Raises:
        ValueError: if it is not.
    """
    if not _number(value) or value < 0 or (math.isinf(value) and not infinite):
        raise ValueError(f"{name} is a number of at least 0; got {value!r}.")


def positive(value: Any, name: str) -> None:
    """Check a number that must be above zero.

    Args:
        value: the number.
        name: what to call it.

    Raises:
        ValueError: if it is not.
    """
    if not _number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} is a number above 0; got {value!r}.")


def share(value: Any, name: str, what: str, zero: bool = False, one: bool = True) -> None:
    """Check a share.

    Args:
        value: the number.
        name: what to call it.
        what: what it is a share of.
        zero: whether 0 will do.
        one: whether 1 will do.

    Raises:
        ValueError: if it is not between 0 and 1.
    """
    if not _number(value) or not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        limits = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name} is {what}, in {limits}; got {value!r}.")


def steps(value: Any, name: str, what: str = "a number of steps") -> None:
    """Check a whole number of at least one.

    Args:
        value: the number.
        name: what to call it.
        what: what it counts.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {what} of at least 1; got {value!r}.")
