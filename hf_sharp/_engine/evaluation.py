"""What passes between a method and its landscape: a `FirstPass` and a `Shift` ask, an `Evaluation` answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from hf_sharp._engine.renamed import OF_EVALUATION, renamed
from hf_sharp._tensors.types import Hook, Reduce, Sums
from hf_sharp._tensors.vector import ParamVector

Names: TypeAlias = Collection[str]
Action: TypeAlias = Callable[[], None]


class Evaluation:
    """A loss and its gradient.

    Args:
        loss: detached 0-dim tensor, the sum over the window of what the host logs for a micro-batch.
        grad: the gradient, loss-scaled as the host's.
        reduced: the sum over the window of what `reduce` gave, if it was asked for.
        before_update: what is to be done right before the optimizer's update, if anything.
        after_update: what is to be done right after it.
        metrics: what the method has measured beside it, 0-dim tensors by the names under which they are logged.
    """

    __slots__ = ("_grad", "after_update", "before_update", "loss", "metrics", "reduced")

    def __init__(
        self,
        loss: Tensor,
        grad: ParamVector,
        reduced: Sums = None,
        before_update: Action | None = None,
        after_update: Action | None = None,
        metrics: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.loss = loss
        self.reduced = reduced
        self.before_update = before_update
        self.after_update = after_update
        self.metrics = metrics
        self._grad: ParamVector | None = grad

    def __getattr__(self, name: str) -> Any:
        return renamed(self, name, OF_EVALUATION)

    @property
    def grad(self) -> ParamVector:
        """The gradient.

        Raises:
            RuntimeError: after `donate`.
        """
        if self._grad is None:
            raise RuntimeError("This evaluation's gradient was donated and is gone; keep a copy before `donate()`.")
        return self._grad

    def donate(self) -> ParamVector:
        """Give the gradient away: whoever receives it may change it in place, so that no copy is made.

        Returns:
            The gradient.
        """
        grad = self.grad
        self._grad = None
        return grad.donate()

    def with_grad(self, grad: ParamVector) -> Evaluation:
        """The same loss with another gradient.

        Args:
            grad: the gradient to hand over.

        Returns:
            A new evaluation.
        """
        return Evaluation(self.loss, grad, self.reduced, self.before_update, self.after_update, self.metrics)

    def with_update(self, before: Action | None = None, after: Action | None = None) -> Evaluation:
        """The same loss and gradient, with something to do around the optimizer's update that this gradient is for.

        Args:
            before: called once, right before the update; not if a gradient scaler skips it.
            after: called once, right after it.

        Returns:
            A new evaluation; this one's gradient is given to it.
        """
        return Evaluation(self.loss, self.grad, self.reduced, before, after, self.metrics)

    def with_metrics(self, **metrics: Tensor) -> Evaluation:
        """The same loss and gradient, with something that the method has measured.

        Args:
            **metrics: 0-dim tensors by the names under which they are logged, such as `sharp_radius`.

        Returns:
            A new evaluation; this one's gradient is given to it.
        """
        known = {**self.metrics, **metrics}
        return Evaluation(self.loss, self.grad, self.reduced, self.before_update, self.after_update, known)


class Shift(NamedTuple):
    """Where to go from the present weights.

    Attributes:
        epsilon: the perturbation, None where nothing moves.
        slope: <g, epsilon>, a 0-dim tensor, where g is the step's gradient at the present weights; None where epsilon
            was not made from that gradient.
    """

    epsilon: ParamVector
    slope: Tensor | None = None


class FirstPass(NamedTuple):
    """How the first evaluation of a step is to be made, said before its data pass through the model.

    Attributes:
        shift: where to make it: a shift known beforehand, or a function that gives it (called before each micro-batch,
            so that nothing is kept between them); None for the present weights.
        only: names of the parameters whose gradient it must give; None for all.
        add: add(outputs, batch) is a term added to the loss of each micro-batch, in the units of the window's loss.
        reduce: reduce(outputs, batch) is summed over the window without gradients, as `Evaluation.reduced`.
        synced: whether its gradient is reduced over ranks; if not, each rank goes on with its own.
        terms: weights of the named terms of the loss; each term's landscape has a plan of its own then, and the rest
            of this one stays empty.
        within: gives a context in which each micro-batch's forward and backward are made, such as one in which
            modules compute something else.
    """

    shift: Shift | ParamVector | Callable[[], Shift | ParamVector] | None = None
    only: Names | None = None
    add: Hook | None = None
    reduce: Reduce | None = None
    synced: bool = True
    terms: Mapping[str, float] | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def is_plain(self) -> bool:
        """Whether it gives the gradient of the host's own loss at the present weights."""
        return self.shift is None and self.add is None and self.terms is None and self.within is nullcontext


Opening = FirstPass  # its name before 0.1; goes with 0.3
