"""Plain training as a method: the gradient at the present weights. Cost: 1 evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import remembered


@dataclass(frozen=True)
class Plain(Method):
    """The gradient of the loss, as without this library: the baseline, bitwise the host's own training.

    Example:
        >>> Plain().cost
        1.0
    """

    @property
    def cost(self) -> float:
        """One evaluation."""
        return 1.0

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The gradient here."""
        return landscape.evaluate()


@remembered
def plain() -> Method:
    """Plain training: the gradient here.

    Returns:
        The method, of cost 1; memory: none.
    """
    return Plain()
