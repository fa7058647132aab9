"""Weights put somewhere else for a while, and put back from a copy: bitwise, in the same storage."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_sharp._engine.undo import Undo
from hf_sharp._engine.watched import SMALL
from hf_sharp._tensors.shards import local
from hf_sharp._tensors.vector import copy_


class Pool:
    """Memory for copies of CPU weights, kept from step to step.

    The C library gives large blocks back to the system, and touching them anew costs more than the copy itself (8 ms
    against 1.6 ms for 22 MB). Devices have caching allocators and need no pool.
    """

    def __init__(self) -> None:
        self._free: dict[int, Tensor] = {}

    def copies(self, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """Copies of weights, in free memory of the same parameters if there is some.

        Args:
            weights: the parameters.

        Returns:
            The copies, of this rank's parts where weights are sharded.
        """
        buffers = [self._free.pop(id(w), None) for w in weights]
        copies = [_empty(local(w), b) for w, b in zip(weights, buffers, strict=True)]
        with torch.no_grad():
            copy_(copies, weights)
        return copies

    def give_back(self, weights: Sequence[nn.Parameter], copies: Sequence[Tensor]) -> None:
        """Keep the memory of copies that are needed no more.

        Args:
            weights: the parameters.
            copies: their copies.
        """
        self._free |= {id(w): c for w, c in zip(weights, copies, strict=True) if c.device.type == "cpu"}


def _empty(weight: Tensor, buffer: Tensor | None) -> Tensor:
    if (
        buffer is None
        or buffer.shape != weight.shape
        or buffer.dtype != weight.dtype
        or buffer.device != weight.device
    ):
        return torch.empty_like(weight, requires_grad=False)
    return buffer


@contextmanager
def displaced(
    weights: Sequence[nn.Parameter], pool: Pool, undo: Undo, moved: Callable[[], None]
) -> Generator[list[Tensor]]:
    """Whatever happens to the weights inside, their values are copied back at the end.

    The copies exist before anything can move.

    Args:
        weights: the parameters that may be moved.
        pool: where the copies' memory comes from.
        undo: the step's regions, so that an exception at any point puts the weights back.
        moved: called whenever weights have been put back, so that nobody goes on with casts of others.

    Yields:
        The copies.
    """
    saved = pool.copies(weights)

    def put_back() -> None:
        with torch.no_grad():
            copy_(weights, saved)
        moved()

    with undo.region(put_back):
        yield saved
    pool.give_back(weights, saved)


def buffer_copies(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's buffers, for a pass that must not touch the buffers: a graph may have saved them.

    Args:
        model: the module.

    Returns:
        Copies by name; large integer buffers, which are tables that nobody moves, are left out.
    """
    named = model.named_buffers()
    return {n: b.detach().clone() for n, b in named if b.is_floating_point() or b.is_complex() or b.numel() <= SMALL}
