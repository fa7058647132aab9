"""What a method is: a rule for getting a gradient; and the checks that methods share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._perturbation.part import Part
from hf_sharp._perturbation.perturbation import Perturbation


@dataclass(frozen=True)
class Method(Part):
    """A rule for getting a gradient, asked once an optimizer step.

    A subclass is a frozen dataclass of settings with a `gradient`; what it remembers from step to step is in `_state`.
    """

    ahead = False  # whether its first evaluation is not the plain gradient at the present weights
    _call: ClassVar[dict[str, Any] | None] = None  # the preset's call that made it (`preset.py`), no part of equality

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

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """How to make the first evaluation, decided before the window's data pass through the model.

        Args:
            landscape: the landscape of the step, nothing evaluated yet.

        Returns:
            The plan; the default is the present weights and all parameters.
        """
        del landscape
        return FirstPass()


def added_by(method: Method, landscape: Landscape) -> dict[str, Tensor]:
    """The parameters that a method trains beside the model's.

    Args:
        method: the method.
        landscape: the model's landscape, without data.

    Returns:
        The start values of all its parts' parameters, by name.
    """
    return {name: value for _, part in method.named_parts() for name, value in part.adds(landscape).items()}


def check_perturbation(method: Any) -> None:
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
