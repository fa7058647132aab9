"""The step engine: a `Landscape` answers what the loss and its gradient are, here or at a shifted point.

The contract, which every method and every door relies on:

1. `evaluate()` is the loss and gradient over the whole accumulation window at the present weights, with the host's own
   loss, scaling, autocast and reduction. The first evaluation of a step is made by the host's own micro-batch calls
   (`first_pass`), so that its logs are the host's; it moves random streams and buffers on as one plain backward would.
   Later evaluations replay the streams of the first, micro-batch by micro-batch, and leave streams and buffers alone.
   Afterwards every `p.grad` is None. (All this is `hf_sharp._engine.passes`.)
2. `shifted(epsilon)` adds epsilon to the weights, in place in their storage, and copies the old weights back at the
   end: bitwise, also after an exception, an out-of-memory error or Ctrl-C.
3. Nothing here waits for the device, and nothing branches on a number that only the device knows: inf and NaN flow
   through the passes to the gradient handed over, where the host's scaler sees them. (With a scaler, which waits
   itself, the stepper waits in steps that changed the method's state.)
4. `hand_over(evaluation)` writes `p.grad` as if one ordinary backward had run: scaled as the host expects, None where
   no gradient came.

Within a step gradients are loss-scaled as the host's are. What is not homogeneous of degree one in the gradient, or is
kept from step to step, divides by `loss_scale`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.host import Host
from hf_sharp._engine.passes import Passes
from hf_sharp._engine.rounding import cast_by_autocast, move_rounded_
from hf_sharp._engine.shift import Pool, displaced, realised, seen
from hf_sharp._engine.terms import TermHost, part_of
from hf_sharp._tensors.shards import shard_of
from hf_sharp._tensors.vector import ParamVector, copy_, move_, total


class Landscape(Passes):
    """The loss around the present weights for one accumulation window.

    Args:
        host: the training loop this stands in.
        batches: the window's micro-batches; empty when only facts are asked for.
        measuring: whether this step's metrics are wanted (they cost no pass and no copy, but some arithmetic).
        pool: memory for copies of the weights, if it is kept from step to step.
        size: how many micro-batches the window will have; None for as many as are given.

    Attributes:
        rounding: how shifts are added where a forward sees 16-bit weights: "stochastic" or "nearest".
        metrics: what was measured of the last shift, 0-dim tensors by name.
        slope: <g, e>, noted by the perturbation while both are known.
        doubt: a 0-dim tensor, 0 or NaN, that is added to the gradient handed over: NaN if something that the method
            used besides its evaluations was not finite.
        losses: with named terms, what the host logged for each so far, without its weight.
    """

    def __init__(
        self,
        host: Host,
        batches: Sequence[Any] = (),
        measuring: bool = False,
        pool: Pool | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__(host, batches, size)
        self.measuring = measuring
        self._pool = Pool() if pool is None else pool
        self.rounding = "stochastic"
        self._shifts, self._collected = 0, False
        self.metrics: dict[str, Tensor] = {}
        self.slope: Tensor | None = None
        self.doubt: Tensor | None = None
        self.losses: dict[str, Tensor] = {}
        self._terms: dict[str, Landscape] = {}
        self._partial: list[Tensor | None] | None = None
        self._here: Tensor | None = None
        self._there: Evaluation | None = None

    def __getitem__(self, term: str) -> Landscape:
        """The landscape of one named term of the loss, for batches that are dicts of batches.

        Args:
            term: its name.

        Returns:
            A landscape with the same verbs, over that part of the window.
        """
        if term not in self._terms:
            batches = [part_of(batch, term) for batch in self.batches]
            self._terms[term] = Landscape(TermHost(self.host, batches, term), batches, self.measuring, self._pool)
            self._terms[term].rounding = self.rounding
        return self._terms[term]

    def first_pass(self, batch: Any) -> Tensor:
        """One micro-batch of the step's first evaluation; with named terms, each term's in turn.

        Args:
            batch: the next micro-batch of the window, as the host gives it.

        Returns:
            The loss that the host logs.
        """
        if self.plan.terms is None:
            return super().first_pass(batch)
        losses = []
        for term, weight in self.plan.terms.items():
            loss = self[term]._first_pass_apart(part_of(batch, term))
            self.losses[term] = self.losses[term] + loss if term in self.losses else loss
            losses.append(weight * loss)
        return total(losses)

    def close(self) -> None:
        """Let go of the window and of what the method asked for, which refers back to this landscape."""
        self.plan, self.batches = FirstPass(), []
        for landscape in self._terms.values():
            landscape.close()
        self._terms = {}

    def measured(self) -> dict[str, Tensor | float]:
        """What this step measured.

        Returns:
            The metrics and `sharp_evaluations`; those of a term end in its name.
        """
        metrics: dict[str, Tensor | float] = dict(self.metrics)
        evaluations = self.evaluations
        for term, landscape in self._terms.items():
            inner = landscape.measured()
            evaluations += float(inner.pop("sharp_evaluations")) / len(self._terms)
            metrics |= {f"{name}_{term}": value for name, value in inner.items()}
        return {**metrics, "sharp_evaluations": evaluations}

    @contextmanager
    def shifted(self, epsilon: ParamVector) -> Iterator[None]:
        """While open, the weights are shifted by epsilon; afterwards they are bitwise what they were.

        Only what epsilon has tensors for is copied and moved. Epsilon is not kept: if the caller keeps none either, or
        has given it up, its memory is free during the evaluations inside.

        Args:
            epsilon: the perturbation.

        Yields:
            Nothing.
        """
        where = [index for index, step in enumerate(epsilon.tensors) if step is not None]
        weights, steps = self._at(where), epsilon.present()
        if epsilon.donated:
            epsilon.tensors = [None] * len(epsilon.tensors)
        del epsilon
        grids = self._grids(weights)
        with self._displaced(weights) as saved:
            self._move(weights, steps, grids, [self.names[index] for index in where])
            if self.measuring:
                self.metrics |= realised(weights, saved, steps, grids)
            del steps
            self._there = None
            self._moved()
            yield
            if self.measuring and self._there is not None:
                self._measure(self._there, where, weights, saved, grids)
        self._there = self.slope = None
        self._shifts += 1 if self._collected else 0

    @contextmanager
    def at(self, weights: ParamVector) -> Iterator[None]:
        """While open, the weights are the given ones, exactly; afterwards bitwise what they were.

        Args:
            weights: the values; None leaves a parameter where it is.

        Yields:
            Nothing.
        """
        present = self._at([index for index, value in enumerate(weights.tensors) if value is not None])
        with self._displaced(present):
            with torch.no_grad():
                copy_(present, weights.present())
            self._moved()
            yield

    @contextmanager
    def _displaced(self, weights: list[nn.Parameter]) -> Iterator[list[Tensor]]:
        try:
            with displaced(weights, self._pool) as saved:
                yield saved
        finally:
            self._moved()

    def _moved(self) -> None:
        """What forwards remember of the old weights is let go: casts of an outer autocast region, gathered shards."""
        torch.clear_autocast_cache()
        self.host.reshard()

    @contextmanager
    def restored(self, weights: Sequence[nn.Parameter]) -> Iterator[None]:
        """While open, these may be changed in place, frozen ones too; afterwards they are bitwise what they were.

        Args:
            weights: parameters of the model.

        Yields:
            Nothing.
        """
        with self._displaced(list(weights)):
            yield

    def hand_over(self, evaluation: Evaluation) -> ParamVector:
        """Write the gradient where the host looks for it, as if one ordinary backward had left it there.

        Args:
            evaluation: what the method returned.

        Returns:
            The gradient that was written.
        """
        grad = evaluation.grad
        for doubt in [s.doubt for s in (self, *self._terms.values()) if s.doubt is not None]:
            grad = grad.map(lambda t, doubt=doubt: t + doubt.to(t.device, t.dtype))
        for parameter, tensor in zip(self.host.parameters.values(), grad.tensors, strict=True):
            parameter.grad = None if tensor is None else tensor.to(parameter.dtype)
        return grad

    def _opened(self) -> Any:
        shift = self.plan.shift
        if self._current + 1 == self.size:
            self.plan = self.plan._replace(shift=None)  # its memory is free while the last pass runs
        return nullcontext() if shift is None else self.shifted(shift() if callable(shift) else shift)

    def _first_pass_apart(self, batch: Any) -> Tensor:
        """A first pass whose gradients are kept out of the way of other terms'."""
        self._put_partial()
        with self.host.synced() if self.host.sharded else nullcontext():  # unreduced, they would mix with other terms'
            loss = self.first_pass(batch)
        self._partial = [p.grad for p in self.host.parameters.values()]
        self.clean()
        return loss

    def _put_partial(self) -> None:
        if self._partial is not None:
            for parameter, grad in zip(self.host.parameters.values(), self._partial, strict=True):
                parameter.grad = grad
            self._partial = None

    def _collect_first(self) -> None:
        self._put_partial()
        fresh = bool(self._losses)
        super()._collect_first()
        if fresh and self._first is not None:
            self._collected = True
            self._shifts += 1
            self._here = self._first.loss if self._first.grad.fresh else None

    def _note(self, evaluation: Evaluation | None) -> None:
        self._there = evaluation if self.measuring else None

    def _grids(self, weights: list[nn.Parameter]) -> list[torch.dtype | None]:
        """The 16-bit format in which a forward sees each weight, None where it sees all of it."""
        cast = set() if self.autocast is None else cast_by_autocast(self.modules.values())
        grids = []
        for weight in weights:
            dtype = self.host.seen_in(weight) or weight.dtype
            narrow = dtype if dtype.itemsize == 2 else None
            grids.append(narrow or (self.autocast if id(weight) in cast else None))
        return grids

    @torch.no_grad()
    def _move(
        self,
        weights: list[nn.Parameter],
        steps: list[Tensor],
        grids: list[torch.dtype | None],
        names: list[str],
    ) -> None:
        """Add the steps; where a forward sees 16 bits, rounded at random so that it sees them whole on average."""
        rounded = [grid is not None and self.rounding == "stochastic" for grid in grids]
        plain = [(w, s) for w, s, r in zip(weights, steps, rounded, strict=True) if not r]
        move_([w for w, _ in plain], [s for _, s in plain])
        for weight, step, grid, name in zip(weights, steps, grids, names, strict=True):
            if grid is not None and self.rounding == "stochastic":
                generator = self.random(f"round/{self._shifts}/{name}{shard_of(weight)}", weight.device)
                move_rounded_(weight, step, grid, generator)

    def _at(self, where: list[int]) -> list[nn.Parameter]:
        parameters = list(self.host.parameters.values())
        return [parameters[index] for index in where]

    def _measure(
        self,
        there: Evaluation,
        where: list[int],
        weights: list[nn.Parameter],
        saved: list[Tensor],
        grids: list[torch.dtype | None],
    ) -> None:
        grads = [there.grad.tensors[index] for index in where]
        self.metrics["sharp_cos"], along, squared = seen(weights, saved, grads, there.grad, grids)
        if self.slope is not None:
            bend = (along - self.slope) / squared / self.loss_scale
            self.metrics["sharp_kappa"] = torch.where(squared == 0, torch.zeros_like(bend), bend)
        if self._here is not None:
            self.metrics["sharp_gap"] = there.loss - self._here
