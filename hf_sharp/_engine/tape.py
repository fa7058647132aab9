"""What first passes drew and moved, so that a pass can be made again as if it were the first."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from hf_sharp._engine import rows
from hf_sharp._engine.random_state import RandomState
from hf_sharp._engine.resources import Resources
from hf_sharp._engine.state import Change
from hf_sharp._tensors.types import Batch

T = TypeVar("T")


class Entry(NamedTuple):
    """The beginning of one micro-batch's first pass.

    Attributes:
        draws: the random streams.
        versions: how often the batch's tensors had been changed in place.
        change: what the pass then moved, with the values of before.
    """

    draws: RandomState
    versions: dict[str, int]
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
        self._present: RandomState | None = None  # the draws of the pass that is being made, from its beginning

    @contextmanager
    def recording(self, batch: Batch) -> Generator[int]:
        """While open, a micro-batch makes its first pass, which moves streams and state on.

        Args:
            batch: the micro-batch.

        Yields:
            The number of its entry.
        """
        draws, versions, before = (
            RandomState.record(self._devices),
            rows.versions(batch),
            self._resources.state.record(),
        )
        self._present = draws
        yield len(self._entries)
        self._entries.append(Entry(draws, versions, self._resources.state.changes(before)))

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

    def rewind(self, number: int, batch: Batch) -> None:
        """Inside `kept`: draws and state are as they were when a first pass began.

        Args:
            number: of the entry.
            batch: the micro-batch.

        Raises:
            RuntimeError: if its tensors were changed in place since.
        """
        entry = self._entries[number]
        moved = [key for key, version in rows.versions(batch).items() if entry.versions.get(key) != version]
        if moved:
            raise RuntimeError(
                f"The model or the loss changes its inputs in place ({', '.join(moved)}), so a second pass would see "
                "other data than the first. Change a copy of them."
            )
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
