"""What first passes drew and moved, so that a pass can be made again as if it were the first."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hf_sharp._engine import rows
from hf_sharp._engine.random_state import RandomState
from hf_sharp._engine.records import Change, Record
from hf_sharp._engine.resources import Resources
from hf_sharp._tensors.types import Batch

T = TypeVar("T")


class Entry(NamedTuple):
    """The beginning of one micro-batch's first pass.

    Attributes:
        draws: the random streams.
        versions: how often the batch's tensors had been changed in place.
        copies: the values of those that models change in place.
        change: what the pass then moved, with the values of before.
    """

    draws: RandomState
    versions: dict[str, int]
    copies: dict[str, Tensor]
    change: Change


class Tape:
    """The first passes of a step in the order in which they were made, those of all terms of the loss together.

    Args:
        resources: whose record of state and list of regions it uses.
        devices: the devices besides the CPU whose random streams a forward may draw from.
    """

    def __init__(self, resources: Resources, devices: set[torch.device]) -> None:
        self._resources = resources
        self._devices = devices
        self._entries: list[Entry] = []
        self._begun: Record | Change | None = None  # of the first pass that is being made
        self._present: RandomState | None = None  # the draws of the pass that is being made, from its beginning

    @contextmanager
    def recording(self, batch: Batch) -> Generator[int]:
        """While open, a micro-batch makes its first pass, which moves streams and state on.

        Args:
            batch: the micro-batch.

        Yields:
            The number of its entry.
        """
        draws, before = RandomState.record(self._devices), self._resources.state.record()
        versions, copies = rows.versions(batch), rows.copies(batch)
        self._present, self._begun = draws, before
        with self._resources.undo.region(self._put_back_begun):  # before what is out of its place around the pass
            yield len(self._entries)
            self._begun = change = self._resources.state.changes(before)
            self._entries.append(Entry(draws, versions, copies, change))
            self._begun = None

    def _put_back_begun(self) -> None:
        """Put back what a first pass has moved that was cut off."""
        if isinstance(self._begun, Record):
            self._resources.state.put_back_to(self._begun)
        elif self._begun is not None:
            self._begun.undo()

    def undo(self) -> None:
        """Put back what first passes moved, from the last to the first.

        The random streams stay where the passes left them: a step made again draws other dropout, as it does after an
        exception in plain training.
        """
        for entry in reversed(self._entries):
            entry.change.undo()
        self._entries = []

    @contextmanager
    def kept(self) -> Generator[None]:
        """While open, passes leave no trace: streams and state are afterwards what they were before.

        Yields:
            Nothing.
        """
        streams = RandomState.record(self._devices)
        state, undo = self._resources.state, self._resources.undo
        with (
            undo.region(state.put_back),
            state.kept(),
            undo.region(streams.restore),
        ):
            yield

    def inputs(self, number: int, batch: Any) -> AbstractContextManager[None]:
        """While open, a micro-batch is what it was when its first pass began; afterwards what that pass made of it.

        Args:
            number: of the entry.
            batch: the micro-batch.

        Returns:
            The context.
        """
        entry = self._entries[number]
        return rows.kept(batch, entry.copies, entry.versions)

    def rewind(self, number: int, batch: Any) -> None:
        """Inside `kept`: draws, state and the micro-batch are as they were when a first pass began.

        Args:
            number: of the entry.
            batch: the micro-batch.
        """
        entry = self._entries[number]
        rows.set_values(rows.changed(batch, entry.copies, entry.versions), entry.copies)
        self._entries[number] = entry = entry._replace(versions=rows.versions(batch))
        self._resources.state.rewind([later.change for later in self._entries[number:]])
        self._present = entry.draws
        entry.draws.restore()

    def aside(self, work: Callable[[], T]) -> T:
        """Do something in the middle of a pass, with the draws of that pass and without a trace.

        Args:
            work: what to do.

        Returns:
            What it gives.
        """
        with self.kept():
            if self._present is not None:
                self._present.restore()
            return work()
