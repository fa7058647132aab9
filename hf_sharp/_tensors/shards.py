"""Tensors of which every rank holds a part (FSDP2's `DTensor`): arithmetic is local, sums go over the ranks.

A `ParamVector` keeps sharded tensors as they are, so that what is sharded cannot be taken for what is whole; torch
refuses to mix the two. What works entry by entry takes `local` parts; what adds up entries ends in `summed`.
"""

# pyright: reportUnknownMemberType=false
# torch.distributed gives its collectives no types.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks.

    Args:
        tensor: any.

    Returns:
        True for a `DTensor`.
    """
    return type(tensor) not in PLAIN and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the tensor's own storage.

    Args:
        tensor: sharded or not.

    Returns:
        The part, without history; the tensor itself if it is not sharded.
    """
    if type(tensor) in PLAIN or not sharded(tensor):  # asked for every tensor, many times a step
        return tensor
    source: Any = tensor
    with torch.no_grad():
        return source.to_local()


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """A part as a tensor that is sharded like another.

    Args:
        part: this rank's entries.
        tensor: sharded or not.

    Returns:
        The sharded tensor; the part itself if the other is not sharded.
    """
    if not sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    source: Any = tensor
    return DTensor.from_local(
        part, source.device_mesh, source.placements, run_check=False, shape=source.shape, stride=source.stride()
    )


def placed(whole: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that every rank has whole, where and as another one is; no rank sends anything.

    Args:
        whole: the same on every rank, or sharded already.
        tensor: of its shape, sharded or not.

    Returns:
        On the other's device, and sharded like it.
    """
    if sharded(whole) or not sharded(tensor):
        return whole.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    target: Any = tensor
    return distribute_tensor(whole.to(tensor.device), target.device_mesh, target.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank: a collective.

    Args:
        tensor: sharded or not.

    Returns:
        The gathered tensor.
    """
    source: Any = tensor
    return source.full_tensor() if sharded(tensor) else tensor


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """State in which every tensor is whole: a collective, so that every rank must call it.

    Args:
        state: tensors, sharded or not, and other values.

    Returns:
        The same with gathered tensors.
    """
    return {key: whole(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def summed(terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over all entries of all tensors, given what this rank's parts add up to.

    Args:
        terms: pairs of a tensor, sharded or not, and the sum over this rank's part of it (any shape, the same in all
            pairs).

    Returns:
        The sum, on the device of the first term, equal on all ranks that share the shards; zero without terms.
    """
    groups: dict[Any, list[Tensor]] = {}
    for tensor, value in terms:
        groups.setdefault(_over(tensor), []).append(value)
    sums = [_reduced(total(values), over) for over, values in groups.items()]
    return total(sums)


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of 0-dim tensors that this rank knows, on the device of the first.

    Args:
        terms: tensors of one shape on any devices.

    Returns:
        Their sum, in the widest dtype among them; a 0-dim zero if there are none.
    """
    terms = list(terms)
    if not terms:
        return torch.zeros(())
    device, dtype = terms[0].device, max((t.dtype for t in terms), key=lambda d: d.itemsize)
    return torch.stack([t.to(device, dtype) for t in terms]).sum(0)


def earlier(counts: Tensor, tensors: list[Tensor]) -> Tensor:
    """How many come before this rank's parts, if the parts of each tensor are put in the order of the ranks.

    Args:
        counts: one number for each tensor, of this rank's part.
        tensors: sharded along their first dimension, or not.

    Returns:
        For each tensor what the parts of it and of the tensors before it add up to that come before this rank's.
    """
    before, every = torch.zeros_like(counts), counts.clone()
    spread = {group: [i for i, t in enumerate(tensors) if group in _over(t)] for t in tensors for group in _over(t)}
    for group, where in spread.items():
        gathered = [torch.empty_like(counts[where]) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, counts[where], group=group)
        before[where] = sum(gathered[: dist.get_rank(group)], start=torch.zeros_like(counts[where]))
        every[where] = sum(gathered, start=torch.zeros_like(counts[where]))
    return every.cumsum(0) - every + before


def shard_of(tensor: Tensor) -> str:
    """Which part of a tensor this rank has, to draw other random numbers for each part.

    Args:
        tensor: sharded or not.

    Returns:
        A text, equal on ranks that have copies of the same part; empty if the tensor is not sharded.
    """
    numbers = [dist.get_rank(group) for group in _over(tensor)]
    return "".join(f"/{number}" for number in numbers)


def _over(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which a tensor's shards are spread; those that hold copies of it are left out."""
    if not sharded(tensor):
        return ()
    source: Any = tensor
    return tuple(source.device_mesh.get_group(i) for i, kind in enumerate(source.placements) if kind.is_shard())


def _reduced(value: Tensor, over: tuple[Any, ...]) -> Tensor:
    for group in over:
        value = value.clone()
        dist.all_reduce(value, group=group)
    return value
