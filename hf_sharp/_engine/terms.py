"""One named term of a window whose batches are dicts of batches, seen by the engine as a host of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._engine.host import Host


class TermHost(Host):
    """The host, with losses normalised over one term's batches; everything else is the host's own.

    Args:
        host: the training loop.
        batches: the term's part of every micro-batch of the window.
        term: its name, which the host is told while the term's batches are passed through.
    """

    def __init__(self, host: Host, batches: Sequence[Any], term: str) -> None:
        self._host = host
        self._batches = list(batches)
        self.term = term

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def backward(
        self, batch: Any, only: Sequence[nn.Parameter] | None, hook: Callable[[Any, Any], Any] | None = None
    ) -> Tensor:
        """The host's, normalised over this term's window."""
        with self._named(), self._host.window(self._batches):
            return self._host.backward(batch, only, hook)

    def forward(self, batch: Any) -> Any:
        """The host's."""
        with self._named():
            return self._host.forward(batch)

    def again(self, batch: Any, weights: Mapping[str, Tensor]) -> Any:
        """The host's."""
        with self._named():
            return self._host.again(batch, weights)

    def row_backward(self, row: Any) -> None:
        """The host's."""
        with self._named():
            self._host.row_backward(row)

    def part(self, batch: Any, wanted: slice) -> Any:
        """The host's."""
        return self._host.part(batch, wanted)

    @contextmanager
    def window(self, batches: Sequence[Any]) -> Iterator[None]:
        """Another window for this term."""
        before, self._batches = self._batches, list(batches)
        try:
            yield
        finally:
            self._batches = before

    def unsynced(self) -> AbstractContextManager[Any]:
        """The host's."""
        return self._host.unsynced()

    @property
    def sharded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The host's."""
        return self._host.sharded

    def synced(self) -> AbstractContextManager[Any]:
        """The host's."""
        return self._host.synced()

    def reshard(self) -> None:
        """The host's."""
        self._host.reshard()

    def seen_in(self, parameter: nn.Parameter) -> torch.dtype | None:
        """The host's."""
        return self._host.seen_in(parameter)

    def records_kept(self) -> AbstractContextManager[None]:
        """The host's."""
        return self._host.records_kept()

    def refuse_subsets(self, reason: str) -> None:
        """The host's."""
        self._host.refuse_subsets(reason)

    def momentum(self) -> dict[str, Tensor] | None:
        """The host's."""
        return self._host.momentum()

    def mean_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """The host's."""
        return self._host.mean_over_ranks(tensors)

    @contextmanager
    def _named(self) -> Iterator[None]:
        before, self._host.term = self._host.term, self.term
        try:
            yield
        finally:
            self._host.term = before


def part_of(batch: Any, term: str) -> Any:
    """A term's part of a batch.

    Args:
        batch: a dict of batches.
        term: the term's name.

    Returns:
        The batch under that name.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(batch, Mapping) or term not in batch:
        keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"There is no term '{term}' in this batch, which has {keys}. A loss of named terms takes batches like "
            f"{{'{term}': {{...}}, ...}}, from your data collator with remove_unused_columns=False."
        )
    return batch[term]
