"""Plain training as a method: the gradient at the present weights. Cost: 1 evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_sharp.answers import Evaluation
from hf_sharp.methods.base import Method

if TYPE_CHECKING:
    from hf_sharp.landscape import Landscape


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
