"""`SharpStep`: a sharpness-aware method in a hand-written Accelerate loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from hf_sharp._engine.evaluation import Hook
from hf_sharp._engine.landscape import Landscape
from hf_sharp._integrations.accelerate_host import AcceleratorHost, Schedule
from hf_sharp._integrations.attachment import Attachment, base_of
from hf_sharp._integrations.refusals import (
    check_method,
    refuse_accelerator,
    refuse_line_search,
    refuse_needs,
    refuse_static_graph,
)
from hf_sharp._integrations.states import load_state, state_of, step_of
from hf_sharp._integrations.stepper import Stepper
from hf_sharp._methods.base import Method, added_by
from hf_sharp._methods.own import check_is_method

LossFn = Callable[[Any, Any], Tensor]


class LoopHost(AcceleratorHost):
    """A loss function and an Accelerator as a `Host`.

    Args:
        model: the prepared model.
        optimizer: the prepared optimizer.
        accelerator: the Accelerator.
        loss_fn: from (model, batch) to the mean loss of a micro-batch.
    """

    def __init__(self, model: Any, optimizer: Any, accelerator: Accelerator, loss_fn: LossFn) -> None:
        super().__init__()
        self.wrapped, self._optimizer, self._accelerator, self._loss_fn = model, optimizer, accelerator, loss_fn
        self.step, self.seed = 0, 0
        self.total_steps: int | None = None
        self.warmup_steps: int | None = None
        self._largest = 0.0

    @property
    def accelerator(self) -> Accelerator:
        """The one that the loop was prepared by."""
        return self._accelerator

    @property
    def optimizer(self) -> Any:
        """The loop's prepared optimizer, in Accelerate's wrapper."""
        return self._optimizer

    @property
    def schedule(self) -> Schedule:
        """The steps that were counted, and the first group's learning rate."""
        first = self.groups[0]
        lr = float(first["lr"])
        self._largest = max(self._largest, lr)
        largest = float(first.get("initial_lr", self._largest))  # schedulers set it
        return Schedule(self.step, self.total_steps, self.warmup_steps, lr, largest, self.seed)

    @property
    def divisor(self) -> int:
        """What `accelerator.backward` divides the loss by."""
        return self.accelerator.gradient_accumulation_steps

    def normaliser(self, batches: Sequence[Any] | None) -> int:
        """The number of micro-batches that are divided by: the loop's, or as many as are given."""
        return self.divisor if batches is None else len(batches)

    def backward(
        self, batch: Any, normaliser: int, only: Sequence[nn.Parameter] | None, hook: Hook | None = None
    ) -> Tensor:
        """The loss function, then `accelerator.backward`."""
        loss, outputs = self._run(batch, keep=hook is not None)
        term = None if hook is None else hook(outputs, batch)
        if term is not None:
            loss = loss + term.to(loss.device) * (normaliser * self.ranks)
        towards = {"inputs": list(only)} if only is not None and self.subset_works({}) else {}
        with self._divided_by(normaliser):
            self.accelerator.backward(loss, **towards)
        return loss.detach() / normaliser

    def _divided_by(self, normaliser: int) -> AbstractContextManager[None]:
        """While open, Accelerate divides losses by another number than the loop's."""
        state = self.accelerator.gradient_state
        if normaliser == self.divisor:
            return nullcontext()
        return self.replaced(state, "plugin_kwargs", {**state.plugin_kwargs, "num_steps": normaliser})

    def forward(self, batch: Any) -> Any:
        """The outputs of the model inside the loss function; the last ones, if it calls the model several times."""
        return self._run(batch, keep=True)[1]

    def row_backward(self, row: Any) -> None:
        """The loss of one row, without a reduction over ranks."""
        with self.unsynced():
            self.accelerator.backward(self._run(row)[0] * self.divisor)

    def stateful(self) -> dict[str, object]:
        """The model, and the loss function if it is an object with attributes; what a function writes it writes."""
        objects = {} if isinstance(self._loss_fn, FunctionType) else {"loss_fn": self._loss_fn}
        return {"model": self.model, **objects}

    def _run(self, batch: Any, keep: bool = False) -> tuple[Tensor, Any]:
        with self.watched() if keep else nullcontext([]) as kept:
            loss = self._loss_fn(self.wrapped, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(
                f"loss_fn(model, batch) returns one loss, a tensor without dimensions, such as model(**batch).loss or "
                f"losses.mean(); got {loss!r}."
            )
        if keep and not kept:
            raise ValueError(
                "loss_fn did not call the model that it was given, so there are no outputs to look at. Call it "
                "there, or use a method of gradients alone, such as SAM."
            )
        return loss, kept[-1] if kept else None


class SharpStep:
    """Stands for `accelerator.backward` in a loop: the gradient it leaves is the method's.

    The rest of the loop stays: `accelerator.accumulate`, clipping, `optimizer.step`, the scheduler. It keeps the
    window's batches, not closures.

    Args:
        method: the rule for getting a gradient.
        model: the model, prepared by the accelerator.
        optimizer: the optimizer, prepared.
        accelerator: the Accelerator.
        loss_fn: from (model, batch) to the mean loss of a micro-batch.
        total_steps: number of optimizer steps of this training, for methods and schedules that need it.
        warmup_steps: how many of them the learning rate warms up.
        seed: of what methods draw.
        measure_every: measure `metrics` at steps that this divides; 0 for never.
        rounding: how shifts are added where a forward sees 16-bit weights: "stochastic" or "nearest".
        check_repeats: whether the first step makes one pass more, to warn if a pass cannot be repeated.

    Attributes:
        metrics: what the last measured step measured (`sharp_gap` and others), 0-dim tensors or numbers by name.

    Raises:
        ValueError: if the method cannot be right here; the message says why, and the way out.

    Example:
        >>> sharp = SharpStep(sam(0.05), model, optimizer, accelerator, loss_fn)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     with accelerator.accumulate(model):
        ...         loss = sharp.backward(batch)  # was: accelerator.backward(loss_fn(model, batch))
        ...         optimizer.step(); scheduler.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        method: Method,
        model: Any,
        optimizer: Any,
        accelerator: Accelerator,
        loss_fn: LossFn,
        total_steps: int | None = None,
        warmup_steps: int | None = None,
        seed: int = 42,
        measure_every: int = 0,
        rounding: str = "stochastic",
        check_repeats: bool = True,
    ) -> None:
        check_is_method(method)
        if not hasattr(optimizer, "step_was_skipped"):
            raise ValueError(
                "SharpStep takes model and optimizer as accelerator.prepare returned them: make it after that line."
            )
        refuse_accelerator(accelerator, method)
        refuse_line_search(base_of(optimizer))
        refuse_static_graph(method, bool(getattr(model, "static_graph", False)))
        several = accelerator.gradient_accumulation_steps > 1
        refuse_needs(
            method,
            {"names", "modules", "outputs", "rows", "index", "parameters", "update", "ranks"}
            | (set() if several else {"window", "terms"})
            | ({"length"} if total_steps is not None else set())
            | ({"warmup"} if warmup_steps is not None else set()),
            "SharpStep meets the window's micro-batches one by one. Use SharpTrainer, or one micro-batch a step",
        )
        self.method, self.metrics, self._every = method, {}, measure_every
        self._host = LoopHost(model, optimizer, accelerator, loss_fn)
        self._host.seed, self._host.total_steps, self._host.warmup_steps = seed, total_steps, warmup_steps
        self._stepper = Stepper(method, self._host, rounding, check_repeats)
        landscape = Landscape(self._host)
        check_method(method, landscape, "Make the optimizer from this model's, some of them with requires_grad.")
        self._attachment = Attachment()
        self._host.added = self._attachment.parameters
        around = (self._stepper.before_update, self._stepper.after_update)
        self._attachment.attach(optimizer, added_by(method, landscape), *around)

    def backward(self, batch: Any) -> Tensor:
        """In place of `accelerator.backward`: forward and backward of a micro-batch, and at the last one the method.

        Args:
            batch: the micro-batch.

        Returns:
            The detached loss that `loss_fn` gave for it.
        """
        host, stepper, divisor = self._host, self._stepper, self._host.divisor
        if not stepper.open:
            stepper.begin_window([batch], size=divisor)
        last = host.accelerator.sync_gradients
        measuring = bool(self._every) and host.step % self._every == 0
        loss = stepper.micro_batch(batch, last, measuring)
        if last:
            host.step += 1
            self.metrics = stepper.pop_metrics() if measuring else self.metrics
        return loss * divisor

    def state_dict(self) -> dict[str, Any]:
        """The step and the method's state, for `accelerator.register_for_checkpointing`.

        Returns:
            A dict of numbers, a string and tensors; of sharded ones all, so every rank must call this.
        """
        own = state_of(self.method, self._attachment)
        return {"step": self._host.step, "method": repr(self.method), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; warns if that was another method.

        A state that does not fit this model and method is a ValueError, and nothing is taken from it.

        Args:
            state: the dict.
        """
        state = dict(state)
        step, saved = step_of(state), state.pop("method", repr(self.method))
        if saved != repr(self.method):
            warnings.warn(f"The state is that of {saved}, and training goes on with {self.method!r}.", stacklevel=2)
        load_state(state, self.method, self._attachment, Landscape(self._host))
        self._host.step = step
