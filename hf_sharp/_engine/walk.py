"""Through attributes to what they hold, at any depth: containers, objects, tensors, generators, modules."""

from __future__ import annotations

import warnings
from typing import Any, cast

from torch import Tensor, nn

from hf_sharp._engine.contents import Aspect, aspects
from hf_sharp._engine.names import PLAIN
from hf_sharp._engine.records import Record
from hf_sharp._engine.watched import Watch

LARGEST = 100_000  # entries of one attribute; more are a data set and no record, and would cost time in every step
UNREAD = frozenset({"warnings_issued"})  # transformers' and TRL's note of what they have said; to be said once


class Reader:
    """What is remembered from walk to walk.

    Args:
        watch: decides about tensors.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.left: set[str] = set()  # attributes that are too large
        self.dull: set[type[Any]] = set(PLAIN)  # classes whose objects are not looked into
        self._aspects: dict[type[Any], tuple[Aspect, ...]] = {}

    def aspects(self, cls: type[Any]) -> tuple[Aspect, ...]:
        """What the objects of a class have that may move.

        Args:
            cls: the class.

        Returns:
            Its aspects, found once.
        """
        found = self._aspects.get(cls)
        if found is None:
            found = self._aspects[cls] = aspects(cls)
            if not found and not issubclass(cls, (Tensor, nn.Module)):
                self.dull.add(cls)
        return found


class Walk:
    """One walk, filling a record; `modules` are those that it came upon, by their id.

    Args:
        record: to fill.
        reader: how to read.
    """

    def __init__(self, record: Record, reader: Reader) -> None:
        self.record, self.reader = record, reader
        self.modules: dict[int, tuple[str, nn.Module]] = {}
        self._seen: set[int] = set()

    def tensor(self, name: str, tensor: Tensor, buffer: bool = False) -> None:
        """Note a tensor.

        Args:
            name: what to call it.
            tensor: the tensor.
            buffer: whether it is a buffer.
        """
        if id(tensor) not in self._seen:
            self._seen.add(id(tensor))
            seen = self.reader.watch.see(name, tensor, buffer)
            if seen is not None:
                self.record.tensors.append(seen)

    def attribute(self, owner: str, cls: str, key: str, value: object) -> None:
        """Copy the containers and note the tensors in an attribute, at any depth.

        Args:
            owner: its owner's name.
            cls: its owner's class.
            key: its name.
            value: its value.
        """
        left, dull = self.reader.left, self.reader.dull
        if type(value) is tuple and dull.issuperset(map(type, cast("tuple[object, ...]", value))):
            return  # shapes and sizes, of which models have many
        name = f"{owner}.{key}"
        if key in UNREAD or name in left:
            return
        record, entries = self.record, 0
        waiting: list[tuple[str, object]] = [(name, value)]
        start = len(record.contents), len(record.tensors)
        while waiting:
            name, item = waiting.pop()
            if id(item) in self._seen:
                continue
            if isinstance(item, Tensor):
                self.tensor(name, item)
                continue
            self._seen.add(id(item))
            if isinstance(item, nn.Module):
                self.modules[id(item)] = name, item
                continue
            for part, kind in self.reader.aspects(type(item)):
                held = part(item)
                copy: object = kind.take(held)
                entries += kind.size(copy)
                if entries > LARGEST:
                    del record.contents[start[0] :], record.tensors[start[1] :]
                    left.add(f"{owner}.{key}")
                    _warn_large(cls, key)
                    return
                record.contents.append((held, kind, copy))
                if type(copy) is list and dull.issuperset(map(type, cast("list[object]", copy))):
                    continue  # long lists of numbers, half as dear as below
                waiting += [(f"{name}.{inner}", v) for inner, v in kind.inside(copy) if type(v) not in dull]


def _warn_large(cls: str, key: str) -> None:
    warnings.warn(
        f"{cls}.{key} holds over {LARGEST} entries and is not looked after from now on: what the loss writes there is "
        "written by every pass. Clear it at times, or write in `log`.",
        stacklevel=2,
    )
