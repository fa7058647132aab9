"""What a method is: a rule for getting a gradient."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_sharp.answers import Evaluation, Opening
from hf_sharp.part import Part

if TYPE_CHECKING:
    from hf_sharp.landscape import Landscape


@dataclass(frozen=True)
class Method(Part):
    """A rule for getting a gradient, asked once an optimizer step.

    A subclass is a frozen dataclass of settings with a `gradient`; what it remembers from step to step is in `_state`.
    """

    @property
    @abstractmethod
    def cost(self) -> float:
        """The mean number of forward-backward passes over the window a step; plain training is 1."""

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
