"""What a door tells the engine: the `Host`, one small class a training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn


class Host(ABC):
    """What a door tells the engine of the training loop it stands in.

    Attributes:
        model: the module whose buffers and modes the passes may move, unwrapped.
        parameters: the trainables of the optimizer's groups by name, each tied tensor once.
        step: the number of optimizer steps made before this one.
        total_steps: the number of optimizer steps of this training, None if unknown.
        warmup_steps: how many of them the learning rate warms up, None if unknown.
        lr: the present learning rate (of the first group).
        lr_max: the largest learning rate of the schedule.
        loss_scale: the factor on the loss that the gradients carry, a 0-dim tensor.
        seed: the training's seed.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    step: int
    total_steps: int | None
    warmup_steps: int | None
    lr: float
    lr_max: float
    loss_scale: Tensor
    seed: int

    @abstractmethod
    def backward(self, batch: Any, only: Sequence[nn.Parameter] | None) -> Tensor:
        """Forward and backward of one micro-batch as the host does it, adding to `p.grad`.

        Args:
            batch: the micro-batch as the host's loader gave it.
            only: parameters whose gradients suffice, None for all.

        Returns:
            The detached loss as the host logs it, without the loss scale.
        """

    @abstractmethod
    def forward(self, batch: Any) -> Any:
        """The model's outputs for one micro-batch in training mode; called without gradients.

        Args:
            batch: the micro-batch as the host's loader gave it.

        Returns:
            The outputs.
        """

    @abstractmethod
    def row_backward(self, row: Any) -> None:
        """Forward and backward of one row in evaluation mode with the host's loss, on this rank alone.

        Args:
            row: a micro-batch of one row.
        """

    @abstractmethod
    def window(self, batches: Sequence[Any]) -> AbstractContextManager[None]:
        """While open, `backward` normalises its loss as if `batches` were the whole window.

        Args:
            batches: micro-batches.

        Returns:
            The context.
        """

    @abstractmethod
    def unsynced(self) -> AbstractContextManager[Any]:
        """While open, backwards leave the reduction over ranks to the window's last one.

        Returns:
            The context.
        """

    @abstractmethod
    def refuse_subsets(self, reason: str) -> None:
        """From now on let `backward` compute all gradients, also where `only` asks for some; say so once.

        Args:
            reason: what went wrong with a subset.
        """

    @abstractmethod
    def mean_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all ranks.

        Args:
            tensors: the same shapes on every rank.

        Returns:
            The means, equal on all ranks.
        """
