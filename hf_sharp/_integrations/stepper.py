"""`Stepper`: runs a method over one window after another, for every door alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_sharp._engine.evaluation import Action
from hf_sharp._engine.host import Host
from hf_sharp._engine.landscape import Landscape
from hf_sharp._engine.rounding import CHOICES
from hf_sharp._engine.shift import Pool
from hf_sharp._methods.base import Method
from hf_sharp._perturbation.part import State
from hf_sharp._tensors.vector import ParamVector


class Stepper:
    """One step's gradient after another: the host's micro-batch calls go in, `p.grad` is ready after the last.

    Args:
        method: the rule for getting a gradient.
        host: the training loop.
        rounding: how shifts are added where a forward sees 16-bit weights: "stochastic" or "nearest".

    Attributes:
        metrics: what was measured since they were last taken, 0-dim tensors by name: of each the last, and as
            `sharp_evaluations` the mean over the measured steps.
        losses: with named terms, what the host logged for each in the last finished step, without its weight.
    """

    def __init__(self, method: Method, host: Host, rounding: str = "stochastic") -> None:
        if rounding not in CHOICES:
            raise ValueError(f"rounding is one of {', '.join(CHOICES)}; got {rounding!r}.")
        self.rounding = rounding
        self.method = method
        self.host = host
        self.metrics: dict[str, Tensor | float] = {}
        self.losses: dict[str, Tensor] = {}
        self._measured = 0
        self._pool = Pool()
        self._batches: list[Any] = []
        self._next = 0
        self._size: int | None = None
        self._landscape: Landscape | None = None
        self._before: dict[str, State] = {}
        self._actions: tuple[Action | None, Action | None] = (None, None)

    def expect(self, batches: Sequence[Any], size: int | None = None) -> None:
        """Say which micro-batches the next step's window has; a step that was not finished is forgotten.

        Args:
            batches: the micro-batches, which `micro_batch` will be given one by one, or the first of them.
            size: how many there will be; None for as many as are given.
        """
        if self._landscape is not None:
            self.method.rollback(self._before)
        self._batches, self._next, self._landscape, self._size = list(batches), 0, None, size

    @property
    def open(self) -> bool:
        """Whether a window has begun that was not finished yet."""
        return self._landscape is not None

    @property
    def expects_more(self) -> bool:
        """Whether the announced window has micro-batches that were not given yet."""
        return self._next < len(self._batches)

    def micro_batch(self, batch: Any, last: bool, measuring: bool = False) -> Tensor:
        """One micro-batch of the window; at the last one the method runs and its gradient is handed over.

        After an exception weights, buffers and the method's state are what they were, and no gradients are left.

        Args:
            batch: the next micro-batch, the announced object or what the host made of it.
            last: whether the host makes its optimizer step after this one.
            measuring: whether this step's metrics are wanted.

        Returns:
            The loss that the host logs.
        """
        try:
            landscape = self._landscape or self._open(measuring)
            loss = landscape.first_pass(batch)
            self._next += 1
            if last:
                self._finish(landscape)
        except BaseException:
            self._abandon()
            raise
        return loss

    def _open(self, measuring: bool) -> Landscape:
        self._before, self._actions = self.method.snapshot(), (None, None)
        for parameter in self.host.added.values():
            parameter.grad = None  # no loop clears these, and at some steps a combinator leaves them out
        self._landscape = Landscape(self.host, self._batches, measuring, self._pool, self._size)
        self._landscape.rounding = self.rounding
        for _, part in self.method.named_parts():
            part.begin(self._landscape)
        self._landscape.plan = self.method.plan_first_pass(self._landscape)
        return self._landscape

    def _finish(self, landscape: Landscape) -> None:
        evaluation = self.method.gradient(landscape)
        grad = landscape.hand_over(evaluation)
        self._actions = (evaluation.before_update, evaluation.after_update)
        if self.method.changed_since(self._before) and self._overflowed(grad):
            self.method.rollback(self._before)  # the host will skip this step
        self._before = {}
        if landscape.measuring:
            self._measure(landscape.measured())
        self.losses = landscape.losses
        landscape.close()
        self._batches, self._next, self._landscape = [], 0, None

    def _measure(self, measured: dict[str, Tensor | float]) -> None:
        total = measured["sharp_evaluations"] + self.metrics.get("sharp_evaluations", 0.0) * self._measured
        self._measured += 1
        self.metrics = {**self.metrics, **measured, "sharp_evaluations": total / self._measured}

    def taken(self) -> dict[str, Tensor | float]:
        """The metrics, which begin anew.

        Returns:
            What was measured since this was last called.
        """
        metrics, self.metrics, self._measured = self.metrics, {}, 0
        return metrics

    def _overflowed(self, grad: ParamVector) -> bool:
        """Whether the host will skip the step. Without a scaler none does, and asking a device would wait for it."""
        norm = grad.norm()
        return (self.host.skips_overflows or norm.device.type == "cpu") and not bool(norm.isfinite())

    def before_update(self) -> None:
        """What the last gradient's method wants done right before the optimizer's update; at most once a gradient."""
        (before, after) = self._actions
        self._actions = (None, after)
        if before is not None:
            before()

    def after_update(self) -> None:
        """What it wants done right after the update; at most once a gradient."""
        (_, after), self._actions = self._actions, (None, None)
        if after is not None:
            after()

    def alone(self, batch: Any, measuring: bool = False) -> Tensor:
        """A micro-batch that no window announced: a step of its own, whose gradient adds to what is there already.

        Args:
            batch: the micro-batch.
            measuring: whether this step's metrics are wanted.

        Returns:
            The loss that the host logs.
        """
        parameters = [*self.host.model.parameters(), *self.host.added.values()]
        earlier = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        self.expect([batch])
        loss = self.micro_batch(batch, last=True, measuring=measuring)
        for parameter, grad in zip(parameters, earlier, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        return loss

    def _abandon(self) -> None:
        if self._landscape is not None:
            self._landscape.clean()
            self._landscape.close()
        self.expect([])
