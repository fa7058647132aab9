"""What an integration tells the engine, and does for it: the `Host`, one class a training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from hf_sharp._engine import rows
from hf_sharp._engine.facts import StepFacts
from hf_sharp._engine.terms import like
from hf_sharp._engine.undo import Undo
from hf_sharp._tensors.types import Batch, Hook, Normaliser, Outputs


class Host(ABC):
    """The training loop that an integration stands in.

    Attributes:
        model: the module whose state the passes may move, unwrapped.
        keeps_gradients: whether a gradient that was taken out of `p.grad` stays what it is during later backwards; not
            so where DDP hands out views of its buckets.
        accumulates: whether what is in `p.grad` when a window begins is part of the step; a closure clears it itself.
    """

    model: nn.Module
    keeps_gradients: bool = True
    accumulates: bool = True

    @cached_property
    def undo(self) -> Undo:
        """What is out of its place in this loop during a step."""
        return Undo()

    @abstractmethod
    def facts(self) -> StepFacts:
        """What is known at this step without its data, read anew; asked once a step.

        Returns:
            The facts.
        """

    @abstractmethod
    def normaliser(self, batches: Sequence[Batch] | None) -> Normaliser:
        """What the loss of some micro-batches is divided by, in a form that only this host reads.

        Args:
            batches: micro-batches that are taken for a whole window; None for the window that the loop is in, with
                what the loop itself has counted.

        Returns:
            To be given to `backward`.
        """

    @abstractmethod
    def backward(
        self, batch: Batch, normaliser: Normaliser, only: Sequence[nn.Parameter] | None, hook: Hook | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch as the loop does it, adding to `p.grad`.

        Args:
            batch: the micro-batch as the loop's loader gave it.
            normaliser: what its loss is divided by.
            only: parameters whose gradients suffice, None for all.
            hook: hook(outputs, batch), called after the forward; what it returns, if not None, is added to the loss in
                the units of the whole window's loss (over all ranks), whatever the loop divides by.

        Returns:
            The detached loss as the loop logs it, a 0-dim tensor without the loss scale.
        """

    @abstractmethod
    def forward(self, batch: Batch) -> Outputs:
        """The model's outputs for one micro-batch in training mode; called without gradients.

        Args:
            batch: the micro-batch as the loop's loader gave it.

        Returns:
            The outputs.
        """

    @abstractmethod
    def recompute(self, weights: Mapping[str, Tensor]) -> Outputs:
        """The model called once more as in the pass that is being made, inside a hook; called without gradients.

        Args:
            weights: values to use in place of parameters and buffers, by name; these themselves are not touched.

        Returns:
            The outputs.
        """

    def find_inflation(self, batch: Any, kept: Callable[[], AbstractContextManager[None]]) -> None:
        """Find out, for `StepFacts.inflation`, what this loop's loss is really divided by.

        Asked once a training, and only where the method weighs the loss against something with a size of its own. The
        default is a loop whose loss is the mean over the window.

        Args:
            batch: the first micro-batch.
            kept: gives a context in which passes leave no trace.
        """
        del batch, kept

    @abstractmethod
    def row_backward(self, row: Batch) -> None:
        """Forward and backward of one row in evaluation mode with the loop's loss, on this rank alone.

        Args:
            row: a micro-batch of one row.
        """

    def part(self, batch: Batch, wanted: slice) -> Batch:
        """Some rows of a micro-batch. A host whose rows belong together refuses it.

        Args:
            batch: the micro-batch.
            wanted: which rows.

        Returns:
            A micro-batch of these rows.
        """
        return like(rows.part(batch, wanted), batch)

    @abstractmethod
    def unsynced(self) -> AbstractContextManager[Any]:
        """While open, backwards leave the reduction over ranks to the window's last one.

        Returns:
            The context.
        """

    def synced(self) -> AbstractContextManager[Any]:
        """While open, backwards are reduced over ranks, whatever the loop is doing; asked for with shards only.

        Returns:
            The context.
        """
        return nullcontext()

    def reshard(self) -> None:
        """Let the next forward gather sharded weights anew; called whenever they have been moved."""
        return

    def stateful(self) -> Mapping[str, object]:
        """What passes may move beside the weights, to be put back after passes that are repeated.

        Returns:
            Objects by the name to call them by: the model, and what the loop's loss writes in.
        """
        return {"model": self.model}

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
