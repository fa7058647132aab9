"""The step engine: a `Landscape` answers what the loss and its gradient are, here or at a shifted point.

Its promises are in docs/design.md, and tests/test_contract.py holds every method to them. Two are for who writes a
method. Nothing here waits for the device: inf and NaN flow through to the gradient handed over. Gradients are
loss-scaled within a step: what is not homogeneous of degree one in them, or is kept, divides by `facts.loss_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_sharp._engine import gradients
from hf_sharp._engine.evaluation import Evaluation, FirstPass, Names, Shift
from hf_sharp._engine.host import Host
from hf_sharp._engine.mover import Mover
from hf_sharp._engine.passes import Passes
from hf_sharp._engine.ranks import Ranks
from hf_sharp._engine.renamed import OF_LANDSCAPE, renamed
from hf_sharp._engine.resources import Resources
from hf_sharp._engine.tape import Tape
from hf_sharp._engine.terms import part_of
from hf_sharp._engine.window import Window
from hf_sharp._tensors.types import Batch, Hook, Outputs, Reduce, Sums
from hf_sharp._tensors.vector import ParamVector, total

FORWARD = 1 / 3  # what a forward alone costs, in forward-backward passes


class Landscape:
    """The loss around the present weights for one accumulation window.

    It holds its parts and inherits none: `facts` of the step, the `window` of micro-batches, the `ranks`, and, for
    itself, one that makes passes and one that moves weights.

    Args:
        host: the training loop.
        batches: the window's micro-batches, as far as they are known; empty when only facts are asked for.
        measuring: whether this step's metrics are wanted (they cost no pass and no copy, but some arithmetic).
        resources: what lasts from step to step; None for some of its own.
        size: how many micro-batches the window will have; None for as many as are given.

    Attributes:
        facts: what is known at this step without its data.
        window: the micro-batches.
        ranks: the processes that train together.
        measuring: whether this step's metrics are wanted.
        losses: with named terms, what the host logged for each so far, without its weight.
    """

    def __init__(
        self,
        host: Host,
        batches: Sequence[Batch] = (),
        measuring: bool = False,
        resources: Resources | None = None,
        size: int | None = None,
    ) -> None:
        self._host = host
        self._resources = Resources(host) if resources is None else resources
        self.facts = host.facts()
        devices = {p.device for p in self.facts.parameters.values() if p.device.type != "cpu"}
        self._tape = Tape(self._resources, devices)
        self.ranks = Ranks(host, self.facts.ranks)
        self._set_up(Window(host, self._tape, batches, size), measuring)

    def _set_up(self, window: Window, measuring: bool) -> None:
        self.window, self.measuring = window, measuring
        self._passes = Passes(self._host, self.facts, window, self.ranks, self._resources.undo)
        self._mover = Mover(self._host, self.facts, self._resources, measuring, self._tape.kept)
        self.losses: dict[str, Tensor] = {}
        self._terms: dict[str, Landscape] = {}

    def __getitem__(self, term: str) -> Landscape:
        """The landscape of one named term of the loss, for batches that are dicts of batches.

        Args:
            term: its name.

        Returns:
            A landscape with the same verbs, over that part of the window.

        Raises:
            ValueError: if a micro-batch of the window has no such part, or there is no window yet.
        """
        if term not in self._terms:
            if not self.window.batches:
                raise ValueError(f"There is no window yet, and so no landscape of its term '{term}'.")
            batches = [part_of(batch, term) for batch in self.window.batches]
            inner = Landscape.__new__(Landscape)
            inner._host, inner._resources, inner.facts = self._host, self._resources, self.facts
            inner.ranks = self.ranks
            inner._tape = self._tape  # the first passes of all terms move the same streams and the same state
            inner._set_up(Window(self._host, self._tape, batches, self.window.size, apart=True), self.measuring)
            self._terms[term] = inner
        return self._terms[term]

    def __getattr__(self, name: str) -> Any:
        return renamed(self, name, OF_LANDSCAPE)

    @property
    def weights(self) -> ParamVector:
        """The present weights, as views: they change when the weights do."""
        return ParamVector(p.detach() for p in self.facts.parameters.values())

    @property
    def model(self) -> nn.Module:
        """The unwrapped model."""
        return self._host.model

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by name, sharded ones with their shards."""
        self._host.reshard()
        return dict(cast("Iterator[tuple[str, nn.Module]]", self._host.model.named_modules()))

    def momentum(self) -> ParamVector | None:
        """The momentum that the optimizer has gathered so far, loss scale removed.

        Returns:
            SGD's momentum or Adam's first moment, not to be changed; None before the first step.
        """
        found = self._host.momentum()
        return None if found is None else ParamVector(found.get(name) for name in self.facts.names)

    # --- the loss and its gradient -----------------------------------------------------------------------------------

    @property
    def plan(self) -> FirstPass:
        """How the first evaluation is made."""
        return self._passes.plan

    @plan.setter
    def plan(self, plan: FirstPass) -> None:
        self._passes.plan, self._passes.plainly = plan, plan.is_plain

    @property
    def first(self) -> Evaluation:
        """The step's first evaluation, to look at; the next `evaluate()` still returns it."""
        self._collect_first()
        if self._passes.first is None:
            raise RuntimeError("The first evaluation was handed out already.")
        return self._passes.first

    def evaluate(
        self,
        fraction: float = 1.0,
        only: Names | None = None,
        add: Hook | None = None,
        reduce: Reduce | None = None,
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
            synced: whether the gradient is reduced over ranks; of the first evaluation `plan_first_pass` says it.

        Returns:
            The evaluation; its gradient is None outside `only` and where the loss does not reach.

        Raises:
            ValueError: if `fraction` is not in (0, 1].
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is a share of the window in (0, 1]; got {fraction}.")
        self._collect_first()
        asked = FirstPass(only=only, add=add, reduce=reduce, synced=synced)
        if fraction < 1:
            return self._passes.repeat(*self.window.part(fraction), asked)
        if self._passes.first is not None:
            return self._passes.give_first(asked)
        self._mover.there = there = self._passes.repeat(self.window.whole(), 1.0, asked)
        return there

    def forward(self, reduce: Reduce) -> Sums:
        """The model's outputs at the present weights, without gradients and with the first evaluation's dropout.

        Args:
            reduce: from (outputs, batch) to something that adds up, such as a tensor of sums; outputs are not kept.

        Returns:
            The sum over the window.
        """
        self._collect_first()
        with torch.no_grad():
            terms = [reduce(outputs, batch) for outputs, batch in self.window.forwards()]
        self._passes.evaluations += FORWARD
        return sum(terms[1:], start=terms[0])

    def outputs_at(self, batch: Batch, weights: ParamVector | None = None) -> Outputs:
        """The model's outputs for the micro-batch being evaluated, inside `add` or `reduce`, without gradients.

        The draws (dropout) are those of the evaluation; random streams, state and the weights are left alone.

        Args:
            batch: what `add` or `reduce` was given.
            weights: at which weights, if not the present ones; None in it leaves a parameter as it is.

        Returns:
            The outputs.
        """
        del batch
        weights = ParamVector([]) if weights is None else weights
        # Sharded modules gather their own weights, whatever they are called with.
        moved = self.at(weights) if self.facts.sharded and weights.present() else nullcontext()
        named = {} if self.facts.sharded or not weights.present() else self.facts.named(weights)
        with torch.no_grad(), moved:
            outputs = self._tape.aside(lambda: self._host.recompute(named))
        self._passes.evaluations += FORWARD / self.window.size
        return outputs

    def row_gradients(self, samples: int) -> Iterator[ParamVector]:
        """The gradient of each of the window's first rows by itself, in evaluation mode, on this rank.

        Args:
            samples: how many rows at most.

        Returns:
            One gradient a row, loss-scaled; random streams, state and modes are left alone.

        Raises:
            ValueError: if parameters are sharded.
        """
        if self.facts.sharded:
            raise ValueError("Sharded parameters (FSDP) have no gradient of single rows. Use DDP, or fisher='batch'.")
        self._collect_first()
        return self._passes.row_gradients(samples)

    # --- other weights -----------------------------------------------------------------------------------------------

    def shifted(self, shift: Shift | ParamVector) -> AbstractContextManager[None]:
        """While open, the weights are shifted; afterwards they are bitwise what they were.

        Only what epsilon has tensors for is copied and moved. Epsilon is not kept: if the caller keeps none either, or
        has donated it, its memory is free during the evaluations inside.

        Args:
            shift: the perturbation; with a slope, its curvature is measured too.

        Returns:
            The context.
        """
        return self._mover.shifted(shift)

    def at(self, weights: ParamVector) -> AbstractContextManager[None]:
        """While open, the weights are the given ones (None: as they are), exactly; afterwards what they were."""
        return self._mover.at(weights)

    def restored(self, weights: Sequence[nn.Parameter]) -> AbstractContextManager[list[Tensor]]:
        """While open, parameters may be changed in place, frozen ones too; afterwards they are what they were."""
        return self._mover.restored(weights)

    def region(self, put_back: Callable[[], None]) -> AbstractContextManager[None]:
        """While open, something else is out of its place: a hook, a module's forward.

        Args:
            put_back: puts it back, and may be called twice; it is called whatever happens, Ctrl-C at any point too.

        Returns:
            The context; move things inside it.
        """
        return self._resources.undo.region(put_back)

    # --- for the stepper ---------------------------------------------------------------------------------------------

    @property
    def evaluations(self) -> float:
        """How many times the window was passed through so far; with named terms, the mean over the terms."""
        inner = [landscape.evaluations for landscape in self._terms.values()]
        return self._passes.evaluations + (sum(inner) / len(inner) if inner else 0.0)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What was measured of the last shift, 0-dim tensors by name; those of a term end in its name."""
        inner = {f"{n}_{term}": v for term, scape in self._terms.items() for n, v in scape.metrics.items()}
        return {**self._mover.metrics, **inner}

    def extend(self, batches: Sequence[Batch], size: int | None = None) -> None:
        """More micro-batches for the same optimizer step; see `Window.extend`."""
        self.window.extend(batches, size)
        for term, landscape in self._terms.items():
            landscape.extend([part_of(batch, term) for batch in batches], size)

    def first_pass(self, batch: Batch, last: bool = False) -> Tensor:
        """One micro-batch of the step's first evaluation, in the host's own context; gives the loss that it logs."""
        if self.plan.terms is None:
            return self._passes.first_pass(batch, self._planned_shift(last))
        losses: list[Tensor] = []
        for term, weight in self.plan.terms.items():
            inner = self[term]
            loss = inner._passes.first_pass_apart(part_of(batch, term), inner._planned_shift(last))
            self.losses[term] = self.losses[term] + loss if term in self.losses else loss
            losses.append(weight * loss)
        return total(losses)

    def _planned_shift(self, last: bool) -> AbstractContextManager[None]:
        shift = self.plan.shift
        if last:
            self._passes.plan = self.plan._replace(shift=None)  # its memory is free while the last pass runs
        return nullcontext() if shift is None else self.shifted(shift() if callable(shift) else shift)

    def _collect_first(self) -> None:
        if self._passes.collect_first():
            plainly, first = self._passes.plainly, self._passes.first
            self._mover.begin(first.loss if plainly and first is not None else None)

    def find_inflation(self, batch: Any) -> None:
        """Let the host find out, by passes without a trace, what it divides its loss by; facts are read afterwards."""
        self._host.find_inflation(batch, self._tape.kept)

    def compare_repetition(self) -> None:
        """Warn if a pass cannot be made again: where the first evaluation is plain, its beginning is repeated."""
        for landscape in self._terms.values():
            landscape.compare_repetition()
        self._collect_first()
        if self._passes.first is not None and self._passes.plainly and self.plan.reduce is None:
            self._passes.compare_repetition()

    def hand_over(self, evaluation: Evaluation) -> ParamVector:
        """Write a method's gradient where the host looks for it, as if one ordinary backward had left it there."""
        gradients.put(self.facts.parameters.values(), evaluation.grad.tensors)
        return evaluation.grad

    def clear(self) -> None:
        """Drop all gradients."""
        self._passes.clear()

    def abandon(self) -> None:
        """Drop all gradients and put back what the first passes moved: after a step that failed."""
        self._passes.clear()
        self._tape.undo()

    def close(self) -> None:
        """Let go of the window and of what the method asked for, which refers back to this landscape."""
        self.plan, self.window.batches = FirstPass(), []
        for landscape in self._terms.values():
            landscape.close()
        self._terms = {}
