"""What a door tells the engine: the `Host`, one small class a training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._engine import rows


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
        rank: the number of this process among `ranks`.
        ranks: how many processes train together.
        sharded: whether parameters are spread over ranks; gradients then exist only where they are reduced.
        shifts_labels: whether the labels of a position are those of the next one, as in causal language models.
        autocast: the 16-bit dtype that the host's forward computes in, None for the weights' own precision.
        term: the named term of the loss whose batches are being passed through, None outside of named terms.
        added: the parameters in the optimizer that the method trains beside the model's, by the method's names.
    """

    added: Mapping[str, nn.Parameter] = MappingProxyType({})

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    step: int
    total_steps: int | None
    warmup_steps: int | None
    lr: float
    lr_max: float
    loss_scale: Tensor
    seed: int
    rank: int
    ranks: int
    autocast: torch.dtype | None
    shifts_labels: bool
    sharded: bool
    term: str | None = None

    @property
    def skips_overflows(self) -> bool:
        """Whether a scaler skips the step where a gradient is not finite; it waits for the device to know."""
        return False

    @abstractmethod
    def backward(
        self, batch: Any, only: Sequence[nn.Parameter] | None, hook: Callable[[Any, Any], Any] | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch as the host does it, adding to `p.grad`.

        Args:
            batch: the micro-batch as the host's loader gave it.
            only: parameters whose gradients suffice, None for all.
            hook: hook(outputs, batch), called after the forward; what it returns, if not None, is added to the loss in
                the units of the whole window's loss (over all ranks), whatever the host divides by.

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
    def again(self, batch: Any, weights: Mapping[str, Tensor]) -> Any:
        """The model called once more as in the pass that is being made, inside a hook; called without gradients.

        Args:
            batch: the micro-batch.
            weights: values to use in place of parameters and buffers, by name; these themselves are not touched.

        Returns:
            The outputs.
        """

    @abstractmethod
    def row_backward(self, row: Any) -> None:
        """Forward and backward of one row in evaluation mode with the host's loss, on this rank alone.

        Args:
            row: a micro-batch of one row.
        """

    def part(self, batch: Any, wanted: slice) -> Any:
        """Some rows of a micro-batch. A host whose rows belong together refuses it.

        Args:
            batch: the micro-batch.
            wanted: which rows.

        Returns:
            A micro-batch of these rows.
        """
        return rows.part(batch, wanted)

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

    def synced(self) -> AbstractContextManager[Any]:
        """While open, backwards are reduced over ranks, whatever the loop is doing; asked for where `sharded` only.

        Returns:
            The context.
        """
        return nullcontext()

    def reshard(self) -> None:
        """Let the next forward gather sharded weights anew; called whenever they have been moved."""
        return

    def seen_in(self, parameter: nn.Parameter) -> torch.dtype | None:
        """The dtype to which a parameter is cast before any forward, other than by autocast.

        Args:
            parameter: one of `parameters`.

        Returns:
            The dtype, None for its own.
        """
        del parameter
        return None

    @abstractmethod
    def records_kept(self) -> AbstractContextManager[None]:
        """While open, what the host writes down in its passes (token counts, scores) is forgotten afterwards.

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
    def momentum(self) -> dict[str, Tensor] | None:
        """The optimizer's running mean of gradients (SGD's momentum, Adam's first moment) by parameter name.

        Returns:
            The tensors themselves, not to be changed; None before the first step.

        Raises:
            ValueError: if the optimizer keeps none, or keeps it in a form that cannot be read.
        """

    @abstractmethod
    def mean_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all ranks.

        Args:
            tensors: the same shapes on every rank.

        Returns:
            The means, equal on all ranks.
        """
