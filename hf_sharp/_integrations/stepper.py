"""`Stepper`: runs a method over one window after another, for every integration alike."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_sharp._engine import gradients
from hf_sharp._engine.evaluation import Action, Evaluation
from hf_sharp._engine.host import Host
from hf_sharp._engine.landscape import Landscape
from hf_sharp._engine.resources import Resources
from hf_sharp._engine.switches import Switches
from hf_sharp._methods.base import Method
from hf_sharp._methods.own import settings_stay
from hf_sharp._perturbation.part import State
from hf_sharp._tensors.vector import ParamVector

TWICE = (
    "training_step was called {given} times for a window of {announced} micro-batches: a class above hf_sharp's "
    "passes a micro-batch more than once, which would be taken for micro-batches of their own. Put the method on top "
    "of your class: make_sharp(YourTrainer)(..., method=...)."
)


class Stepper:
    """One step's gradient after another: the host's micro-batch calls go in, `p.grad` is ready after the last.

    Args:
        method: the rule for getting a gradient.
        host: the training loop.
        rounding: how shifts are added where a forward sees 16-bit weights: "stochastic" or "nearest".
        check_repeats: whether the first step of a method of several passes makes sure that a pass can be repeated.

    Attributes:
        metrics: what was measured since they were last taken, 0-dim tensors by name: of each the last, and as
            `sharp_evaluations` the mean over the measured steps.
        losses: with named terms, what the host logged for each in the last finished step, without its weight.
    """

    def __init__(self, method: Method, host: Host, rounding: str = "stochastic", check_repeats: bool = False) -> None:
        self.method = method
        self.host = host
        self.metrics: dict[str, Tensor | float] = {}
        self.losses: dict[str, Tensor] = {}
        self._resources = Resources(host, rounding)
        self._check = check_repeats and method.cost > 1
        parts = [part for _, part in method.named_parts()]
        self._asks = any(p.weighs for p in parts) and not any("terms" in p.needs for p in parts)
        self._measured = 0
        self._batches: list[Any] = []
        self._size: int | None = None
        self._given = self._announced = 0  # how many micro-batches of how many
        self._finished = False  # whether the announced window was
        self._landscape: Landscape | None = None
        self._before: dict[str, State] = {}
        self._clipped = False  # whether that was said
        self._left: gradients.Left | None = None  # in p.grad, by the last micro-batch
        self._earlier: ParamVector | None = None  # what was in p.grad before the window
        self._actions: tuple[Action | None, Action | None] = (None, None)

    # --- the window --------------------------------------------------------------------------------------------------

    def begin_window(self, batches: Sequence[Any], size: int | None = None) -> None:
        """Say which micro-batches come next.

        They make a window of their own, unless the host has not made its optimizer step on those before: then they
        belong to the same step, as the host's gradients do (a data stream's end leaves such a rest).

        Args:
            batches: the micro-batches, which `micro_batch` will be given one by one, or the first of them.
            size: how many there will be; None for as many as are given.
        """
        if self._landscape is not None:
            self._landscape.extend(batches, size)
        self._batches, self._size, self._given, self._finished = list(batches), size, 0, False
        self._announced = len(self._batches)

    @property
    def open(self) -> bool:
        """Whether a window has begun that was not finished yet."""
        return self._landscape is not None

    @property
    def expects_more(self) -> bool:
        """Whether the announced window has micro-batches that were not given yet."""
        return self._given < len(self._batches)

    def micro_batch(self, batch: Any, last: bool, measuring: bool = False) -> Tensor:
        """One micro-batch of the window; at the last one the method runs and its gradient is handed over.

        After an exception, Ctrl-C at any point included, weights, buffers and other state of the forward, switches of
        torch and the method's memory are what they were before the window, and no gradients are left. The random
        streams stay where the passes have left them.

        Args:
            batch: the next micro-batch, the announced object or what the host made of it.
            last: whether the host makes its optimizer step after this one.
            measuring: whether this step's metrics are wanted.

        Returns:
            The loss that the host logs.
        """
        switches = Switches.record()
        try:
            landscape = self._continue() or self._open(batch, measuring)
            loss = landscape.first_pass(batch, last)
            self._given += 1
            if last:
                self._finish(landscape)
            else:
                self._left = gradients.left(landscape.facts.parameters.values())
        except BaseException:
            self._abandon()
            switches.restore()
            raise
        return loss

    def single_micro_batch(self, batch: Any, measuring: bool = False) -> Tensor:
        """A micro-batch that no window announced: a step of its own, whose gradient adds to what is there already.

        Args:
            batch: the micro-batch.
            measuring: whether this step's metrics are wanted.

        Returns:
            The loss that the host logs.

        Raises:
            RuntimeError: if a window was announced, and has had all its micro-batches.
        """
        if self._landscape is not None or self._finished:
            raise RuntimeError(TWICE.format(given=self._given + 1, announced=self._announced))
        outside = self._outside()
        earlier = [p.grad for p in outside]
        gradients.clear(outside)
        self.begin_window([batch])
        loss = self.micro_batch(batch, last=True, measuring=measuring)
        for parameter, grad in zip(outside, earlier, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        self._finished = False
        return loss

    def _outside(self) -> list[nn.Parameter]:
        """Parameters whose gradients no landscape takes away: the model's that the optimizer lacks."""
        facts = self.host.facts()
        inside = {id(p) for p in facts.parameters.values()}
        return [p for p in (*self.host.model.parameters(), *facts.added.values()) if id(p) not in inside]

    def _say_clipped(self) -> None:
        if not self._clipped:
            self._clipped = True
            warnings.warn(
                "Gradients were clipped between two micro-batches of a window. Only the last clipping counts for the "
                "method's gradient; the others shorten what the first pass of a step has gathered so far. Clip where "
                "the optimizer steps: if accelerator.sync_gradients: accelerator.clip_grad_norm_(...).",
                stacklevel=4,
            )

    def _continue(self) -> Landscape | None:
        """The open window's landscape, if the gradients are still what the last micro-batch left."""
        landscape, left = self._landscape, self._left
        if landscape is None or left is None:
            return None
        parameters = landscape.facts.parameters.values()
        if gradients.mark(parameters) == left.mark:
            return landscape
        if gradients.is_clipped(left, parameters):
            self._say_clipped()
            return landscape
        if all(p.grad is None for p in parameters):  # the host has dropped them, and so begins anew
            self.method.rollback(self._before)
            self._forget_window()
            return None
        raise RuntimeError(
            "Gradients were changed between two micro-batches of a window (by a callback, for one), which further "
            "passes cannot repeat. Change the loss instead, or the gradient in on_pre_optimizer_step."
        )

    def _open(self, batch: Any, measuring: bool) -> Landscape:
        self._before, self._actions = self.method.snapshot(), (None, None)
        if self._asks:
            Landscape(self.host, self._batches, resources=self._resources).find_inflation(batch)
            self._asks = False
        landscape = Landscape(self.host, self._batches, measuring, self._resources, self._size)
        self._landscape = landscape
        gradients.clear(landscape.facts.added.values())  # no loop clears these, and at some steps they get none
        self._take_earlier(landscape)
        with settings_stay(self.method):
            for _, part in self.method.named_parts():
                part.begin(landscape)
            landscape.plan = self.method.plan_first_pass(landscape)
        return landscape

    def _take_earlier(self, landscape: Landscape) -> None:
        """What somebody has put into p.grad before the window is added once to what is handed over."""
        self._earlier = None
        if self.host.accumulates and any(p.grad is not None for p in landscape.facts.parameters.values()):
            earlier = gradients.collect(landscape.facts, None, copied=not self.host.keeps_gradients)
            self._earlier = earlier if landscape.facts.sharded else landscape.ranks.mean(earlier)

    def _finish(self, landscape: Landscape) -> None:
        if self._check:
            self._check = False
            landscape.compare_repetition()
        with settings_stay(self.method):
            evaluation = checked(self.method.gradient(landscape), self.method)
        if self._earlier is not None:
            evaluation = evaluation.with_grad(evaluation.grad.add(self._earlier))
        grad = landscape.hand_over(evaluation)
        self._actions = (evaluation.before_update, evaluation.after_update)
        if self.method.changed_since(self._before) and self._overflowed(grad):
            self.method.rollback(self._before)  # the host will skip this step
        if landscape.measuring:
            self._measure({**landscape.metrics, **evaluation.metrics, "sharp_evaluations": landscape.evaluations})
        self.losses = landscape.losses
        self._forget_window()
        self._batches, self._finished = [], True

    def _forget_window(self) -> None:
        if self._landscape is not None:
            self._landscape.close()
        self._landscape, self._before, self._left, self._earlier = None, {}, None, None

    def _abandon(self) -> None:
        """The window has failed: everything but the random streams is again as it was before it."""
        self._resources.undo.everything()
        if self._landscape is not None:
            self.method.rollback(self._before)
            self._landscape.abandon()
        self._forget_window()
        self._batches, self._given, self._finished, self._actions = [], 0, False, (None, None)

    def _overflowed(self, grad: ParamVector) -> bool:
        """Whether the host will skip the step. Without a scaler none does, and asking a device would wait for it."""
        norm = grad.norm()
        return (self.host.facts().skips_overflows or norm.device.type == "cpu") and not bool(norm.isfinite())

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _measure(self, measured: dict[str, Tensor | float]) -> None:
        total = measured["sharp_evaluations"] + self.metrics.get("sharp_evaluations", 0.0) * self._measured
        self._measured += 1
        self.metrics = {**self.metrics, **measured, "sharp_evaluations": total / self._measured}

    def pop_metrics(self) -> dict[str, Tensor | float]:
        """The metrics, which begin anew.

        Returns:
            What was measured since this was last called.
        """
        metrics, self.metrics, self._measured = self.metrics, {}, 0
        return metrics

    # --- around the optimizer's update -------------------------------------------------------------------------------

    def before_update(self) -> None:
        """What the last gradient's method wants done right before the optimizer's update; at most once a gradient.

        Raises:
            RuntimeError: if the optimizer steps in the middle of a window.
        """
        if self._landscape is not None:
            given, size = self._landscape.window.passed, self._landscape.window.size
            self._abandon()
            raise RuntimeError(
                f"The optimizer steps after {given} of {size} micro-batches of a window, before the method has run: "
                "the gradient would be the plain one. Give every micro-batch to the method, also the last one, or "
                "drop the window's gradients with zero_grad() and begin a new one."
            )
        (before, after) = self._actions
        self._actions = (None, after)
        if before is not None:
            before()

    def after_update(self) -> None:
        """What it wants done right after the update; at most once a gradient."""
        (_, after), self._actions = self._actions, (None, None)
        if after is not None:
            after()

    def end(self) -> None:
        """Training has ended: nothing is announced any more, and what was not finished is forgotten.

        What first passes of an unfinished window moved (BatchNorm's statistics) stays moved, as in plain training.
        """
        if self._landscape is not None:
            self.method.rollback(self._before)
            self._landscape.clear()
        self._forget_window()
        self._batches, self._given, self._finished, self._actions = [], 0, False, (None, None)


def checked(evaluation: Any, method: Method) -> Evaluation:
    """What a method's `gradient` returned.

    Args:
        evaluation: that.
        method: the method.

    Returns:
        The evaluation.

    Raises:
        TypeError: if it is none, saying what to write.
    """
    if isinstance(evaluation, Evaluation):
        return evaluation
    raise TypeError(
        f"{type(method).__name__}.gradient returned {type(evaluation).__name__}, and must return an Evaluation: what "
        "landscape.evaluate() gave, or here.with_grad(vector) for another gradient with the loss of here."
    )
