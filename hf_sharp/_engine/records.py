"""What is written down about forward passes: the state before one, and what it moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_sharp._engine.contents import Kind
from hf_sharp._engine.names import MISSING, Before, restore_names
from hf_sharp._engine.watched import Seen, copied, write

Names = dict[str, Any]
Renaming = tuple[Names, Names, tuple[str, ...]]  # a dict, its earlier values, its order if that counts
Content = tuple[Any, Kind, Any]  # an object, how it is looked after, a copy of what it held


@dataclass
class Record:
    """The state before a pass: shallow copies, to be handed to `ForwardState.changes`."""

    names: list[Before] = field(default_factory=list[Before])
    contents: list[Content] = field(default_factory=list[Content])
    tensors: list[Seen] = field(default_factory=list[Seen])

    def clear(self) -> None:
        """Keep nothing alive."""
        for part in (self.names, self.contents, self.tensors):
            part.clear()


@dataclass
class Change:
    """What a pass moved, with its earlier values; false if it moved nothing."""

    names: list[Renaming] = field(default_factory=list[Renaming])
    contents: list[Content] = field(default_factory=list[Content])
    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def __bool__(self) -> bool:
        return bool(self.names or self.contents or self.tensors)

    def undo(self) -> None:
        """Put everything in it back to its earlier values; doing so twice is the same as once."""
        for names, earlier, order in self.names:
            restore_names(names, earlier, order)
        for item, kind, copy in self.contents:
            kind.put(item, copy)
        with torch.no_grad():
            for tensor, copy in self.tensors:
                write(tensor, copy)

    def inverse(self) -> Change:
        """The change from the earlier values to the present ones.

        Returns:
            A change whose `undo` undoes this one's.
        """
        names = [
            (names, {key: names.get(key, MISSING) for key in earlier}, tuple(names) if order else ())
            for names, earlier, order in self.names
        ]
        contents = [(item, kind, kind.take(item)) for item, kind, _ in self.contents]
        return Change(names, contents, [(tensor, copied(tensor)) for tensor, _ in self.tensors])


def together(changes: Sequence[Change]) -> Change:
    """Changes made one after the other as one: of each thing the earliest values.

    Args:
        changes: in the order in which they were made.

    Returns:
        The change; undoing it is undoing them from the last to the first.
    """
    names: dict[int, Renaming] = {}
    contents: dict[tuple[int, int], Content] = {}
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    for change in changes:
        for where, earlier, order in change.names:
            _, first, first_order = names.get(id(where), (where, {}, ()))
            names[id(where)] = where, earlier | first, first_order or order
        for item, kind, copy in change.contents:
            contents.setdefault((id(item), id(kind.put)), (item, kind, copy))
        for tensor, copy in change.tensors:
            tensors.setdefault(id(tensor), (tensor, copy))
    return Change(list(names.values()), list(contents.values()), list(tensors.values()))
