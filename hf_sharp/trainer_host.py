"""`TrainerHost`: what the engine needs of a transformers `Trainer`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Trainer

from hf_sharp.host import Host
from hf_sharp.momentum import momentum_of, refuse_name

Step = Callable[[nn.Module, Any, Any], Tensor]


class TrainerHost(Host):
    """The Trainer's own micro-batch step as a `Host`.

    Args:
        trainer: the Trainer.
        step: its `training_step`, below the door.
    """

    def __init__(self, trainer: Trainer, step: Step) -> None:
        self.trainer = trainer
        self._step = step
        self.wrapped: Any = trainer.model  # with `items`, what the Trainer gave with the micro-batch
        self.items: Any = None
        self.flops = 0.0  # of the passes made since the Trainer last asked
        self._known: tuple[Any, dict[str, nn.Parameter]] = (None, {})
        self._no_subsets: str | None = None

    @property
    def model(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unwrapped model."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's trainables by the model's names; before there is an optimizer, the model's trainables."""
        groups = self._groups
        key = [(id(p), p.requires_grad) for group in groups for p in group["params"]]
        if self._known[0] != key or not groups:
            inside = {id(p) for group in groups for p in group["params"]}
            named = self.model.named_parameters()
            chosen = {name: p for name, p in named if p.requires_grad and (id(p) in inside or not groups)}
            self._known = (key, chosen)
        return self._known[1]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return getattr(self.trainer.optimizer, "param_groups", [])

    @property
    def step(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The Trainer's global step."""
        return self.trainer.state.global_step

    @property
    def total_steps(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The Trainer's last step, known once it trains."""
        return self.trainer.state.max_steps or None

    @property
    def warmup_steps(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The warm-up of the arguments."""
        steps = self.total_steps
        return None if steps is None else self.trainer.args.get_warmup_steps(steps)

    @property
    def lr(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The first group's learning rate."""
        groups = self._groups
        return float(groups[0]["lr"]) if groups else self.trainer.args.learning_rate

    @property
    def lr_max(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The first group's `initial_lr`, which schedulers set, else that of the arguments."""
        groups, largest = self._groups, max(self.trainer.args.learning_rate, self.lr)
        return float(groups[0].get("initial_lr", largest)) if groups else largest

    @property
    def loss_scale(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The scaler's factor, read without waiting for the device."""
        one = torch.ones((), device=self.trainer.args.device)
        scaler = self.trainer.accelerator.scaler
        return one if scaler is None or not scaler.is_enabled() else scaler.scale(one)

    @property
    def seed(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The arguments' seed."""
        return self.trainer.args.seed

    @property
    def rank(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Accelerate's process index."""
        return self.trainer.accelerator.process_index

    @property
    def ranks(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Accelerate's number of processes."""
        return self.trainer.accelerator.num_processes

    @property
    def autocast(self) -> torch.dtype | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Accelerate's mixed precision."""
        mixed = str(self.trainer.accelerator.mixed_precision)
        return {"no": None, "bf16": torch.bfloat16}.get(mixed, torch.float16)

    def backward(
        self, batch: Any, only: Sequence[nn.Parameter] | None, hook: Callable[[Any, Any], Any] | None = None
    ) -> Tensor:
        """The Trainer's `training_step`; `inputs=only` for its backward, a hook in its `compute_loss`."""
        self._count(batch)
        with ExitStack() as patches:
            if only is not None and self._subset_works():
                backward = functools.partial(self.trainer.accelerator.backward, inputs=list(only))
                patches.enter_context(_replaced(self.trainer.accelerator, "backward", backward))
            if hook is not None:
                patches.enter_context(_replaced(self.trainer, "compute_loss", self._watched(hook)))
            return self._step(self.wrapped, batch, self.items)

    def _watched(self, hook: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        """The Trainer's `compute_loss` with a term more; it cancels what the Trainer divides the loss by later."""
        original = self.trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
            given = dict(inputs)  # the Trainer takes labels out of its own dict
            loss, outputs = original(model, inputs, return_outputs=True, **keywords)
            term = hook(outputs, given)
            if term is not None:
                loss = loss + term.to(loss.device) * (self._divisor() * self.ranks)
            return (loss, outputs) if return_outputs else loss

        return compute_loss

    def _divisor(self) -> int:
        """What `training_step` divides the loss by: the number of micro-batches, unless the loss allows for it."""
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and self.items is not None
            scaled = counted or trainer.compute_loss_func is not None
        return 1 if scaled else trainer.current_gradient_accumulation_steps

    def forward(self, batch: Any, weights: Mapping[str, Tensor] | None = None) -> Any:
        """The wrapped model's outputs for the prepared inputs; with other weights, those of the model inside."""
        self._count(batch, share=1 / 3)
        self.wrapped.train()
        inputs = self.trainer._prepare_inputs(batch)
        with self.trainer.compute_loss_context_manager():
            if weights is None:
                return self.wrapped(**inputs)
            return functional_call(self.model, dict(weights), args=(), kwargs=dict(inputs))

    def momentum(self) -> dict[str, Tensor] | None:
        """That of the optimizer inside Accelerate's wrapper."""
        optimizer: Any = self.trainer.optimizer
        if optimizer is None:
            refuse_name(str(getattr(self.trainer.args.optim, "value", self.trainer.args.optim)))
            return None
        return momentum_of(optimizer, self.parameters)

    def row_backward(self, row: Any) -> None:
        """The Trainer's `compute_loss` of one row, backward without a reduction over ranks."""
        trainer, model = self.trainer, self.wrapped
        self._count(row)
        with trainer.accelerator.no_sync(model):
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, trainer._prepare_inputs(row))
            trainer.accelerator.backward(loss.mean())  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def window(self, batches: Sequence[Any]) -> Iterator[None]:
        """The Trainer's item count and number of micro-batches are those of `batches`."""
        trainer, items = self.trainer, self.items
        count = trainer.current_gradient_accumulation_steps
        try:
            trainer.current_gradient_accumulation_steps = len(batches)
            self.items = trainer._get_num_items_in_batch(list(batches), trainer.args.device)
            yield
        finally:
            self.items, trainer.current_gradient_accumulation_steps = items, count

    def unsynced(self) -> AbstractContextManager[Any]:
        """Accelerate's `no_sync`, as the Trainer's loop uses it for all but a window's last micro-batch."""
        return self.trainer.accelerator.no_sync(self.wrapped)

    def mean_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Accelerate's reduction."""
        return [self.trainer.accelerator.reduce(t, reduction="mean") for t in tensors]  # pyright: ignore

    def _subset_works(self) -> bool:
        """Whether a backward towards some parameters alone is possible here; says once what it costs where not."""
        trainer = self.trainer
        reasons = {
            "gradients are reduced over ranks": self.ranks > 1,
            "the model is replicated by DataParallel": trainer.args.n_gpu > 1,
            "reentrant gradient checkpointing needs the full backward": self._reentrant(),
        }
        reason = next((text for text, holds in reasons.items() if holds), None)
        if reason is not None:
            self.refuse_subsets(reason)
        return self._no_subsets is None

    def refuse_subsets(self, reason: str) -> None:
        """Remembered until the Trainer is gone; the warning comes once."""
        if self._no_subsets is None:
            self._no_subsets = reason
            warnings.warn(
                f"The ascent of this method needs few gradients, but {reason}: all are computed, and a step costs "
                "the time of two full passes.",
                stacklevel=2,
            )

    def _count(self, batch: Any, share: float = 1.0) -> None:
        if isinstance(batch, Mapping):
            self.flops += share * float(Trainer.floating_point_ops(self.trainer, batch))  # pyright: ignore

    def _reentrant(self) -> bool:
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(module, "gradient_checkpointing", False) and function is not None:
                return getattr(function, "keywords", {}).get("use_reentrant", True) is not False
        return False


@contextmanager
def _replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """While open, `owner.name` is the replacement."""
    had, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
