"""Rows of a micro-batch: how many there are, and a part of them, for any nesting of dicts, lists and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SAMPLE_INDEX = "sample_index"  # the column that numbers the rows of a data set, for methods that know them again


def count(batch: Any) -> int:
    """The number of rows of a micro-batch: the first dimension that most of its tensors share.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.

    Returns:
        The number of rows; among sizes that are equally frequent, that of the labels, else the larger.

    Raises:
        ValueError: if there is no tensor with a dimension to count.
    """
    sizes = [t.shape[0] for t in _tensors(batch) if t.ndim]
    if not sizes:
        raise ValueError(
            "This batch holds no tensor with rows, so no part of it can be taken; use several micro-batches."
        )
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    named = labels.shape[0] if isinstance(labels, Tensor) and labels.ndim else None
    return max(set(sizes), key=lambda size: (sizes.count(size), size == named, size))


def versions(batch: Any) -> dict[str, int]:
    """How often each tensor of a micro-batch was changed in place.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.

    Returns:
        torch's version counters by where the tensor stands, such as "pixel_values" or "images.0"; of inference
        tensors, which have none, nothing.
    """
    found: dict[str, int] = {}
    waiting = [("", batch)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Tensor):
            if not value.is_inference():
                found[place] = value._version
        elif isinstance(value, Mapping | list | tuple):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{place}.{key}".lstrip("."), inner) for key, inner in pairs]
    return found


def part(batch: Any, rows: slice) -> Any:
    """A part of a micro-batch.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.
        rows: which rows.

    Returns:
        The same nesting; tensors and lists as long as the batch are cut (tensors as views), everything else is kept.
    """
    return _cut(batch, rows, count(batch))


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _cut(batch: Any, rows: slice, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, rows, size) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        if any(isinstance(value, Tensor | Mapping | list | tuple) for value in batch):
            cut = [_cut(value, rows, size) for value in batch]
            return (
                type(batch)(*cut) if hasattr(batch, "_fields") else type(batch)(cut)
            )  # a namedtuple takes them singly
        return batch[rows] if len(batch) == size else batch
    return batch
