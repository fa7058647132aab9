"""Moving the weights and moving them back, and what such a shift really was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_sharp._engine.rounding import on_grid
from hf_sharp._tensors.shards import local, summed
from hf_sharp._tensors.vector import TINY, ParamVector, chunks, copy_, wide


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
def displaced(weights: Sequence[nn.Parameter], pool: Pool) -> Iterator[list[Tensor]]:
    """Whatever happens to the weights inside, their values are copied back: bitwise, in the same storage.

    The copies exist before anything can move, and the `try` is open before them, so that an exception, an
    out-of-memory error or Ctrl-C at any point leaves the weights as they were.

    Args:
        weights: the parameters that may be moved.
        pool: where the copies' memory comes from.

    Yields:
        The copies.
    """
    saved: list[Tensor] = []
    try:
        saved.extend(pool.copies(weights))
        yield saved
    finally:
        if len(saved) == len(weights):
            _restore(weights, saved)
            pool.give_back(weights, saved)


@torch.no_grad()
def _restore(weights: Sequence[nn.Parameter], saved: list[Tensor]) -> None:
    try:
        copy_(weights, saved)
    except BaseException:  # Ctrl-C half way: once more, then let it through
        copy_(weights, saved)
        raise
    finally:
        torch.clear_autocast_cache()


@torch.no_grad()
def realised(
    weights: Sequence[nn.Parameter],
    saved: Sequence[Tensor],
    steps: Sequence[Tensor],
    grids: Sequence[torch.dtype | None],
) -> dict[str, Tensor]:
    """How much of the intended shift a forward sees: of 16-bit weights most of it can round away.

    Args:
        weights: the shifted weights w'.
        saved: the weights w before the shift.
        steps: the intended shift e.
        grids: the 16-bit format in which a forward sees each weight, None for all of it.

    Returns:
        `sharp_component` = <w' - w, e> / |e|^2, which should be 1, and `sharp_noise` = |w' - w - e| / |e|; 1 and 0
        for e = 0.
    """
    along, length, noise = [], [], []
    for weight, old, step, grid in zip(weights, saved, steps, grids, strict=True):
        for new, before, part in chunks(weight.detach(), old, step):
            wanted, real = wide(part), on_grid(new, grid) - on_grid(before, grid)
            along.append((weight, (real * wanted).sum()))
            length.append((weight, wanted.square().sum()))
            noise.append((weight, real.sub_(wanted).square().sum()))
    squared = summed(length)
    component, rest = summed(along) / squared, (summed(noise) / squared).sqrt()
    return {
        "sharp_component": torch.where(squared == 0, torch.ones_like(component), component),
        "sharp_noise": torch.where(squared == 0, torch.zeros_like(rest), rest),
    }


@torch.no_grad()
def seen(
    weights: Sequence[nn.Parameter],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    there: ParamVector,
    grids: Sequence[torch.dtype | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient at the shifted weights says of the shift, with e = w' - w taken tensor by tensor.

    Args:
        weights: the shifted weights w'.
        saved: the weights w before the shift.
        grads: the gradient g_s at w', for the shifted weights only.
        there: the whole gradient g_s.
        grids: the 16-bit format in which a forward sees each weight, None for all of it.

    Returns:
        cos(g_s, e), <g_s, e> and |e|^2.
    """
    along, length = [], []
    for weight, old, grad, grid in zip(weights, saved, grads, grids, strict=True):
        gradient = torch.zeros_like(old) if grad is None else grad
        for new, before, part in chunks(weight.detach(), old, gradient):
            epsilon = on_grid(new, grid) - on_grid(before, grid)
            length.append((weight, epsilon.square().sum()))
            along.append((weight, (wide(part) * epsilon).sum()))
    product, squared = summed(along), summed(length)
    return product / (squared.sqrt() * there.norm()).clamp_min(TINY), product, squared
