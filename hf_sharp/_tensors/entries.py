"""Work on plain tensors, entry by entry or many at a time: what `ParamVector` and the engine are written in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_sharp._tensors.shards import local

TINY = 1e-12  # the smallest norm divided by: a clamp, so that it bends nothing but the zero


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better, the precision in which norms and products are taken.

    Args:
        tensor: of any floating dtype and shape.

    Returns:
        The tensor itself, or a float32 copy of a 16-bit one.
    """
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors of one shape, so that temporaries stay small however large a tensor is.

    Args:
        *tensors: of one shape, none or all of them sharded.

    Yields:
        Flat views of the same entries of each (this rank's, where they are sharded): 65,536 on a CPU, what its cache
        holds, 16 million elsewhere; the tensors themselves where one of them is not contiguous.
    """
    tensors = tuple(local(t) for t in tensors)
    size = 2**16 if tensors[0].device.type == "cpu" else 2**24
    if all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(size) for t in tensors), strict=True)
    else:
        yield tensors


def nan_unless_finite(value: Tensor) -> Tensor:
    """A zero that spoils what it is added to where a number is not finite, without asking the device for it.

    Args:
        value: a 0-dim tensor.

    Returns:
        0 where it is finite, else NaN, so that the host's scaler sees an overflow that a division would hide.
    """
    return value - value


def alike(*lists: Sequence[Tensor]) -> bool:
    """Whether all tensors share one dtype and device, so that one foreach call is one kernel.

    Args:
        *lists: lists of tensors.

    Returns:
        True for one dtype and device, also for empty lists.
    """
    return len({(t.dtype, t.device) for tensors in lists for t in tensors}) <= 1


def move_(targets: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Add each step to its target, in place.

    Args:
        targets: the tensors that change.
        steps: of the same shapes.
    """
    targets, steps = [local(t) for t in targets], [local(s) for s in steps]
    if not targets:
        return
    if alike(targets, steps):
        torch._foreach_add_(targets, steps)
    else:
        for target, step in zip(targets, steps, strict=True):
            target.add_(step.to(target.device))


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in place.

    Args:
        targets: the tensors that change.
        sources: of the same shapes.
    """
    if targets:
        torch._foreach_copy_([local(t) for t in targets], [local(s) for s in sources])
