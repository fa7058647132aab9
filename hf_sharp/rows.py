"""Rows of a micro-batch: how many there are, and a part of them, for any nesting of dicts, lists and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def count(batch: Any) -> int:
    """The number of rows of a micro-batch: the first dimension of its first tensor that has one.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.

    Returns:
        The number of rows.

    Raises:
        ValueError: if there is no tensor with a dimension to count.
    """
    sizes = _sizes(batch)
    if not sizes:
        raise ValueError(
            "This batch holds no tensor with rows, so no part of it can be taken; use several micro-batches."
        )
    return sizes[0]


def part(batch: Any, rows: slice) -> Any:
    """A part of a micro-batch.

    Args:
        batch: tensors, in any nesting of dicts, lists and tuples.
        rows: which rows.

    Returns:
        The same nesting; tensors and lists as long as the batch are cut (tensors as views), everything else is kept.
    """
    return _cut(batch, rows, count(batch))


def _sizes(batch: Any) -> list[int]:
    if isinstance(batch, Tensor):
        return [batch.shape[0]] if batch.ndim else []
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return [size for value in values for size in _sizes(value)]


def _cut(batch: Any, rows: slice, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, rows, size) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        if any(isinstance(value, Tensor | Mapping | list | tuple) for value in batch):
            return type(batch)(_cut(value, rows, size) for value in batch)
        return batch[rows] if len(batch) == size else batch
    return batch
