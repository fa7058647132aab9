"""Work on plain tensors, entry by entry or many at a time: what `ParamVector` and the engine are written in."""

# torch types `_foreach_*` and calls them private, though its own optimizers stand on them; `linalg` it does not type.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

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
        yield from zip(*(torch.split(t.view(-1), size) for t in tensors), strict=True)
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


def add_each_(targets: list[Tensor], steps: list[Tensor], alpha: float = 1.0) -> None:
    """Add `alpha` times each step to its target, in one kernel.

    Args:
        targets: the tensors that change, one at least; `alike`.
        steps: of the same shapes.
        alpha: the factor.
    """
    torch._foreach_add_(targets, steps, alpha=alpha)


def scale_each_(targets: list[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors by one number, in one kernel.

    Args:
        targets: the tensors that change, one at least; `alike`.
        factor: a number, or a 0-dim tensor like them.
    """
    torch._foreach_mul_(targets, factor)


def norm_of(tensor: Tensor) -> Tensor:
    """The L2 norm of a tensor.

    Args:
        tensor: not sharded.

    Returns:
        A 0-dim tensor of its dtype.
    """
    return cast("Tensor", torch.linalg.vector_norm(tensor))


def norms_of_each(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The L2 norm of each tensor, in one kernel.

    Args:
        tensors: one at least; `alike`.
        dtype: in which to add up, None for their own.

    Returns:
        0-dim tensors.
    """
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))


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
        add_each_(targets, steps)
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
