"""Passes over one accumulation window: the host's own first one, repetitions of it, parts of it, forwards alone.

The first evaluation of a step is made by the host's own micro-batch calls (`first_pass`), so that its logs are the
host's; it moves random streams and buffers on as one plain backward would. Everything else repeats the streams of the
first, micro-batch by micro-batch, and leaves streams and buffers alone. Afterwards every `p.grad` is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._engine import rows
from hf_sharp._engine.evaluation import Evaluation, FirstPass, Hook, Names
from hf_sharp._engine.facts import Facts
from hf_sharp._engine.host import Host
from hf_sharp._engine.replay import RandomState, buffer_copies, buffers_kept, streams_kept
from hf_sharp._tensors.vector import ParamVector, total

FORWARD = 1 / 3  # what a forward alone costs, in forward-backward passes


class Passes(Facts):
    """The passes of one step over its window of micro-batches.

    Args:
        host: the training loop this stands in.
        batches: the window's micro-batches, as far as they are known; empty when only facts are asked for.
        size: how many micro-batches the window will have; None for as many as are given.

    Attributes:
        evaluations: how many times the window was passed through so far, a forward alone counting as a third; a part
            counts as its share.
    """

    def __init__(self, host: Host, batches: Sequence[Any] = (), size: int | None = None) -> None:
        super().__init__(host)
        self.batches = list(batches)
        self.size = len(self.batches) if size is None else size
        self.plan = FirstPass()
        self.evaluations = 0.0
        self._records: list[tuple[RandomState, list[int]]] = []
        self._losses: list[Tensor] = []
        self._sums: list[Any] = []
        self._first: Evaluation | None = None
        self._lacking: set[str] = set()
        self._current = 0
        self._unshifted = True
        self._devices = {p.device for p in host.parameters.values() if p.device.type != "cpu"}

    def first_pass(self, batch: Any) -> Tensor:
        """One micro-batch of the step's first evaluation, called by the door in the host's own context.

        Args:
            batch: the next micro-batch of the window, as the host gives it.

        Returns:
            The loss that the host logs.
        """
        self._current = len(self._records)
        if not self._records:
            self._unshifted = self.plan._replace(only=None, reduce=None, synced=True) == FirstPass()
        self.batches[self._current :] = [batch, *self.batches[self._current + 1 :]]
        self._records.append((RandomState.record(self._devices), rows.versions(batch)))
        with self.plan.within(), self._opened(), nullcontext() if self.plan.synced else self.host.unsynced():
            hook = self._hook(self.plan.add, self.plan.reduce)
            self._losses.append(self.host.backward(batch, self._parameters(self.plan.only), hook))
        return self._losses[-1]

    @property
    def first(self) -> Evaluation:
        """The step's first evaluation, to look at; the next `evaluate()` still returns it."""
        self._collect_first()
        if self._first is None:
            raise RuntimeError("The first evaluation was handed out already.")
        return self._first

    def evaluate(
        self,
        fraction: float = 1.0,
        only: Names | None = None,
        add: Hook | None = None,
        reduce: Hook | None = None,
        synced: bool = True,
    ) -> Evaluation:
        """The loss and gradient at the present weights.

        Args:
            fraction: the share of the window to use: whole micro-batches if it has several, else rows of the batch
                (whose dropout masks are their own). Such an evaluation never counts as the step's first one and
                leaves the random streams alone. Its loss is normalised as if its part were the window.
            only: names of the parameters whose gradient is needed; the weight-gradient work of the others is skipped
                where the host allows it. None for all.
            add: add(outputs, batch) is a term added to the loss of each micro-batch, in the units of the window's
                loss; of the first evaluation it is asked for in `Method.plan_first_pass`.
            reduce: reduce(outputs, batch) is summed over the window without gradients, as `Evaluation.reduced`.
            synced: whether the gradient of a part is reduced over ranks.

        Returns:
            The evaluation; its gradient is None outside `only` and where the loss does not reach.

        Raises:
            ValueError: if `fraction` is not in (0, 1].
            RuntimeError: if the first evaluation was opened for less than is now asked for.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is a share of the window in (0, 1]; got {fraction}.")
        self._collect_first()
        if fraction < 1:
            return self._evaluate_part(fraction, only, synced)
        if self._first is None:
            return self._replay(self.batches, only, hook=self._hook(add, reduce))
        opened = self.plan.only
        too_little = opened is not None and (only is None or not set(only) <= set(opened))
        if too_little or add is not None or reduce is not None:
            raise RuntimeError("The first evaluation gives what `Method.plan_first_pass` opened it for, no more.")
        first, self._first = self._first, None
        self.evaluations += 1
        return first

    def forward(self, reduce: Callable[[Any, Any], Any]) -> Any:
        """The model's outputs at the present weights, without gradients, reduced micro-batch by micro-batch.

        Dropout is that of the first evaluation; random streams and buffers are left alone.

        Args:
            reduce: from (outputs, batch) to something that adds up, such as a tensor of sums; outputs are not kept.

        Returns:
            The sum over the window.
        """
        self._collect_first()
        terms = []
        with torch.no_grad(), self._without_trace():
            for index, batch in enumerate(self.batches):
                self._current = index
                self._repeat_draws(index)
                terms.append(reduce(self.host.forward(batch), batch))
        self.evaluations += FORWARD
        return sum(terms[1:], start=terms[0])

    def outputs_at(self, batch: Any, weights: ParamVector | None = None) -> Any:
        """The model's outputs for the micro-batch being evaluated, inside `add` or `reduce`, without gradients.

        The draws (dropout) are those of the evaluation; random streams, buffers and the weights are left alone.

        Args:
            batch: what `add` or `reduce` was given.
            weights: at which weights, if not the present ones; None in it leaves a parameter as it is.

        Returns:
            The outputs.
        """
        named = buffer_copies(self.host.model)
        if weights is not None:
            pairs = zip(self.names, weights.tensors, strict=True)
            named |= {name: tensor for name, tensor in pairs if tensor is not None}
        with torch.no_grad(), streams_kept(self._devices):
            self._repeat_draws(self._current)
            outputs = self.host.again(batch, named)
        self.evaluations += FORWARD / max(self.size, len(self.batches), 1)
        return outputs

    def row_gradients(self, samples: int) -> Iterator[ParamVector]:
        """The gradient of each of the window's first rows by itself, in evaluation mode, on this rank.

        Args:
            samples: how many rows at most.

        Yields:
            One gradient a row, loss-scaled; random streams, buffers and modes are left alone.

        Raises:
            ValueError: if parameters are sharded.
        """
        if self.sharded:
            raise ValueError("Sharded parameters (FSDP) have no gradient of single rows. Use DDP, or fisher='batch'.")
        self._collect_first()
        modes = [(module, module.training) for module in self.host.model.modules()]
        size = sum(rows.count(batch) for batch in self.batches)
        singles = (self.host.part(b, slice(i, i + 1)) for b in self.batches for i in range(rows.count(b)))
        try:
            with self._without_trace():
                self.host.model.eval()
                for row, _ in zip(singles, range(samples), strict=False):
                    self.clean()
                    self.host.row_backward(row)
                    self.evaluations += 1 / size
                    yield self._gather(None)
        finally:
            for module, training in modes:
                module.training = training

    def row_count(self) -> int:
        """The number of rows of the micro-batch being evaluated.

        Returns:
            The number, on this rank.
        """
        return rows.count(self.batches[self._current])

    def first_row(self) -> int:
        """The number of the first row of the micro-batch being evaluated, counted over the window and all ranks.

        Returns:
            The number; every rank is taken to have as many rows in a micro-batch as this one.
        """
        counts = [rows.count(batch) for batch in self.batches[: self._current + 1]]
        return sum(counts[:-1]) * self.host.ranks + counts[-1] * self.host.rank

    def sample_index(self) -> list[int]:
        """The numbers of the rows of the micro-batch being evaluated.

        Returns:
            The column `sample_index` of the batch.

        Raises:
            ValueError: if the batch has none.
        """
        batch = self.batches[self._current]
        numbers = batch.get(rows.SAMPLE_INDEX) if isinstance(batch, Mapping) else None
        if numbers is None:
            raise ValueError(
                f"This method knows samples again by a column '{rows.SAMPLE_INDEX}' of the training data, which is "
                f"missing: dataset.add_column('{rows.SAMPLE_INDEX}', list(range(len(dataset))))."
            )
        return [int(number) for number in numbers]

    def clean(self) -> None:
        """Drop all gradients, as before an evaluation or after a step that failed."""
        for parameter in (*self.host.model.parameters(), *self.host.parameters.values(), *self.host.added.values()):
            parameter.grad = None

    def _opened(self) -> Any:
        """The context of the step's first evaluation; a landscape shifts the weights in it."""
        return nullcontext()

    def _hook(self, add: Hook | None, reduce: Hook | None) -> Hook | None:
        if add is None and reduce is None:
            return None

        def hook(outputs: Any, batch: Any) -> Any:
            if reduce is not None:
                with torch.no_grad():
                    self._sums.append(reduce(outputs, batch))
            return None if add is None else add(outputs, batch)

        return hook

    def _parameters(self, names: Names | None) -> list[nn.Parameter] | None:
        if names is None:
            return None
        wanted = set(names)
        found = [p for name, p in self.host.parameters.items() if name in wanted]
        if not found:
            raise ValueError(
                f"No trainable parameter of the optimizer is among {sorted(wanted)[:5]}; no gradient to take."
            )
        return found

    def _gather(self, only: Names | None) -> ParamVector:
        grads: list[Tensor | None] = []
        for name, parameter in self.host.parameters.items():
            grad, parameter.grad = parameter.grad, None
            if grad is not None and grad.layout is not torch.strided:
                raise ValueError(
                    f"The gradient of '{name}' is sparse, which has no place in one vector over the parameters: make "
                    "the embedding with sparse=False."
                )
            grads.append(None if only is not None and name not in only else grad)
        if only is not None and all(g is None for g in grads):
            raise RuntimeError(
                "No gradient came for the parameters asked for: the loss does not reach them, or a part of the model "
                "does not support a backward towards a subset (reentrant checkpointing, for one: use "
                "use_reentrant=False, or a method over all parameters)."
            )
        return ParamVector(grads)

    def _answer(self, losses: Sequence[Tensor], grad: ParamVector) -> Evaluation:
        sums, self._sums = self._sums, []
        return Evaluation(total(losses), grad, sum(sums[1:], start=sums[0]) if sums else None)

    def _collect_first(self) -> None:
        if self._losses:
            losses, self._losses = self._losses, []
            self._first = self._answer(losses, self._gather(self.plan.only))
            self._first.grad.fresh = self._unshifted
            pairs = zip(self.names, self._first.grad.tensors, strict=True)
            self._lacking = {n for n, g in pairs if g is None and n in (self.plan.only or ())}

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        with streams_kept(self._devices), buffers_kept(self.host.model), self.host.records_kept():
            yield

    def _repeat_draws(self, index: int) -> None:
        if index < len(self._records):
            draws, versions = self._records[index]
            if rows.versions(self.batches[index]) != versions:
                raise RuntimeError(
                    "The model or the loss changes its inputs in place, so a second pass would see other data than "
                    "the first. Change a copy of them."
                )
            draws.restore()

    def _replay(
        self,
        batches: Sequence[Any],
        only: Names | None,
        repeat: bool = True,
        apart: bool = False,
        hook: Hook | None = None,
        synced: bool = True,
    ) -> Evaluation:
        """A pass over micro-batches; `apart`: reduced over ranks by itself, whatever the host's loop is doing."""
        towards, losses, last = self._parameters(only), [], len(batches) - 1
        self.clean()
        with self._without_trace():
            for index, batch in enumerate(batches):
                self._current = index
                if repeat:
                    self._repeat_draws(index)
                with self._reduction(apart, index == last):
                    losses.append(self.host.backward(batch, towards, hook))
        self.evaluations += len(batches) / len(self.batches)
        grad = self._gather(only)
        alone = apart and synced and not self.host.sharded
        evaluation = self._answer(losses, self.mean_over_ranks(grad) if alone else grad)
        if only is None and self._lacking:
            self._look_for_lost(evaluation.grad)
        self._note(evaluation if repeat and len(batches) == len(self.batches) else None)
        return evaluation

    def _reduction(self, apart: bool, last: bool) -> Any:
        """Which reduction over ranks a backward is made with; shards have no gradient but a reduced one."""
        if self.host.sharded and last:
            return self.host.synced()
        return self.host.unsynced() if apart or not last else nullcontext()

    def _note(self, evaluation: Evaluation | None) -> None:
        """What a pass over the whole window gave, None for a part of it; a landscape measures its shifts by it."""

    def _look_for_lost(self, grad: ParamVector) -> None:
        """A parameter with a gradient in the full backward, and none in the subset's, was lost by the latter."""
        lost = [n for n, g in zip(self.names, grad.tensors, strict=True) if g is not None and n in self._lacking]
        if lost:
            self.host.refuse_subsets(f"a backward towards a subset gave {', '.join(lost[:3])} no gradient")

    def _evaluate_part(self, fraction: float, only: Names | None, synced: bool) -> Evaluation:
        several, before = len(self.batches) > 1, self.evaluations
        if several:
            share = max(1, round(fraction * len(self.batches))) / len(self.batches)
            part = self.batches[: round(share * len(self.batches))]
        else:
            size = rows.count(self.batches[0])
            share = max(1, round(fraction * size)) / size
            part = [self.host.part(self.batches[0], slice(round(share * size)))]
        with self.host.window(part):
            evaluation = self._replay(part, only, repeat=several, apart=self.host.ranks > 1, synced=synced)
        self.evaluations = before + share
        return evaluation
