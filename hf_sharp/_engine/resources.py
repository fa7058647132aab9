"""What lasts from step to step: memory for copies, the list of what is out of its place, the record of state."""

from __future__ import annotations

from functools import cached_property

from hf_sharp._checks import check_choice
from hf_sharp._engine.host import Host
from hf_sharp._engine.rounding import CHOICES
from hf_sharp._engine.state import ForwardState
from hf_sharp._engine.weights import Pool

WITHOUT = ("train_dataset", "eval_dataset")  # of a trainer's attributes, those that may be long lists


class Resources:
    """What the landscapes of one training share.

    Args:
        host: the training loop.
        rounding: how shifts are added where a forward sees 16-bit weights: "stochastic" or "nearest".

    Raises:
        ValueError: if there is no such rounding.
    """

    def __init__(self, host: Host, rounding: str = "stochastic") -> None:
        check_choice(rounding, "rounding", CHOICES)
        self._host = host
        self.rounding = rounding
        self.pool = Pool()
        self.undo = host.undo

    @cached_property
    def state(self) -> ForwardState:
        """What forwards read and move beside the weights; found when the first step begins."""
        host = self._host
        return ForwardState(host.stateful(), lambda: list(host.facts().parameters.values()), WITHOUT)
