"""Evaluations of a window: the first one, which the host's own micro-batch calls make, and those made again."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from hf_sharp._engine import gradients, rows
from hf_sharp._engine.evaluation import Evaluation, FirstPass, Names
from hf_sharp._engine.facts import StepFacts
from hf_sharp._engine.host import Host
from hf_sharp._engine.ranks import Ranks
from hf_sharp._engine.undo import Undo
from hf_sharp._engine.window import Pass, Window
from hf_sharp._tensors.types import Batch, Hook, Outputs, Reduce, Sums
from hf_sharp._tensors.vector import ParamVector, total

REPEATED = (
    "A second pass over the first micro-batch, at the same weights, gave the loss {again!r} instead of {first!r}: the "
    "passes of a step do not see one function, and what a method makes of their difference is partly noise. Likely "
    "causes: random numbers that cannot be drawn again (torch.seed() in the forward, a stream of a C library), state "
    "that hf_sharp cannot see (globals, objects of libraries), or kernels that are not deterministic "
    "(torch.use_deterministic_algorithms). This is checked once a training; check_repeats=False leaves it out."
)


class Passes:
    """Makes evaluations out of passes over micro-batches.

    Args:
        host: the training loop.
        facts: of the step.
        window: the micro-batches.
        ranks: the processes that train together.
        undo: what is out of its place.

    Attributes:
        plan: how the first evaluation is made.
        plainly: whether the first evaluation is of the host's own loss at the present weights.
        evaluations: how many times the window was passed through so far, a forward alone counting as a third; a part
            counts as its share.
    """

    def __init__(self, host: Host, facts: StepFacts, window: Window, ranks: Ranks, undo: Undo) -> None:
        self._host, self._facts, self._window, self._ranks, self._undo = host, facts, window, ranks, undo
        self.plan = FirstPass()
        self.evaluations = 0.0
        self._first_losses: list[Tensor] = []
        self._sums: list[Sums] = []  # what `reduce` gave for the micro-batches of the evaluation being made
        self._first: Evaluation | None = None
        self.plainly = True
        self._lacking: set[str] = set()  # parameters that a backward towards a subset gave nothing
        self._opening_loss: Tensor | None = None  # of the first micro-batch
        self._aside: list[Tensor | None] | None = None  # gradients kept out of the way of other terms'

    # --- the first evaluation ----------------------------------------------------------------------------------------

    def first_pass(self, batch: Batch, shifted: AbstractContextManager[None]) -> Tensor:
        """One micro-batch of it.

        Args:
            batch: the next micro-batch of the window.
            shifted: puts the weights where the plan wants them.

        Returns:
            The loss that the host logs.
        """
        plan = self.plan
        with plan.within(), shifted, nullcontext() if plan.synced else self._host.unsynced():
            hook = self.hook(plan.add, plan.reduce)
            loss = self._window.first_pass(batch, self._parameters(plan.only), hook)
        self._first_losses.append(loss)
        return loss

    def first_pass_apart(self, batch: Batch, shifted: AbstractContextManager[None]) -> Tensor:
        """The same, the gradients being kept out of the way of other terms'.

        Args:
            batch: the next micro-batch of the window.
            shifted: puts the weights where the plan wants them.

        Returns:
            The loss that the host logs.
        """
        self._put_back_aside()
        with self._host.synced() if self._facts.sharded else nullcontext():  # unreduced, they would mix with others'
            loss = self.first_pass(batch, shifted)
        self._aside = [p.grad for p in self._facts.parameters.values()]
        self.clear()
        return loss

    def _put_back_aside(self) -> None:
        if self._aside is not None:
            gradients.put(self._facts.parameters.values(), self._aside)
            self._aside = None

    def collect_first(self) -> bool:
        """Take the first evaluation out of `p.grad`, once.

        Returns:
            Whether this call did.
        """
        self._put_back_aside()
        if not self._first_losses:
            return False
        losses, self._first_losses = self._first_losses, []
        self._opening_loss = losses[0]
        self._first = self._answer(losses, self._collect(self.plan.only))
        self._first.grad.is_gradient = self.plainly
        pairs = zip(self._facts.names, self._first.grad.tensors, strict=True)
        self._lacking = {n for n, g in pairs if g is None and n in (self.plan.only or ())}
        return True

    @property
    def first(self) -> Evaluation | None:
        """The first evaluation, until it is given out."""
        return self._first

    def give_first(self, asked: FirstPass) -> Evaluation:
        """Give the first evaluation out.

        Args:
            asked: what it is asked for.

        Returns:
            The evaluation.

        Raises:
            RuntimeError: if it was planned for something else.
        """
        planned = self.plan.only
        too_little = planned is not None and (asked.only is None or not set(asked.only) <= set(planned))
        unsynced = asked.synced != self.plan.synced and self._facts.ranks > 1
        if too_little or asked.add is not None or asked.reduce is not None or unsynced:
            raise RuntimeError("The first evaluation gives what `Method.plan_first_pass` planned it for, no more.")
        first, self._first = self._first, None
        assert first is not None
        self.evaluations += 1
        return first

    def compare_repetition(self) -> None:
        """Pass over the first micro-batch once more, and warn if its loss is another one; waits for the device."""
        sharded, ranks = self._facts.sharded, self._facts.ranks
        (again,) = self._window.repeat(self._window.whole()[:1], None, None, ranks > 1, sharded)
        self.clear()
        first = self._opening_loss
        if first is not None and not torch.equal(first, again) and bool(first.isfinite()):
            warnings.warn(REPEATED.format(first=float(first), again=float(again)), stacklevel=2)

    # --- evaluations made again --------------------------------------------------------------------------------------

    def repeat(self, passes: Sequence[Pass], share: float, asked: FirstPass) -> Evaluation:
        """Loss and gradient of some micro-batches, or rows of one.

        Args:
            passes: over what.
            share: of the window that they are.
            asked: for which parameters, with which hooks, reduced over ranks or not.

        Returns:
            The evaluation.
        """
        ranks, sharded = self._facts.ranks, self._facts.sharded
        towards, hook = self._parameters(asked.only), self.hook(asked.add, asked.reduce)
        apart = ranks > 1 and (share < 1 or not asked.synced)
        self.clear()
        losses = self._window.repeat(passes, towards, hook, apart, sharded)
        self.evaluations += share
        grad = self._collect(asked.only)
        if apart and asked.synced and not sharded:
            grad = self._ranks.mean(grad)
        if asked.only is None and self._lacking:
            self._look_for_lost(grad)
        return self._answer(losses, grad)

    def row_gradients(self, samples: int) -> Iterator[ParamVector]:
        """See `Landscape.row_gradients`."""
        singles = list(self._window.single_rows())
        with self._window.kept(), self._evaluation_mode():
            for row in singles[:samples]:
                self.clear()
                with rows.kept(row):
                    self._host.row_backward(row)
                self.evaluations += 1 / len(singles)
                yield self._collect(None)

    @contextmanager
    def _evaluation_mode(self) -> Generator[None]:
        modes = [(module, module.training) for module in self._host.model.modules()]

        def put_back() -> None:
            for module, training in modes:
                module.training = training

        with self._undo.region(put_back):
            self._host.model.eval()
            yield

    def hook(self, add: Hook | None, reduce: Reduce | None) -> Hook | None:
        """What the host is to call with the outputs.

        Args:
            add: gives a term of the loss.
            reduce: gives something that is summed over the window.

        Returns:
            Both in one; None for neither.
        """
        if add is None and reduce is None:
            return None

        def hook(outputs: Outputs, batch: Batch) -> Tensor | None:
            if reduce is not None:
                with torch.no_grad():
                    self._sums.append(reduce(outputs, batch))
            return None if add is None else add(outputs, batch)

        return hook

    def _parameters(self, names: Names | None) -> list[nn.Parameter] | None:
        if names is None:
            return None
        wanted = set(names)
        found = [p for name, p in self._facts.parameters.items() if name in wanted]
        if not found:
            raise ValueError(
                f"No trainable parameter of the optimizer is among {sorted(wanted)[:5]}; no gradient to take."
            )
        return found

    def _collect(self, only: Names | None) -> ParamVector:
        return gradients.collect(self._facts, only, copied=not self._host.keeps_gradients)

    def _answer(self, losses: Sequence[Tensor], grad: ParamVector) -> Evaluation:
        sums, self._sums = self._sums, []
        return Evaluation(total(losses), grad, sum(sums[1:], start=sums[0]) if sums else None)

    def _look_for_lost(self, grad: ParamVector) -> None:
        """A parameter with a gradient in the full backward, and none in the subset's, was lost by the latter."""
        pairs = zip(self._facts.names, grad.tensors, strict=True)
        lost = [name for name, tensor in pairs if tensor is not None and name in self._lacking]
        if lost:
            self._host.refuse_subsets(f"a backward towards a subset gave {', '.join(lost[:3])} no gradient")

    def clear(self) -> None:
        """Drop all gradients, as before an evaluation or after a step that failed."""
        own = (*self._host.model.parameters(), *self._facts.parameters.values(), *self._facts.added.values())
        gradients.clear(own)
