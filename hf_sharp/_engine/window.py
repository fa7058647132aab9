"""The micro-batches of one optimizer step, and passes over them: the first one, repetitions, parts, single rows."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_sharp._engine import rows
from hf_sharp._engine.host import Host
from hf_sharp._engine.tape import Tape
from hf_sharp._tensors.types import Batch, Hook, Normaliser, Outputs, is_mapping


class Pass(NamedTuple):
    """One micro-batch as a pass is made over it.

    Attributes:
        batch: the micro-batch, or rows of one.
        normaliser: what the host divides its loss by.
        entry: where the tape has the beginning of its first pass; None for rows that draw afresh.
    """

    batch: Batch
    normaliser: Normaliser
    entry: int | None


class Window:
    """What a step's loss is the sum of. Several announced groups can make one window, each with its own divisor.

    Args:
        host: the training loop.
        tape: what first passes drew and moved.
        batches: the micro-batches, as far as they are known.
        size: how many there will be; None for as many as are given.
        apart: whether the host has counted for other batches than these, so that the divisor is asked for (a named
            term of the loss).

    Attributes:
        batches: the micro-batches; each is replaced by what the host made of it when its first pass is made.
        current: the position of the micro-batch that a pass is being made over.
    """

    def __init__(
        self, host: Host, tape: Tape, batches: Sequence[Batch] = (), size: int | None = None, apart: bool = False
    ) -> None:
        self._host = host
        self._tape = tape
        self._apart = apart
        self.batches = list(batches)
        self._size = len(self.batches) if size is None else size
        self._group_starts = [0]
        self._group_normalisers: dict[int, Normaliser] = {}
        self._first: list[Pass] = []
        self.current = 0

    def extend(self, batches: Sequence[Batch], size: int | None = None) -> None:
        """More micro-batches for the same optimizer step: the loop announced a window before this one had ended.

        Args:
            batches: the micro-batches.
            size: how many there will be; None for as many as are given.
        """
        del self.batches[len(self._first) :]
        self._group_starts.append(len(self.batches))
        self.batches += batches
        self._size = len(self._first) + (len(batches) if size is None else size)

    @property
    def size(self) -> int:
        """How many micro-batches it has, or will have."""
        return max(self._size, len(self.batches), 1)

    @property
    def passed(self) -> int:
        """How many micro-batches have made their first pass."""
        return len(self._first)

    @property
    def group(self) -> tuple[int, list[Batch]]:
        """The announced group of the micro-batch that a pass is being made over: its number and its micro-batches."""
        number = max(i for i, start in enumerate(self._group_starts) if start <= self.current)
        ends = [*self._group_starts[1:], len(self.batches)]
        return number, self.batches[self._group_starts[number] : ends[number]]

    # --- passes ------------------------------------------------------------------------------------------------------

    def first_pass(self, batch: Batch, only: Sequence[nn.Parameter] | None, hook: Hook | None) -> Tensor:
        """The next micro-batch's first pass, which moves random streams and state on as the host's own would.

        Args:
            batch: the micro-batch, as the host gives it.
            only: parameters whose gradients suffice, None for all.
            hook: of the outputs.

        Returns:
            The loss that the host logs.
        """
        self.current = len(self._first)
        self.batches[self.current :] = [batch, *self.batches[self.current + 1 :]]
        normaliser = self._normaliser()
        with self._tape.recording(batch) as entry:
            self._first.append(Pass(batch, normaliser, entry))
            return self._host.backward(batch, normaliser, only, hook)

    def _normaliser(self) -> Normaliser:
        if not self._apart:
            return self._host.normaliser(None)
        number, batches = self.group
        if number not in self._group_normalisers:
            self._group_normalisers[number] = self._host.normaliser(batches)
        return self._group_normalisers[number]

    def whole(self) -> list[Pass]:
        """All its micro-batches, as they made their first pass.

        Returns:
            One pass each.
        """
        return self._first

    def part(self, fraction: float) -> tuple[list[Pass], float]:
        """A part of it, normalised as if it were the window.

        Args:
            fraction: the share: whole micro-batches if there are several, else rows of the one (which draw afresh).

        Returns:
            The passes, and the share that they really are.
        """
        several = len(self.batches) > 1
        if several:
            count = max(1, round(fraction * len(self.batches)))
            batches, share = self.batches[:count], count / len(self.batches)
        else:
            count, size = rows.share(self.batches[0], fraction)
            batches, share = [self._host.part(self.batches[0], slice(count))], count / size
        normaliser = self._host.normaliser(batches)
        entries = [first.entry if several else None for first in self._first[: len(batches)]]
        entries += [None] * (len(batches) - len(entries))
        return [Pass(b, normaliser, e) for b, e in zip(batches, entries, strict=True)], share

    def repeat(
        self,
        passes: Sequence[Pass],
        only: Sequence[nn.Parameter] | None,
        hook: Hook | None,
        apart: bool,
        sharded: bool,
    ) -> list[Tensor]:
        """Passes without a trace: draws and state begin as in the first, and are put back afterwards.

        Args:
            passes: what to pass over.
            only: parameters whose gradients suffice, None for all.
            hook: of the outputs.
            apart: whether gradients stay unreduced over ranks, whatever the host's loop is doing.
            sharded: whether parameters are; they have no gradient but a reduced one.

        Returns:
            The loss of each.
        """
        losses: list[Tensor] = []
        with self.kept():
            for index, (batch, normaliser, entry) in enumerate(passes):
                self.current = index
                if entry is not None:
                    self._tape.rewind(entry, batch)
                last = index + 1 == len(passes)
                with rows.kept(batch) if entry is None else nullcontext(), self._reduction(apart, last, sharded):
                    losses.append(self._host.backward(batch, normaliser, only, hook))
        return losses

    def forwards(self) -> Iterator[tuple[Outputs, Batch]]:
        """Forwards without a trace, with the draws of the first passes.

        Yields:
            The outputs of each micro-batch, and the micro-batch.
        """
        with self.kept():
            for index, (batch, _, entry) in enumerate(self._first):
                self.current = index
                assert entry is not None
                self._tape.rewind(entry, batch)
                yield self._host.forward(batch), batch

    @contextmanager
    def kept(self) -> Generator[None]:
        """While open, passes leave no trace in random streams, state and micro-batches.

        The micro-batches are meanwhile what they were before their first passes, which may have changed ids in place.

        Yields:
            Nothing.
        """
        with self._tape.kept(), ExitStack() as inputs:
            for batch, _, entry in self._first:
                if entry is not None:
                    inputs.enter_context(self._tape.inputs(entry, batch))
            yield

    def single_rows(self) -> Iterator[Batch]:
        """Its rows one by one.

        Yields:
            Micro-batches of one row.
        """
        for batch in self.batches:
            for index in range(rows.count(batch)):
                yield self._host.part(batch, slice(index, index + 1))

    def _reduction(self, apart: bool, last: bool, sharded: bool) -> AbstractContextManager[Any]:
        if sharded and last:
            return self._host.synced()
        return self._host.unsynced() if apart or not last else nullcontext()

    # --- rows of the micro-batch that a pass is being made over ------------------------------------------------------

    def row_count(self) -> int:
        """The number of rows of the present micro-batch.

        Returns:
            The number, on this rank.
        """
        return rows.count(self.batches[self.current])

    def first_row(self, rank: int, ranks: int) -> int:
        """The number of the first row of the present micro-batch, counted over the window and all ranks.

        Args:
            rank: the number of this process.
            ranks: how many there are; each is taken to have as many rows in a micro-batch as this one.

        Returns:
            The number.
        """
        counts = [rows.count(batch) for batch in self.batches[: self.current + 1]]
        return sum(counts[:-1]) * ranks + counts[-1] * rank

    def sample_index(self) -> list[int]:
        """The numbers of the rows of the present micro-batch.

        Returns:
            The column `sample_index` of the batch.

        Raises:
            ValueError: if the batch has none.
        """
        batch = self.batches[self.current]
        numbers = batch.get(rows.SAMPLE_INDEX) if is_mapping(batch) else None
        if numbers is None:
            raise ValueError(
                f"This method knows samples again by a column '{rows.SAMPLE_INDEX}' of the training data, which is "
                f"missing: dataset.add_column('{rows.SAMPLE_INDEX}', list(range(len(dataset))))."
            )
        return [int(number) for number in numbers]
