"""Puts the weights somewhere else for a while: by a perturbation, or to given values; and measures what that was."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hf_sharp._engine.evaluation import Evaluation, Shift
from hf_sharp._engine.facts import StepFacts
from hf_sharp._engine.host import Host
from hf_sharp._engine.measure import Arrives, measure_gradient, measure_shift
from hf_sharp._engine.resources import Resources
from hf_sharp._engine.rounding import move_rounded_
from hf_sharp._engine.seen import seen_through, shift_seen
from hf_sharp._engine.weights import displaced
from hf_sharp._tensors.shards import shard_of
from hf_sharp._tensors.vector import ParamVector, copy_, move_


class Mover:
    """Moves the weights of one landscape.

    Args:
        host: the training loop.
        facts: of the step.
        resources: memory for copies, the list of what is out of its place, the rounding.
        measuring: whether this step's metrics are wanted.
        kept: a context in which nothing leaves a trace in random streams and state.

    Attributes:
        metrics: what was measured of the last shift, 0-dim tensors by name.
        there: the last evaluation of the whole window inside the innermost shift.
    """

    def __init__(
        self,
        host: Host,
        facts: StepFacts,
        resources: Resources,
        measuring: bool,
        kept: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._host, self._facts, self._resources, self._measuring = host, facts, resources, measuring
        self._kept = kept
        self.metrics: dict[str, Tensor] = {}
        self.there: Evaluation | None = None
        self._here: Tensor | None = None
        self._draw = 0  # of the random rounding: one for the first evaluation, then another for every shift

    def begin(self, here: Tensor | None) -> None:
        """The first evaluation is made: from now on every shift rounds by draws of its own.

        Args:
            here: the loss at the present weights, if it was made there.
        """
        self._here, self._draw = here, 1

    @contextmanager
    def shifted(self, shift: Shift | ParamVector) -> Generator[None]:
        """See `Landscape.shifted`; epsilon is not kept."""
        epsilon, slope = shift if isinstance(shift, Shift) else (shift, None)
        where = [index for index, step in enumerate(epsilon.tensors) if step is not None]
        names = [self._facts.names[index] for index in where]
        weights = [self._facts.parameters[name] for name in names]
        steps = epsilon.present()
        if epsilon.donated:
            epsilon.release()
        del shift, epsilon
        grids = [self._facts.grids.get(name) for name in names]
        with self.restored(weights) as saved:
            self._move(weights, steps, grids, names)
            if self._measuring:
                self.metrics |= measure_shift(weights, saved, steps, grids, self._through(weights))
            del steps
            self.there = None
            self._forget_old_weights()
            yield
            there, self.there = self.there, None
            if self._measuring and there is not None:
                grads = [there.grad.tensors[index] for index in where]
                self._note(there, slope, measure_gradient(weights, saved, grads, there.grad, grids))
        self._draw += 1 if self._draw else 0

    @contextmanager
    def at(self, values: ParamVector) -> Generator[None]:
        """See `Landscape.at`."""
        pairs = zip(self._facts.parameters.values(), values.tensors, strict=True)
        present = [parameter for parameter, value in pairs if value is not None]
        with self.restored(present):
            with torch.no_grad():
                copy_(present, values.present())
            self._forget_old_weights()
            yield

    def restored(self, weights: Sequence[nn.Parameter]) -> AbstractContextManager[list[Tensor]]:
        """See `Landscape.restored`; it gives the copies."""
        return displaced(weights, self._resources.pool, self._resources.undo, self._forget_old_weights)

    def _forget_old_weights(self) -> None:
        """Casts of an outer autocast region and gathered shards are of the weights of before."""
        torch.clear_autocast_cache()
        self._host.reshard()

    @torch.no_grad()
    def _move(
        self,
        weights: list[nn.Parameter],
        steps: list[Tensor],
        grids: list[torch.dtype | None],
        names: list[str],
    ) -> None:
        """Add the steps; where a forward sees 16 bits, rounded at random so that it sees them whole on average."""
        by_chance = self._resources.rounding == "stochastic"
        each = list(zip(weights, steps, grids, names, strict=True))
        plain = [(weight, step) for weight, step, grid, _ in each if grid is None or not by_chance]
        move_([weight for weight, _ in plain], [step for _, step in plain])
        for weight, step, grid, name in each:
            if grid is not None and by_chance:
                tag = f"round/{self._draw}/{name}{shard_of(weight)}"
                move_rounded_(weight, step, grid, self._facts.random(tag, weight.device))

    def _through(self, weights: Sequence[nn.Parameter]) -> list[Arrives | None]:
        """For each weight that a forward sees through a function (a quantiser), what measures its shift."""
        seen = seen_through(self._host.model.modules())
        functions = [seen[id(weight)].function if id(weight) in seen else None for weight in weights]
        return [None if f is None else partial(shift_seen, f, kept=self._kept) for f in functions]

    def _note(self, there: Evaluation, slope: Tensor | None, seen: tuple[Tensor, Tensor, Tensor]) -> None:
        self.metrics["sharp_cos"], along, squared = seen
        if slope is not None:
            bend = (along - slope) / squared / self._facts.loss_scale
            self.metrics["sharp_kappa"] = torch.where(squared == 0, torch.zeros_like(bend), bend)
        if self._here is not None:
            self.metrics["sharp_gap"] = there.loss - self._here
