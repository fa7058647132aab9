"""`TrainerHost`: what the engine needs of a transformers `Trainer`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_sharp._integrations.accelerate_host import AcceleratorHost, replaced
from hf_sharp._integrations.momentum import refuse_name
from hf_sharp._integrations.records import Records
from hf_sharp._integrations.refusals import refuse_part

DATA = ("train_dataset", "eval_dataset")  # of the Trainer's attributes, those that may be long lists
Step = Callable[[nn.Module, Any, Any], Tensor]


class TrainerHost(AcceleratorHost):
    """The Trainer's own micro-batch step as a `Host`.

    Args:
        trainer: the Trainer.
        step: its `training_step`, below the door.
    """

    def __init__(self, trainer: Trainer, step: Step) -> None:
        super().__init__()
        self.trainer = trainer
        self._step = step
        self.wrapped: Any = trainer.model  # with `items`, what the Trainer gave with the micro-batch
        self.items: Any = None
        self._records = Records(trainer, without=DATA)
        self.flops = 0.0  # of the passes made since the Trainer last asked

    @property
    def accelerator(self) -> Any:
        """The Trainer's."""
        return self.trainer.accelerator

    @property
    def optimizer(self) -> Any:
        """The Trainer's."""
        return self.trainer.optimizer

    @property
    def model(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The Trainer's model, unwrapped."""
        return self.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

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
        return float(self.groups[0]["lr"]) if self.groups else self.trainer.args.learning_rate

    @property
    def lr_max(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The first group's `initial_lr`, which schedulers set, else that of the arguments."""
        groups, largest = self.groups, max(self.trainer.args.learning_rate, self.lr)
        return float(groups[0].get("initial_lr", largest)) if groups else largest

    @property
    def seed(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The arguments' seed."""
        return self.trainer.args.seed

    def backward(
        self, batch: Any, only: Sequence[nn.Parameter] | None, hook: Callable[[Any, Any], Any] | None = None
    ) -> Tensor:
        """The Trainer's `training_step`; `inputs=only` for its backward, a hook in its `compute_loss`."""
        self._count(batch)
        with ExitStack() as patches:
            replicated = {"the model is replicated by DataParallel": self.trainer.args.n_gpu > 1}
            if only is not None and self.subset_works(replicated):
                backward = functools.partial(self.accelerator.backward, inputs=list(only))
                patches.enter_context(replaced(self.accelerator, "backward", backward))
            if hook is not None:
                patches.enter_context(replaced(self.trainer, "compute_loss", self._watched(hook)))
            return self._step(self.wrapped, batch, self.items)

    def _watched(self, hook: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        """The Trainer's `compute_loss` with a term more; it cancels what the Trainer divides the loss by later."""
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
                loss = loss + term.to(loss.device) * (self.divisor * self.ranks)
            return (loss, outputs) if return_outputs else loss

        return compute_loss

    @property
    def divisor(self) -> int:
        """What `training_step` divides the loss by: the number of micro-batches, unless the loss allows for it."""
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and self.items is not None
            scaled = counted or trainer.compute_loss_func is not None
        return 1 if scaled else trainer.current_gradient_accumulation_steps

    def forward(self, batch: Any) -> Any:
        """The wrapped model's outputs for the prepared inputs."""
        self._count(batch, share=1 / 3)
        self.wrapped.train()
        with self.trainer.compute_loss_context_manager():
            return self.wrapped(**self.trainer._prepare_inputs(batch))

    def again(self, batch: Any, weights: Mapping[str, Tensor]) -> Any:
        """The model inside, called with what it was called with in this pass."""
        self._count(batch, share=1 / 3)
        return super().again(batch, weights)

    def records_kept(self) -> AbstractContextManager[None]:
        """The Trainer's attributes, in which `compute_loss` of TRL's trainers and of users' own writes."""
        return self._records.kept()

    def momentum(self) -> dict[str, Tensor] | None:
        """The optimizer's; before there is one, its name is looked at."""
        if self.optimizer is None:
            refuse_name(str(getattr(self.trainer.args.optim, "value", self.trainer.args.optim)))
        return super().momentum()

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

    @contextmanager
    def window(self, batches: Sequence[Any]) -> Iterator[None]:
        """The Trainer's item count and number of micro-batches are those of `batches`."""
        trainer, items = self.trainer, self.items
        count = getattr(trainer, "current_gradient_accumulation_steps", 1)  # set once the Trainer trains
        try:
            trainer.current_gradient_accumulation_steps = len(batches)
            self.items = trainer._get_num_items_in_batch(list(batches), trainer.args.device)
            yield
        finally:
            self.items, trainer.current_gradient_accumulation_steps = items, count

    def _count(self, batch: Any, share: float = 1.0) -> None:
        if isinstance(batch, Mapping):
            self.flops += share * float(Trainer.floating_point_ops(self.trainer, batch))  # pyright: ignore
