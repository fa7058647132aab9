"""What an object holds beside its name: how it is copied, told apart from the copy, and put back in the same object.

Containers have entries, objects have attributes, generators have a stream. Which of them a class has is said once, by
`aspects`; classes of libraries have none, so that optimizers, data sets and process groups are left alone.
"""

from __future__ import annotations

import pickle
import random
import sys
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from types import CellType, MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch

from hf_sharp._engine.names import MISSING, difference, restore_names, unchanged

LIBRARIES = frozenset(
    "torch torchvision torchaudio torchao accelerate transformers deepspeed peft bitsandbytes numpy datasets "
    "tokenizers pyarrow pandas safetensors huggingface_hub wandb hf_sharp".split()
)
# Of the standard library's classes, those whose objects are somebody's records, and those that somebody's classes have
# for a base. Threads, loggers and enumerations are none.
RECORDS = frozenset({Namespace, SimpleNamespace, UserDict, UserList})
BASES = frozenset({"abc", "argparse", "builtins", "collections", "contextlib", "types", "typing"})

# Methods below are called of the class itself, since an object's own may be somebody's. These are the classes, typed.
Lists: type[list[Any]] = list
Dicts: type[dict[Any, Any]] = dict
OrderedDicts: type[OrderedDict[Any, Any]] = OrderedDict
Sets: type[set[Any]] = set
Deques: type[deque[Any]] = deque


def _alike(now: Any, before: Any) -> bool:
    return len(now) == len(before) and (all(map(is_, now, before)) or all(map(unchanged, now, before)))


@dataclass(frozen=True, eq=False)
class Kind:
    """How one kind of content is looked after."""

    take: Callable[[Any], Any]  # a copy of an object's content
    same: Callable[[Any, Any], bool]  # whether an object's content is that copy still
    put: Callable[[Any, Any], None]  # gives an object the content of a copy; it stays the same object
    inside: Callable[[Any], Iterable[tuple[Any, Any]]] = lambda copy: ()  # names and values in a copy
    size: Callable[[Any], int] = lambda copy: 0  # entries in a copy


class Aspect(NamedTuple):
    """One thing that the objects of a class have: a part of them, and its kind."""

    part: Callable[[Any], Any]
    kind: Kind


def _refill(clear: Callable[[Any], None], fill: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def put(container: Any, copy: Any) -> None:
        clear(container)
        fill(container, copy)

    return put


def _put_list(entries: Any, copy: list[Any]) -> None:
    Lists.__setitem__(entries, slice(None), copy)


def _put_items(container: Any, items: list[tuple[Any, Any]]) -> None:
    for key, value in items:
        OrderedDicts.__setitem__(container, key, value)


def _put_names(names: dict[str, Any], copy: dict[str, Any]) -> None:
    restore_names(names, difference(names, copy))


def _cell(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a variable that was not assigned yet
        return []


def _put_cell(cell: CellType, copy: list[Any]) -> None:
    if copy:
        cell.cell_contents = copy[0]
    else:
        with suppress(ValueError):
            del cell.cell_contents


def _alike_dicts(now: Any, before: dict[Any, Any]) -> bool:
    return _alike(list(Dicts.keys(now)), list(before)) and _alike(list(Dicts.values(now)), list(before.values()))


def _alike_items(now: Any, before: list[tuple[Any, Any]]) -> bool:
    items = list(OrderedDicts.items(now))
    return len(items) == len(before) and all(
        key is k and unchanged(v, w) for (key, v), (k, w) in zip(items, before, strict=True)
    )


def _put_array(array: Any, copy: Any) -> None:
    array[...] = copy


LIST = Kind(
    Lists.copy,
    _alike,
    _put_list,
    inside=enumerate,
    size=len,
)
DICT = Kind(
    Dicts.copy,
    _alike_dicts,
    _refill(Dicts.clear, Dicts.update),
    inside=lambda copy: copy.items(),
    size=len,
)
ORDERED = Kind(  # its order is not that of the dict below it
    lambda o: list(OrderedDicts.items(o)),
    _alike_items,
    _refill(OrderedDicts.clear, _put_items),
    inside=lambda copy: copy,
    size=len,
)
SET = Kind(
    lambda o: list(Sets.__iter__(o)),
    lambda o, copy: set(map(id, Sets.__iter__(o))) == set(map(id, copy)),
    _refill(Sets.clear, Sets.update),
    inside=enumerate,
    size=len,
)
DEQUE = Kind(
    lambda o: list(Deques.__iter__(o)),
    lambda o, copy: _alike(list(Deques.__iter__(o)), copy),
    _refill(Deques.clear, Deques.extend),
    inside=enumerate,
    size=len,
)
NAMES = Kind(
    Dicts.copy,
    lambda names, copy: not difference(names, copy),
    _put_names,
    inside=lambda copy: copy.items(),
    size=len,
)
ARRAY = Kind(
    lambda array: array.copy(),
    lambda array, copy: array.tobytes() == copy.tobytes(),
    _put_array,
    size=lambda copy: copy.size,
)
CELL = Kind(_cell, lambda cell, copy: _alike(_cell(cell), copy), _put_cell, inside=enumerate, size=len)


def _looked_through(entries: Callable[[Any], Iterable[tuple[Any, Any]]]) -> Kind:
    """What holds other things and does not change itself."""
    return Kind(
        lambda o: list(entries(o)), lambda o, copy: True, lambda o, copy: None, inside=lambda copy: copy, size=len
    )


def _stream(take: Callable[[Any], Any], put: Callable[[Any, Any], None]) -> Kind:
    return Kind(take, lambda generator, copy: pickle.dumps(take(generator)) == pickle.dumps(copy), put)


def _put_bits(bits: Any, state: Any) -> None:
    bits.state = state


TUPLE = _looked_through(enumerate)
METHOD = _looked_through(lambda method: [("__self__", method.__self__)])
PARTIAL = _looked_through(lambda p: [("func", p.func), ("args", p.args), ("keywords", p.keywords)])
BITS = _stream(lambda bits: bits.state, _put_bits)
# Of a class with several of these bases, the first counts.
KINDS: tuple[tuple[Any, Callable[[Any], Any], Kind], ...] = (
    (list, lambda o: o, LIST),
    (OrderedDict, lambda o: o, ORDERED),
    (dict, lambda o: o, DICT),
    (set, lambda o: o, SET),
    (deque, lambda o: o, DEQUE),
    ((tuple, frozenset), lambda o: o, TUPLE),
    (MethodType, lambda o: o, METHOD),
    (partial, lambda o: o, PARTIAL),
    (CellType, lambda o: o, CELL),
    (random.Random, lambda o: o, _stream(lambda g: g.getstate(), lambda g, state: g.setstate(state))),
    (
        torch.Generator,
        lambda o: o,
        Kind(
            lambda g: g.get_state(),
            lambda g, state: torch.equal(g.get_state(), state),
            lambda g, state: g.set_state(state),
        ),
    ),
    (numpy.random.Generator, lambda g: g.bit_generator, BITS),
    (numpy.random.BitGenerator, lambda o: o, BITS),
    (numpy.random.RandomState, lambda o: o, _stream(lambda g: g.get_state(), lambda g, state: g.set_state(state))),
    (numpy.ndarray, lambda o: o, ARRAY),
)
NOTHING = (random.SystemRandom, numpy.memmap)  # no state to read; a data set


def aspects(cls: type[Any]) -> tuple[Aspect, ...]:
    """What the objects of a class have that may move.

    Args:
        cls: the class.

    Returns:
        Its aspects; none for classes of libraries, unless they are containers or generators.
    """
    if issubclass(cls, NOTHING):
        return ()
    found = [Aspect(part, kind) for base, part, kind in KINDS if issubclass(cls, base)][:1]
    if _somebodys(cls):
        if cls.__dictoffset__:
            found.append(Aspect(attrgetter("__dict__"), NAMES))
        if slots := _slots(cls):
            found.append(Aspect(_itself, _slotted(slots)))
    return tuple(found)


def _itself(item: Any) -> Any:
    return item


def _package(cls: type[Any]) -> str:
    return cls.__module__.partition(".")[0]


def _somebodys(cls: type[Any]) -> bool:
    """Whether a class is of a user's own, with no base in a library; `SimpleNamespace` counts as one."""
    package = _package(cls)
    if package in sys.stdlib_module_names and cls not in RECORDS:
        return False
    bases = map(_package, cls.__mro__)
    return not any(p in LIBRARIES or (p in sys.stdlib_module_names and p not in BASES) for p in bases)


def _slots(cls: type[Any]) -> list[Any]:
    classes = [c for c in cls.__mro__ if _package(c) not in sys.stdlib_module_names]
    return [member for c in classes for member in vars(c).values() if isinstance(member, MemberDescriptorType)]


def _slotted(slots: list[Any]) -> Kind:
    def take(item: Any) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for slot in slots:
            try:
                found.append((slot.__name__, slot.__get__(item)))
            except AttributeError:
                found.append((slot.__name__, MISSING))
        return found

    def put(item: Any, copy: list[tuple[str, Any]]) -> None:
        for slot, (_, value) in zip(slots, copy, strict=True):
            if value is not MISSING:
                slot.__set__(item, value)
            else:
                with suppress(AttributeError):
                    slot.__delete__(item)

    def same(item: Any, copy: list[tuple[str, Any]]) -> bool:
        return all(unchanged(now, old) for (_, now), (_, old) in zip(take(item), copy, strict=True))

    return Kind(take, same, put, inside=lambda copy: copy, size=len)
