"""The arguments of `SharpTrainer` one by one, as editors and `help` show them; calls go through to the Trainer's own.

A trainer passes on what it is given, so that it works with any version of the Trainer and in any order of base
classes. That would hide a misspelt argument from whoever reads the program before it runs. tests/test_types.py
compares what is written here with the Trainer itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from hf_sharp._presets.config import MethodLike

P = ParamSpec("P")
T_co = TypeVar("T_co", bound=Trainer, covariant=True)


class ByNumber(Protocol):
    """A data set that gives its rows by their numbers, such as torch's `Dataset`."""

    def __getitem__(self, index: Any, /) -> Any:
        """A row.

        Args:
            index: its number.

        Returns:
            The row.
        """
        ...


Rows: TypeAlias = ByNumber | Iterable[Any]


class SharpClass(type, Generic[T_co]):
    """How a type checker sees a class that `make_sharp` returns: it is called with further arguments.

    No class is of this type when the program runs.
    """

    def __call__(
        self,
        *args: Any,
        method: MethodLike = None,
        rounding: str = "stochastic",
        check_repeats: bool = True,
        **kwargs: Any,
    ) -> T_co:
        """A trainer.

        Args:
            *args: the Trainer's.
            method: as in `SharpTrainer`.
            rounding: as in `SharpTrainer`.
            check_repeats: as in `SharpTrainer`.
            **kwargs: the Trainer's.

        Returns:
            The trainer, which has the attributes of the class that was given to `make_sharp`.
        """
        return super().__call__(*args, method=method, rounding=rounding, check_repeats=check_repeats, **kwargs)


def shown_as(example: Callable[P, None]) -> Callable[[Callable[..., None]], Callable[P, None]]:
    """Decorate an `__init__` that passes on what it is given: it is shown with the arguments of another function.

    Args:
        example: the function, which is never called.

    Returns:
        The decorator.
    """

    def decorate(init: Callable[..., None]) -> Callable[P, None]:
        vars(init)["__signature__"] = inspect.signature(example)
        return init

    return decorate


def trainer_arguments(
    self: Any,
    model: nn.Module | None = None,
    args: TrainingArguments | None = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | Mapping[str, Rows] | None = None,
    processing_class: Any = None,
    model_init: Callable[..., nn.Module] | None = None,
    compute_loss_func: Callable[..., Any] | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
    optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    *,
    method: MethodLike = None,
    rounding: str = "stochastic",
    check_repeats: bool = True,
) -> None:
    """The arguments of `SharpTrainer`; those above `method` are explained in `transformers.Trainer`."""


def seq2seq_arguments(
    self: Any,
    model: nn.Module | None = None,
    args: TrainingArguments | None = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | Mapping[str, Rows] | None = None,
    processing_class: Any = None,
    model_init: Callable[..., nn.Module] | None = None,
    compute_loss_func: Callable[..., Any] | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    *,
    method: MethodLike = None,
    rounding: str = "stochastic",
    check_repeats: bool = True,
) -> None:
    """The arguments of `SharpSeq2SeqTrainer`; those above `method` are explained in `transformers`."""
