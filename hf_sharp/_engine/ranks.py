"""Numbers that every rank has by itself, brought together."""

from __future__ import annotations

from torch import Tensor

from hf_sharp._engine.host import Host
from hf_sharp._tensors.vector import ParamVector


class Ranks:
    """The processes that train together. Every rank must make the same calls.

    Args:
        host: the training loop.
        count: how many processes there are; one needs no communication.
    """

    def __init__(self, host: Host, count: int) -> None:
        self._host, self._count = host, count

    def mean(self, vector: ParamVector) -> ParamVector:
        """The mean of a vector over all ranks.

        Args:
            vector: one that this rank has by itself, with tensors for the same parameters on every rank.

        Returns:
            The mean, equal on all ranks.
        """
        if self._count == 1:
            return vector
        means = iter(self._host.mean_over_ranks(vector.present()))
        return vector.map(lambda _: next(means))

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks.

        Args:
            value: the same shape on every rank.

        Returns:
            The sum, equal on all ranks.
        """
        return value if self._count == 1 else self._host.mean_over_ranks([value])[0] * self._count
