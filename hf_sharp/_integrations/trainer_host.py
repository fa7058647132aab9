"""`TrainerHost`: what the engine needs of a transformers `Trainer`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_sharp._engine.evaluation import Hook
from hf_sharp._integrations.accelerate_host import AcceleratorHost, Schedule
from hf_sharp._integrations.momentum import refuse_name
from hf_sharp._integrations.refusals import refuse_part

Step = Callable[[nn.Module, Any, Any], Tensor]


class Normaliser(NamedTuple):
    """What the Trainer divides a window's loss by.

    Attributes:
        items: the window's number of items, if the Trainer counts them.
        micro_batches: the number of micro-batches.
    """

    items: Any
    micro_batches: int


class TrainerHost(AcceleratorHost):
    """The Trainer's own micro-batch step as a `Host`.

    Args:
        trainer: the Trainer.
        step: its `training_step`, below the one that runs the method.
    """

    def __init__(self, trainer: Trainer, step: Step) -> None:
        super().__init__()
        self.trainer = trainer
        self._step = step
        self.wrapped: Any = trainer.model  # with `items`, what the Trainer gave with the micro-batch
        self.items: Any = None
        self._ignores_items = False  # whether the loss stays what it is whatever the number of items
        self.flops = 0.0  # of the passes made since the Trainer last asked

    @property
    def accelerator(self) -> Any:
        """The Trainer's own, read anew: a search makes another."""
        return self.trainer.accelerator

    @property
    def optimizer(self) -> Any:
        """The Trainer's own, None until it has made one."""
        return self.trainer.optimizer

    @property
    def model(self) -> nn.Module:
        """The Trainer's model, unwrapped."""
        return self.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

    @property
    def schedule(self) -> Schedule:
        """The Trainer's state; its last step is known once it trains."""
        args, total = self.trainer.args, self.trainer.state.max_steps or None
        warmup = None if total is None else args.get_warmup_steps(total)
        first = self.groups[0] if self.groups else {}
        lr = float(first.get("lr", args.learning_rate))
        lr_max = float(first.get("initial_lr", max(args.learning_rate, lr)))  # schedulers set it
        return Schedule(self.trainer.state.global_step, total, warmup, lr, lr_max, args.seed)

    def normaliser(self, batches: Sequence[Any] | None) -> Normaliser:
        """The Trainer's item count and number of micro-batches."""
        trainer = self.trainer
        if batches is None:
            return Normaliser(self.items, getattr(trainer, "current_gradient_accumulation_steps", 1))
        items = trainer._get_num_items_in_batch(list(batches), trainer.args.device)
        return Normaliser(items, len(batches))

    def backward(
        self, batch: Any, normaliser: Normaliser, only: Sequence[nn.Parameter] | None, hook: Hook | None = None
    ) -> Tensor:
        """The Trainer's `training_step`; `inputs=only` for its backward, a hook in its `compute_loss`."""
        self._count(batch)
        trainer = self.trainer
        with ExitStack() as patches:
            if normaliser.micro_batches != getattr(trainer, "current_gradient_accumulation_steps", 1):
                changed = self.replaced(trainer, "current_gradient_accumulation_steps", normaliser.micro_batches)
                patches.enter_context(changed)
            replicated = {"the model is replicated by DataParallel": self.trainer.args.n_gpu > 1}
            if only is not None and self.subset_works(replicated):
                backward = functools.partial(self.accelerator.backward, inputs=list(only))
                patches.enter_context(self.replaced(self.accelerator, "backward", backward))
            if hook is not None:
                watched = self._watched(hook, normaliser)
                patches.enter_context(self.replaced(trainer, "compute_loss", watched))
            return self._step(self.wrapped, batch, normaliser.items)

    def _watched(self, hook: Hook, normaliser: Normaliser) -> Callable[..., Any]:
        """The Trainer's `compute_loss` with a term more; it cancels what the Trainer divides the loss by later."""
        factor = self.divisor_for(normaliser.items) * self.ranks * self._inflation_of(normaliser.micro_batches)
        original = self.trainer.compute_loss
        takes = inspect.signature(original).parameters
        if "return_outputs" not in takes and not any(p.kind == p.VAR_KEYWORD for p in takes.values()):
            raise ValueError(
                f"{type(self.trainer).__name__}.compute_loss takes no return_outputs, and this method looks at the "
                "model's outputs: give it the signature of Trainer.compute_loss."
            )

        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
            given = dict(inputs)  # the Trainer takes labels out of its own dict
            with self.watched():
                loss, outputs = original(model, inputs, return_outputs=True, **keywords)
            term = hook(outputs, given)
            if term is not None:
                if loss.requires_grad and not term.requires_grad:
                    raise ValueError(
                        f"The outputs that {type(self.trainer).__name__}.compute_loss gives out carry no gradient, so "
                        "a term on them would change nothing (TRL's trainers compute them apart from the loss). Use "
                        "a method that adds no term, such as SAM."
                    )
                loss = loss + term.to(loss.device) * factor
            return (loss, outputs) if return_outputs else loss

        return compute_loss

    def divisor_for(self, items: Any) -> int:
        """What `training_step` divides the loss by: the number of micro-batches, unless the loss allows for it.

        Args:
            items: the window's number of items as the Trainer gives it to the loss, or None.

        Returns:
            The divisor.
        """
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and items is not None
            scaled = counted or trainer.compute_loss_func is not None
        return 1 if scaled else trainer.current_gradient_accumulation_steps

    @property
    def inflation(self) -> float:
        """The number of micro-batches of the present window on all ranks, where the model ignores that of items."""
        return self._inflation_of(getattr(self.trainer, "current_gradient_accumulation_steps", 1))

    def _inflation_of(self, micro_batches: int) -> float:
        multiplied = self.trainer.args.average_tokens_across_devices  # then the Trainer multiplies by the ranks
        return float(micro_batches * (self.ranks if multiplied else 1)) if self._ignores_items else 1.0

    def find_inflation(self, batch: Any, kept: Callable[[], AbstractContextManager[None]]) -> None:
        """Compute the loss for the number of items and for twice as many: it is the same if the model ignores them."""
        self._ignores_items = False
        alone = self.ranks == self.trainer.args.gradient_accumulation_steps == 1
        if alone or self.items is None or self.divisor_for(self.items) != 1 or not isinstance(batch, Mapping):
            return
        losses = []
        for items in (self.items, 2 * self.items):
            with kept(), torch.no_grad(), self.trainer.compute_loss_context_manager():
                given: Any = batch
                inputs = dict(self.trainer._prepare_inputs(given))  # the Trainer takes labels out of its own dict
                self.wrapped.train()
                losses.append(self.trainer.compute_loss(self.wrapped, inputs, num_items_in_batch=items))
        self._ignores_items = torch.equal(*losses)

    def forward(self, batch: Any) -> Any:
        """The wrapped model's outputs for the prepared inputs."""
        self._count(batch, share=1 / 3)
        self.wrapped.train()
        with self.trainer.compute_loss_context_manager():
            return self.wrapped(**self.trainer._prepare_inputs(batch))

    def recompute(self, weights: Mapping[str, Tensor]) -> Any:
        """The model inside, called with what it was called with in this pass."""
        if self._call is not None:
            self._count(self._call[1], share=1 / 3)
        return super().recompute(weights)

    def stateful(self) -> dict[str, object]:
        """The model, the Trainer's attributes, in which `compute_loss` of TRL's trainers writes, and its loss."""
        loss = self.trainer.compute_loss_func
        objects = {} if loss is None or isinstance(loss, FunctionType) else {"compute_loss_func": loss}
        return {"model": self.model, type(self.trainer).__name__: self.trainer, **objects}

    def momentum(self) -> dict[str, Tensor] | None:
        """The optimizer's; before there is one, its name is looked at, if the Trainer itself will make it."""
        args = self.trainer.args
        if self.optimizer is None and not self._makes_its_own:
            refuse_name(str(getattr(args.optim, "value", args.optim)), args.optim_args)
        return super().momentum()

    @property
    def _makes_its_own(self) -> bool:
        """Whether the optimizer comes from elsewhere than the arguments, so that their name says nothing."""
        makers = ("create_optimizer", "get_optimizer_cls_and_kwargs")
        known = ("transformers.trainer", "hf_sharp._integrations.trainer")
        owners = {cls.__module__ for cls in type(self.trainer).__mro__ if any(name in vars(cls) for name in makers)}
        return self.trainer.optimizer_cls_and_kwargs is not None or not owners <= set(known)

    def row_backward(self, row: Any) -> None:
        """The Trainer's `compute_loss` of one row, backward without a reduction over ranks."""
        trainer, model = self.trainer, self.wrapped
        self._count(row)
        with self.accelerator.no_sync(model):
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, trainer._prepare_inputs(row))
            self.accelerator.backward(loss.mean())  # pyright: ignore[reportAttributeAccessIssue]

    def part(self, batch: Any, wanted: slice) -> Any:
        """Rows of a micro-batch, unless the Trainer stacks pairs in it."""
        refuse_part(self.trainer)
        return super().part(batch, wanted)

    def _count(self, batch: Any, share: float = 1.0) -> None:
        if isinstance(batch, Mapping):
            self.flops += share * float(Trainer.floating_point_ops(self.trainer, batch))  # pyright: ignore
