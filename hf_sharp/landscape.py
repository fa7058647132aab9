"""The step engine: a `Landscape` answers what the loss and its gradient are, here or at a shifted point.

The contract, which every method and every door relies on:

1. `evaluate()` is the loss and gradient over the whole accumulation window at the present weights, with the host's own
   loss, scaling, autocast and reduction. The first evaluation of a step is made by the host's own micro-batch calls
   (`first_pass`), so that its logs are the host's; it moves random streams and buffers on as one plain backward would.
   Later evaluations replay the streams of the first, micro-batch by micro-batch, and leave streams and buffers alone.
   Afterwards every `p.grad` is None.
2. `shifted(epsilon)` adds epsilon to the weights, in place in their storage, and copies the old weights back at the
   end: bitwise, also after an exception, an out-of-memory error or Ctrl-C.
3. Nothing here waits for the device, and nothing branches on a number that only the device knows: inf and NaN flow
   through the passes to the gradient handed over, where the host's scaler sees them. (The one wait is the stepper's,
   in steps that changed the method's state.)
4. `hand_over(evaluation)` writes `p.grad` as if one ordinary backward had run: scaled as the host expects, None where
   no gradient came.

Within a step gradients are loss-scaled as the host's are. What is not homogeneous of degree one in the gradient, or is
kept from step to step, divides by `loss_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp import rows
from hf_sharp.answers import Evaluation, Names, Opening
from hf_sharp.facts import Facts
from hf_sharp.host import Host
from hf_sharp.replay import RandomState, buffers_kept, streams_kept
from hf_sharp.shift import Pool, displaced, realised, seen
from hf_sharp.vector import ParamVector, copy_, move_, total


class Landscape(Facts):
    """The loss around the present weights for one accumulation window.

    Args:
        host: the training loop this stands in.
        batches: the window's micro-batches; empty when only facts are asked for.
        measuring: whether this step's metrics are wanted (they cost no pass and no copy, but some arithmetic).
        pool: memory for copies of the weights, if it is kept from step to step.

    Attributes:
        evaluations: how many times the window was passed through so far; a part counts as its share.
        metrics: what was measured of the last shift, 0-dim tensors by name.
        slope: <g, e>, noted by the perturbation while both are known.
        doubt: a 0-dim tensor, 0 or NaN, that is added to the gradient handed over: NaN if something that the method
            used besides its evaluations was not finite.
    """

    def __init__(
        self, host: Host, batches: Sequence[Any] = (), measuring: bool = False, pool: Pool | None = None
    ) -> None:
        super().__init__(host)
        self.batches = list(batches)
        self.measuring = measuring
        self._pool = Pool() if pool is None else pool
        self.opening = Opening()
        self.evaluations = 0.0
        self.metrics: dict[str, Tensor] = {}
        self.slope: Tensor | None = None
        self.doubt: Tensor | None = None
        self._records: list[tuple[RandomState, list[int]]] = []
        self._losses: list[Tensor] = []
        self._first: Evaluation | None = None
        self._lacking: set[str] = set()
        self._here: Tensor | None = None
        self._there: Evaluation | None = None
        self._devices = {p.device for p in host.parameters.values() if p.device.type != "cpu"}

    def first_pass(self, batch: Any) -> Tensor:
        """One micro-batch of the step's first evaluation, called by the door in the host's own context.

        Args:
            batch: the next micro-batch of the window, as the host gives it.

        Returns:
            The loss that the host logs.
        """
        self.batches[len(self._records)] = batch
        self._records.append((RandomState.record(self._devices), rows.versions(batch)))
        with nullcontext() if self.opening.shift is None else self.shifted(self.opening.shift):
            self._losses.append(self.host.backward(batch, self._parameters(self.opening.only)))
        return self._losses[-1]

    def evaluate(self, fraction: float = 1.0, only: Names | None = None) -> Evaluation:
        """The loss and gradient at the present weights.

        Args:
            fraction: the share of the window to use: whole micro-batches if it has several, else rows of the batch
                (whose dropout masks are their own). Such an evaluation never counts as the step's first one and
                leaves the random streams alone. Its loss is normalised as if its part were the window.
            only: names of the parameters whose gradient is needed; the weight-gradient work of the others is skipped
                where the host allows it. None for all.

        Returns:
            The evaluation; its gradient is None outside `only` and where the loss does not reach.

        Raises:
            ValueError: if `fraction` is not in (0, 1].
            RuntimeError: if the first evaluation was opened for fewer parameters than are now asked for.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is a share of the window in (0, 1]; got {fraction}.")
        self._collect_first()
        if fraction < 1:
            return self._evaluate_part(fraction, only)
        if self._first is None:
            return self._replay(self.batches, only)
        opened = self.opening.only
        if opened is not None and (only is None or not set(only) <= set(opened)):
            raise RuntimeError("The first evaluation gives the gradient that `Method.start` opened it for, no more.")
        first, self._first, self._there = self._first, None, None
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
                self._repeat_draws(index)
                terms.append(reduce(self.host.forward(batch), batch))
        return sum(terms[1:], start=terms[0])

    def row_gradients(self, samples: int) -> Iterator[ParamVector]:
        """The gradient of each of the window's first rows by itself, in evaluation mode, on this rank.

        Args:
            samples: how many rows at most.

        Yields:
            One gradient a row, loss-scaled; random streams, buffers and modes are left alone.
        """
        self._collect_first()
        modes = [(module, module.training) for module in self.host.model.modules()]
        size = sum(rows.count(batch) for batch in self.batches)
        singles = (rows.part(b, slice(i, i + 1)) for b in self.batches for i in range(rows.count(b)))
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

    def mean_over_ranks(self, vector: ParamVector) -> ParamVector:
        """The mean of a vector over all ranks.

        Args:
            vector: one that this rank has by itself, with tensors for the same parameters on every rank.

        Returns:
            The mean, equal on all ranks.
        """
        means = iter(self.host.mean_over_ranks(vector.present()))
        return vector.map(lambda _: next(means))

    @contextmanager
    def shifted(self, epsilon: ParamVector) -> Iterator[None]:
        """While open, the weights are shifted by epsilon; afterwards they are bitwise what they were.

        Only what epsilon has tensors for is copied and moved. Epsilon is not kept: if the caller keeps none either,
        its memory is free during the evaluations inside.

        Args:
            epsilon: the perturbation.

        Yields:
            Nothing.
        """
        where = [index for index, step in enumerate(epsilon.tensors) if step is not None]
        weights, steps = self._at(where), epsilon.present()
        del epsilon
        with displaced(weights, self._pool) as saved:
            with torch.no_grad():
                move_(weights, steps)
            if self.measuring:
                self.metrics |= realised(weights, saved, steps)
            del steps
            torch.clear_autocast_cache()  # inside an outer autocast region, casts of the old weights live on
            self._there = None
            yield
            if self.measuring and self._there is not None:
                self._measure(self._there, where, weights, saved)

    @contextmanager
    def at(self, weights: ParamVector) -> Iterator[None]:
        """While open, the weights are the given ones, exactly; afterwards bitwise what they were.

        Args:
            weights: the values; None leaves a parameter where it is.

        Yields:
            Nothing.
        """
        present = self._at([index for index, value in enumerate(weights.tensors) if value is not None])
        with displaced(present, self._pool):
            with torch.no_grad():
                copy_(present, weights.present())
            torch.clear_autocast_cache()
            yield

    def hand_over(self, evaluation: Evaluation) -> ParamVector:
        """Write the gradient where the host looks for it, as if one ordinary backward had left it there.

        Args:
            evaluation: what the method returned.

        Returns:
            The gradient that was written.
        """
        grad, doubt = evaluation.grad, self.doubt
        if doubt is not None:
            grad = grad.map(lambda t: t + doubt.to(t.device, t.dtype))
        for parameter, tensor in zip(self.host.parameters.values(), grad.tensors, strict=True):
            parameter.grad = None if tensor is None else tensor.to(parameter.dtype)
        return grad

    def clean(self) -> None:
        """Drop all gradients, as before an evaluation or after a step that failed."""
        for parameter in self.host.model.parameters():
            parameter.grad = None

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

    def _at(self, where: list[int]) -> list[nn.Parameter]:
        parameters = list(self.host.parameters.values())
        return [parameters[index] for index in where]

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

    def _collect_first(self) -> None:
        if self._losses:
            self._first = Evaluation(total(self._losses), self._gather(self.opening.only))
            pairs = zip(self.names, self._first.grad.tensors, strict=True)
            self._lacking = {n for n, g in pairs if g is None and n in (self.opening.only or ())}
            self._here = self._first.loss if self.opening.shift is None else None
            self._losses = []

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        with streams_kept(self._devices), buffers_kept(self.host.model):
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

    def _replay(self, batches: Sequence[Any], only: Names | None, repeat: bool = True) -> Evaluation:
        towards, losses = self._parameters(only), []
        self.clean()
        with self._without_trace():
            for index, batch in enumerate(batches):
                if repeat:
                    self._repeat_draws(index)
                with nullcontext() if index == len(batches) - 1 else self.host.unsynced():
                    losses.append(self.host.backward(batch, towards))
        self.evaluations += len(batches) / len(self.batches)
        evaluation = Evaluation(total(losses), self._gather(only))
        if only is None and self._lacking:
            self._look_for_lost(evaluation.grad)
        self._there = evaluation if self.measuring else None
        return evaluation

    def _look_for_lost(self, grad: ParamVector) -> None:
        """A parameter with a gradient in the full backward, and none in the subset's, was lost by the latter."""
        lost = [n for n, g in zip(self.names, grad.tensors, strict=True) if g is not None and n in self._lacking]
        if lost:
            self.host.refuse_subsets(f"a backward towards a subset gave {', '.join(lost[:3])} no gradient")

    def _evaluate_part(self, fraction: float, only: Names | None) -> Evaluation:
        several, before = len(self.batches) > 1, self.evaluations
        if several:
            share = max(1, round(fraction * len(self.batches))) / len(self.batches)
            part = self.batches[: round(share * len(self.batches))]
        else:
            size = rows.count(self.batches[0])
            share = max(1, round(fraction * size)) / size
            part = [rows.part(self.batches[0], slice(round(share * size)))]
        with self.host.window(part):
            evaluation = self._replay(part, only, repeat=several)
        self.evaluations, self._there = before + share, None
        return evaluation

    def _measure(self, there: Evaluation, where: list[int], weights: list[nn.Parameter], saved: list[Tensor]) -> None:
        grads = [there.grad.tensors[index] for index in where]
        self.metrics["sharp_cos"], along, squared = seen(weights, saved, grads, there.grad)
        if self.slope is not None:
            bend = (along - self.slope) / squared / self.loss_scale
            self.metrics["sharp_kappa"] = torch.where(squared == 0, torch.zeros_like(bend), bend)
        if self._here is not None:
            self.metrics["sharp_gap"] = there.loss - self._here
        self._there = None
