"""Rows of a micro-batch: how many there are, and a part of them, for any nesting of dicts, lists and tensors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_sharp._tensors.types import Batch, is_mapping, is_sequence

SAMPLE_INDEX = "sample_index"  # the column that numbers the rows of a data set, for methods that know them again
COPIED = 4 * 2**20  # bytes of the largest tensor of a micro-batch that is copied before its first pass
WAY_OUT = (
    "Use several micro-batches (gradient_accumulation_steps), of which fraction= takes whole ones, fisher='batch', or "
    "a method that takes no part of a batch."
)


def count(batch: Batch) -> int:
    """The number of rows of a micro-batch: the first dimension that most of its tensors share.

    Tensors inside lists of a dict count only where it holds no others: such lists often have an entry a row, and its
    first dimension says something else (boxes of an image).

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.

    Returns:
        The number of rows; among sizes that are equally frequent, that of the labels, else the larger.

    Raises:
        ValueError: if there is no tensor with a dimension to count.
    """
    columns = _columns(batch) if is_mapping(batch) else []
    sizes = [t.shape[0] for t in columns if t.ndim] or [t.shape[0] for t in _tensors(batch) if t.ndim]
    if not sizes:
        raise ValueError(
            "This batch holds no tensor with rows, so no part of it can be taken; use several micro-batches."
        )
    labels = batch.get("labels") if is_mapping(batch) else None
    named = labels.shape[0] if isinstance(labels, Tensor) and labels.ndim else None
    return max(set(sizes), key=lambda size: (sizes.count(size), size == named, size))


def share(batch: Batch, fraction: float) -> tuple[int, int]:
    """How many rows a share of a micro-batch is, one at least.

    A batch of one row, such as one of texts laid end to end without padding, has no smaller part than itself. That is
    said once.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.
        fraction: the share that was asked for, in (0, 1].

    Returns:
        The number of rows to take, and the number that there are.
    """
    size = count(batch)
    taken = max(1, round(fraction * size))
    if taken == size and fraction < 1:
        _say_that_all_is_taken(fraction, size)
    return taken, size


@functools.cache
def _say_that_all_is_taken(fraction: float, size: int) -> None:
    warnings.warn(
        f"fraction={fraction:g} of a micro-batch of {size} row{'s' * (size > 1)} is all of it (texts laid end to end "
        f"without padding are one row): the ascent is a whole pass, and such a step costs 2 passes and not "
        f"{1 + fraction:g}. Use several micro-batches (gradient_accumulation_steps), of which whole ones are taken.",
        stacklevel=2,
    )


def versions(batch: Batch) -> dict[str, int]:
    """How often each tensor of a micro-batch was changed in place.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.

    Returns:
        torch's version counters by where the tensor stands, such as "pixel_values" or "images.0"; of inference
        tensors, which have none, nothing.
    """
    return {place: tensor._version for place, tensor in places(batch).items() if not tensor.is_inference()}


def places(batch: Any) -> dict[str, Tensor]:
    """The tensors of a micro-batch by where they stand.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.

    Returns:
        Tensors by a name such as "pixel_values" or "images.0".
    """
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any]] = [("", batch)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Tensor):
            found[place] = value
        elif is_mapping(value):
            waiting += [(f"{place}.{key}".lstrip("."), inner) for key, inner in value.items()]
        elif is_sequence(value):
            waiting += [(f"{place}.{index}".lstrip("."), inner) for index, inner in enumerate(value)]
    return found


def copies(batch: Any) -> dict[str, Tensor]:
    """Copies of the tensors of a micro-batch that models change in place: ids, masks and labels.

    Such tensors are small. Pixels and other floating inputs are not copied.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.

    Returns:
        Copies of the integer and boolean tensors of at most 4 MiB, by the places that `versions` gives.
    """
    return {place: tensor.clone() for place, tensor in places(batch).items() if _is_small(tensor)}


def _is_small(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.nbytes <= COPIED


def changed(batch: Any, copied: Mapping[str, Tensor], before: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a micro-batch that were changed in place.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.
        copied: what `copies` gave for it.
        before: what `versions` gave for it at that time.

    Returns:
        These tensors, by where they stand.

    Raises:
        RuntimeError: if there is no copy of one.
    """
    found = {place: tensor for place, tensor in places(batch).items() if not tensor.is_inference()}
    moved = {place: tensor for place, tensor in found.items() if before.get(place) != tensor._version}
    lost = [place for place in moved if place not in copied]
    if lost:
        raise RuntimeError(
            f"The model or the loss changes its inputs in place ({', '.join(lost)}), so a second pass would see "
            "other data than the first. Change a copy of them."
        )
    return moved


@contextmanager
def kept(
    batch: Any, copied: Mapping[str, Tensor] | None = None, before: Mapping[str, int] | None = None
) -> Generator[None]:
    """While open, a micro-batch has the values of an earlier time; afterwards those that it has now.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.
        copied: what `copies` gave for it then; None for now.
        before: what `versions` gave for it then.

    Yields:
        Nothing.
    """
    now, versions_now = copies(batch), versions(batch)
    if copied is not None and before is not None:
        set_values(changed(batch, copied, before), copied)
    yield
    set_values(changed(batch, now, versions_now), now)


@torch.no_grad()
def set_values(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Change tensors in place to other values.

    Args:
        tensors: by name.
        values: by the same names.
    """
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def part(batch: Any, rows: slice) -> Any:
    """A part of a micro-batch.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.
        rows: which rows; all of them give the batch back as it is.

    Returns:
        The same nesting; tensors and lists as long as the batch are cut (tensors as views), numbers and texts, tensors
        without dimensions and those whose first dimension is one are kept. A tensor with another number of rows, of
        which nobody can say what goes with the part (the patches of all images, for one), is a ValueError.
    """
    size = count(batch)
    if rows.indices(size) == (0, size, 1):
        return batch
    return _cut(batch, rows, size, "")


def _columns(batch: Mapping[Any, Any]) -> list[Tensor]:
    """The tensors of a dict and of dicts in it, without those in lists."""
    found = [_columns(value) if is_mapping(value) else [value] for value in batch.values()]
    return [value for values in found for value in values if isinstance(value, Tensor)]


def _tensors(batch: Batch) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values: Iterable[Any] = batch.values() if is_mapping(batch) else batch if is_sequence(batch) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _cut(batch: Batch, rows: slice, size: int, name: str) -> Batch:
    if isinstance(batch, Tensor):
        if not _fits(batch, size):
            raise ValueError(
                "A part of a micro-batch is asked for, and which rows go with it cannot be told: there are "
                f"{size}, but {name or 'one tensor'} has the shape {tuple(batch.shape)}, as when the patches of all "
                f"images lie in one tensor. {WAY_OUT}"
            )
        return batch[rows] if batch.ndim and batch.shape[0] == size else batch
    if is_mapping(batch):
        return {key: _cut(value, rows, size, f"{name}.{key}".lstrip(".")) for key, value in batch.items()}
    if not is_sequence(batch):
        return batch
    if name and len(batch) == size and _has_an_entry_a_row(batch, size):
        return batch[rows]
    if any(isinstance(value, Tensor | Mapping | list | tuple) for value in batch):
        kind: Any = type(batch)
        cut = [_cut(value, rows, size, f"{name}[{index}]") for index, value in enumerate(batch)]
        return kind(*cut) if hasattr(batch, "_fields") else kind(cut)  # a namedtuple takes them singly
    return batch[rows] if len(batch) == size else batch


def _fits(tensor: Tensor, size: int) -> bool:
    """Whether a tensor has the batch's rows, or is the same for all of them."""
    return not tensor.ndim or tensor.shape[0] in (size, 1)


def _has_an_entry_a_row(batch: Sequence[Any], size: int) -> bool:
    """Whether a list in a dict, as long as the batch, belongs to its rows (the boxes of each image) or has columns."""
    tensors = _tensors(batch)
    return not tensors or any(isinstance(v, Mapping) for v in batch) or not all(_fits(t, size) for t in tensors)
