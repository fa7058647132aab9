"""A named term of the loss travels with its batch: what it is called, and the part of the batch that is its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_sharp._tensors.types import Batch, is_mapping


class TermBatch(dict[str, Any]):
    """A batch that knows which term of the loss is meant.

    Args:
        columns: the batch.
        term: the term's name.
    """

    def __init__(self, columns: Mapping[str, Any], term: str | None = None) -> None:
        super().__init__(columns)
        self.term = term


def term_of(batch: Batch) -> str | None:
    """The term of the loss that a batch is for.

    Args:
        batch: a micro-batch.

    Returns:
        The term's name; None for a batch that is no part of another.
    """
    return batch.term if isinstance(batch, TermBatch) else None


def like(part: Batch, batch: Batch) -> Batch:
    """What was made of a batch, for the same term.

    Args:
        part: rows of the batch, or the batch on its device.
        batch: the batch.

    Returns:
        The part, which knows the term if the batch does.
    """
    term = term_of(batch)
    return part if term is None or not is_mapping(part) else TermBatch(part, term)


def part_of(batch: Batch, term: str) -> Batch:
    """A term's part of a batch.

    Args:
        batch: a dict of batches.
        term: the term's name.

    Returns:
        The batch under that name.

    Raises:
        ValueError: if there is none.
    """
    if not is_mapping(batch) or term not in batch:
        keys = ", ".join(map(str, batch)) if is_mapping(batch) else type(batch).__name__
        raise ValueError(
            f"There is no term '{term}' in this batch, which has {keys}. A loss of named terms takes batches like "
            f"{{'{term}': {{...}}, ...}}, from your data collator with remove_unused_columns=False."
        )
    part = batch[term]
    return TermBatch(part, term) if is_mapping(part) else part
