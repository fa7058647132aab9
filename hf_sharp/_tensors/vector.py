"""`ParamVector`: one vector over the trainable parameters, and all arithmetic on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_sharp._tensors.entries import (
    TINY,
    add_each_,
    alike,
    chunks,
    copy_,
    move_,
    nan_unless_finite,
    norm_of,
    norms_of_each,
    scale_each_,
    wide,
)
from hf_sharp._tensors.shards import like, local, sharded, summed, total

__all__ = ["TINY", "ParamVector", "Scalar", "alike", "chunks", "copy_", "move_", "nan_unless_finite", "total", "wide"]

Scalar = float | Tensor
WRITE = (
    "Write vector.scale(0.05) for 0.05 * vector, a.add(b, alpha=2.0) for a + 2 b, a.sub(b) for a - b, vector.unit() "
    "for vector / norm; scale_ and add_ work in place."
)


class ParamVector:
    """One vector, kept as one tensor a parameter; None stands for zeros that nobody needs to store.

    The operations return new vectors and leave their operands alone, with one exception: a vector that its owner has
    *donated* (`Evaluation.donate`) is changed in place by whoever calls `own`, so that an ascent gradient becomes the
    perturbation without a copy, and raises when it is used a second time. Names ending in `_` work in place.

    Tensors may be sharded (`shards.py`): norms and products are then those of the whole vector, at the price of
    reducing one number over the ranks, and everything else stays on this rank.

    Args:
        tensors: one entry a parameter, in the order of the landscape's parameters.
    """

    __slots__ = ("_tensors", "donated", "is_gradient")

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self._tensors: list[Tensor | None] | None = list(tensors)
        self.donated = False  # its owner needs it no more
        self.is_gradient = False  # it is the step's gradient at the present weights, unchanged

    @property
    def tensors(self) -> list[Tensor | None]:
        """One tensor a parameter, None for zeros.

        Raises:
            RuntimeError: if the vector was donated and used since.
        """
        if self._tensors is None:
            raise RuntimeError(
                "This vector was donated and has been used: its memory belongs to somebody else. Use it once, or use "
                "a copy, vector.scale(1.0), and donate nothing."
            )
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: list[Tensor | None]) -> None:
        self._tensors = tensors

    def __repr__(self) -> str:
        if self._tensors is None:
            return "ParamVector(donated and used)"
        present = self.present()
        return f"ParamVector({len(present)} of {len(self.tensors)} tensors, {sum(t.numel() for t in present)} entries)"

    def present(self) -> list[Tensor]:
        """The tensors that are there.

        Returns:
            All entries that are not None, this rank's part of those that are sharded.
        """
        return [local(t) for t in self.tensors if t is not None]

    def own(self) -> ParamVector:
        """A vector that the caller may change in place: of this one's tensors if it was donated, else a copy.

        Returns:
            The vector to work on.
        """
        own = ParamVector(self.release()) if self.donated else self.map(torch.clone)
        own.is_gradient = self.is_gradient
        return own

    def release(self) -> list[Tensor | None]:
        """Let go of the tensors; whoever uses this vector afterwards gets an error.

        Returns:
            The tensors.
        """
        tensors, self._tensors = self.tensors, None
        return tensors

    def donate(self) -> ParamVector:
        """Say that this vector is needed no more: whoever receives it may change it, and frees its memory.

        Returns:
            This vector.
        """
        self.donated = True
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> ParamVector:
        """The vector of `function(t)` for each tensor there is.

        Args:
            function: from a tensor, or this rank's part of it, to one of the same shape.

        Returns:
            A new vector, None where this one has None.
        """
        return ParamVector(None if t is None else like(function(local(t)), t) for t in self.tensors)

    def pairs(self, other: ParamVector) -> list[tuple[Tensor, Tensor]]:
        """The tensors that both vectors have.

        Args:
            other: a vector over the same parameters.

        Returns:
            Pairs of tensors, of this rank's parts where they are sharded.
        """
        both = zip(self.tensors, other.tensors, strict=True)
        return [(local(a), local(b)) for a, b in both if a is not None and b is not None]

    def norm(self) -> Tensor:
        """The L2 norm over all entries, in float32 or better, without a host synchronisation.

        Returns:
            A 0-dim tensor.
        """
        present = self.present()
        if not present:
            return torch.zeros(())
        if any(sharded(t) for t in self.tensors if t is not None):
            owners = [t for t in self.tensors if t is not None]
            squares = [norm_of(wide(t)).square() for t in present]
            return summed(zip(owners, squares, strict=True)).sqrt()
        if alike(present):
            narrow = present[0].dtype.itemsize < 4
            norms = norms_of_each(present, torch.float32 if narrow else None)
        else:
            norms = [norm_of(wide(t)) for t in present]
        return total(n.square() for n in norms).sqrt() if not alike(norms) else norm_of(torch.stack(norms))

    def dot(self, other: ParamVector) -> Tensor:
        """The inner product, in float32 or better.

        Args:
            other: a vector over the same parameters.

        Returns:
            A 0-dim tensor.
        """
        owners = [a for a, b in zip(self.tensors, other.tensors, strict=True) if a is not None and b is not None]
        pairs = zip(owners, self.pairs(other), strict=True)
        return summed((owner, (wide(a) * wide(b)).sum()) for owner, pair in pairs for a, b in chunks(*pair))

    def __mul__(self, *_: object) -> ParamVector:
        raise TypeError(f"A ParamVector has no operators. {WRITE}")

    __rmul__ = __truediv__ = __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = __mul__

    def scale_(self, factor: Scalar) -> ParamVector:
        """Multiply all entries, in place.

        Args:
            factor: a number or a 0-dim tensor; inf and NaN flow through.

        Returns:
            This vector.
        """
        self.is_gradient, present = False, self.present()
        exact = all(t.dtype.itemsize >= 4 for t in present)  # a 16-bit kernel would round a Python number first
        if exact and isinstance(factor, Tensor) and factor.device.type == "cpu":
            factor = factor.item()  # no device to wait for
        if not present:
            return self
        if not isinstance(factor, Tensor) or alike(present, [factor]):
            scale_each_(present, factor)
        else:
            for tensor in present:
                tensor.mul_(factor.to(tensor.device))
        return self

    def scale(self, factor: Scalar) -> ParamVector:
        """The vector times a number.

        Args:
            factor: a number or a 0-dim tensor.

        Returns:
            A new vector.
        """
        return self.map(torch.clone).scale_(factor)

    def unit(self) -> ParamVector:
        """The vector divided by its norm; zero stays zero.

        Returns:
            A new vector of norm one.
        """
        return self.scale(1 / self.norm().clamp_min(TINY))

    def add(self, other: ParamVector, alpha: Scalar = 1.0) -> ParamVector:
        """This vector plus `alpha` times the other.

        Args:
            other: a vector over the same parameters.
            alpha: a number or a 0-dim tensor.

        Returns:
            A new vector, None only where both have None.
        """
        return self.map(torch.clone).add_(other, alpha)

    def add_(self, other: ParamVector, alpha: Scalar = 1.0) -> ParamVector:
        """Add `alpha` times the other, in place.

        Args:
            other: a vector over the same parameters.
            alpha: a number or a 0-dim tensor.

        Returns:
            This vector; it gains a tensor where only the other has one.
        """
        self.is_gradient = False
        if isinstance(alpha, Tensor) and alpha.device.type == "cpu":
            alpha = alpha.item()  # no device to wait for
        pairs = self.pairs(other)
        targets, steps = [a for a, _ in pairs], [b for _, b in pairs]
        if not isinstance(alpha, Tensor) and alike(targets, steps) and all(t.dtype.itemsize >= 4 for t in targets):
            if targets:
                add_each_(targets, steps, alpha)
        else:
            for pair in pairs:
                for target, step in chunks(*pair):
                    factor = alpha.to(target.device) if isinstance(alpha, Tensor) else alpha
                    target.copy_(wide(target) + wide(step) * factor)
        missing = ParamVector(b if a is None else None for a, b in zip(self.tensors, other.tensors, strict=True))
        for index, tensor in enumerate(missing.scale(alpha).tensors):
            self.tensors[index] = self.tensors[index] if tensor is None else tensor
        return self

    def reject_(self, other: ParamVector) -> ParamVector:
        """Keep only the part of this vector that is orthogonal to the other, in place.

        What is left of two parallel vectors is rounding error and is made zero: anything below 100 machine epsilons
        of this vector's length.

        Args:
            other: a vector over the same parameters.

        Returns:
            This vector.
        """
        length = self.norm()
        return self.add_(other, -self.dot(other) / other.norm().square().clamp_min(TINY**2))._drop_below_(length)

    def rest_of_(self, other: ParamVector) -> ParamVector:
        """Become the part of the other that is orthogonal to this vector, in place; see `reject_`.

        Args:
            other: a vector over the same parameters.

        Returns:
            This vector.
        """
        share = -self.dot(other) / self.norm().square().clamp_min(TINY**2)
        return self.scale_(share).add_(other)._drop_below_(other.norm())

    def _drop_below_(self, length: Tensor) -> ParamVector:
        left, floor = self.norm(), 100 * torch.finfo(length.dtype).eps * length
        return self.scale_(torch.where(left < floor, torch.zeros_like(left), torch.ones_like(left)))

    def zip_(self, other: ParamVector, function: Callable[[Tensor, Tensor], Tensor]) -> ParamVector:
        """Replace each entry by `function(entry, entry of the other)`, in place, in float32 or better.

        Args:
            other: a vector over the same parameters.
            function: on tensors of equal shape, entry by entry.

        Returns:
            This vector; None where the other has None.
        """
        self.is_gradient = False
        for pair in self.pairs(other):
            for target, value in chunks(*pair):
                target.copy_(function(wide(target), wide(value)))
        both = zip(self.tensors, other.tensors, strict=True)
        self.tensors = [None if b is None else a for a, b in both]
        return self

    def sub(self, other: ParamVector) -> ParamVector:
        """This vector minus the other.

        Args:
            other: a vector over the same parameters.

        Returns:
            A new vector, None only where both have None.
        """
        return self.add(other, -1.0)

    def reject(self, other: ParamVector) -> ParamVector:
        """The part of this vector that is orthogonal to the other; see `reject_`.

        Args:
            other: a vector over the same parameters.

        Returns:
            A new vector.
        """
        return self.map(torch.clone).reject_(other)
