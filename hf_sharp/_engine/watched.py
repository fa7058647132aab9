"""Tensors that a pass may change in place: which are copied before it, how a change is noticed, how it is undone.

A change is noticed by torch's version counter. Writing through `.data` goes round the counter, so small copies on the
CPU are compared by value too, and every copy is once, at the first pass, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sharp._tensors.shards import local, sharded

SMALL = 4096  # entries; integer buffers above are tables (quantised weights) that nobody moves
COMPARED = 65_536  # entries up to which a copy on the CPU is compared by value in every pass: some microseconds
LEAST = 64 * 2**20  # bytes that first copies may have in any case
PLAIN = (Tensor, nn.Parameter)  # tensors of other classes (quantised weights) are left alone


class Seen(NamedTuple):
    """A tensor before a pass."""

    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None
    table: bool  # a large integer buffer


class Moved(NamedTuple):
    """What became of tensors in a pass."""

    copies: list[tuple[Tensor, Tensor]]  # tensors that moved, with their earlier values
    tables: list[str]  # names of large integer buffers that moved
    lost: list[str]  # names of tensors that moved and were not copied


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, by torch's count.

    Args:
        tensor: sharded or not.

    Returns:
        The count; of a sharded tensor both its own and that of its local part, which move apart.
    """
    return tensor._version if type(tensor) in PLAIN else tensor._version + local(tensor)._version


def copied(tensor: Tensor) -> Tensor:
    """A copy of this rank's part of a tensor.

    Args:
        tensor: sharded or not.

    Returns:
        The copy, without history.
    """
    return local(tensor).detach().clone()


def write(tensor: Tensor, copy: Tensor) -> None:
    """Give a tensor the values of a copy; it stays the same object.

    Args:
        tensor: sharded or not.
        copy: of this rank's part.
    """
    part = local(tensor)
    if part.shape != copy.shape:
        part.resize_(copy.shape)
    part = part.detach()
    for dim, stride in enumerate(part.stride() if part.layout is torch.strided and part.numel() else ()):
        if stride == 0:  # an expanded tensor has one entry here, and torch writes to no such tensor
            part, copy = part.narrow(dim, 0, 1), copy.narrow(dim, 0, 1)
    part.copy_(copy)


class Watch:
    """Decides about copies, and remembers which tensors move.

    Args:
        trainable: gives the parameters that the engine moves; whatever shares their memory, or their gradients', is
            left alone.
    """

    def __init__(self, trainable: Callable[[], Collection[Tensor]]) -> None:
        self._trainable = trainable
        self._known: set[str] = set()  # names of tensors that went through a pass
        self._movers: set[str] = set()  # of those, the ones that moved
        self._uncounted: set[str] = set()  # of these, the ones whose version did not tell
        self._left: int | None = None  # bytes that first copies may still have in this record

    def begin(self) -> None:
        """Begin a record."""
        self._left = None

    def see(self, name: str, tensor: Tensor, buffer: bool = False) -> Seen | None:
        """Look at a tensor before a pass.

        Args:
            name: by which it is known from pass to pass, and in messages.
            tensor: the tensor.
            buffer: whether it is a buffer of a module.

        Returns:
            What is remembered of it; None if it is left alone: trainable, of a class of its own, or without a version.
        """
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            return None
        if (type(tensor) not in PLAIN and not sharded(tensor)) or tensor.is_inference() or tensor.is_meta:
            return None
        number = tensor.is_floating_point() or tensor.is_complex()
        small = tensor.numel() <= SMALL
        if buffer:
            wanted = number or small
        else:
            wanted = (
                name in self._movers or (small and not isinstance(tensor, nn.Parameter)) or self._first(name, tensor)
            )
        return Seen(name, tensor, version(tensor), copied(tensor) if wanted else None, buffer and not wanted)

    def _first(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor that no pass was seen to move or not to move is copied: while that costs little memory."""
        if name in self._known:
            return False
        if self._left is None:
            self._left = max(LEAST, sum(_size(p) for p in self._trainable()))
        size = _size(tensor)
        if size > self._left:
            return False
        self._left -= size
        return True

    def moved(self, seen: Iterable[Seen]) -> Moved:
        """Look at tensors after a pass.

        Args:
            seen: what was remembered of them.

        Returns:
            What became of them.
        """
        found, own = Moved([], [], []), None
        for item in seen:
            counted = version(item.tensor) != item.version
            if counted or self._differs(item):
                own = self._own() if own is None else own
                if _memory(item.tensor) not in own:
                    self._note(item, counted, found)
            self._known.add(item.name)
        return found

    def _note(self, item: Seen, counted: bool, found: Moved) -> None:
        if not counted:
            self._uncounted.add(item.name)
        if item.table:
            found.tables.append(item.name)
            return
        self._movers.add(item.name)
        if item.copy is None:
            found.lost.append(item.name)
        else:
            found.copies.append((item.tensor, item.copy))

    def _differs(self, item: Seen) -> bool:
        """Whether a tensor moved without its counter."""
        if item.copy is None or item.copy.layout is not torch.strided:
            return False
        if item.name in self._uncounted and item.copy.device.type != "cpu":
            return True  # comparing would wait for the device
        cheap = item.copy.device.type == "cpu" and item.copy.numel() <= COMPARED
        if item.name in self._known and item.name not in self._uncounted and not cheap:
            return False
        part = local(item.tensor)
        return part.shape != item.copy.shape or not _equal(part.detach(), item.copy)

    def _own(self) -> set[Any]:
        tensors = [t for p in self._trainable() for t in (p, p.grad) if t is not None and t.layout is torch.strided]
        return {_memory(tensor) for tensor in tensors} - {None}


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # a NaN is itself


def _size(tensor: Tensor) -> int:
    part = local(tensor)
    return part.numel() * part.element_size()


def _memory(tensor: Tensor) -> Any:
    """The memory that a tensor is in; None if it has none."""
    if tensor.layout is not torch.strided or not local(tensor).numel():
        return None
    return local(tensor).device, local(tensor).untyped_storage().data_ptr()
