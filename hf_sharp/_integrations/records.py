"""What a training loop writes down beside its loss (token counts, lists of scores), kept as the first pass left it.

Trainers count tokens and collect scores inside `compute_loss`. A pass that is repeated would write them down twice, so
whatever it writes is put back: attributes, and the lists, dicts, sets and deques that they hold, at any depth.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

CONTAINERS = frozenset({list, dict, set, deque, defaultdict, OrderedDict, Counter})  # subclasses may be objects
PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None)})  # nothing inside; told apart first, for speed
LARGEST = 100_000  # entries of one attribute; more are a data set and no record, and would cost time in every step


class Records:
    """The attributes of an object that passes must leave alone.

    Numbers, texts and whatever else is assigned anew count as changed by assignment only; an object of a class of its
    own (a metric, a module) is not looked into.

    Args:
        owner: the object.
        without: names of attributes that are not looked into.
    """

    def __init__(self, owner: object, without: Collection[str] = ()) -> None:
        self._owner = owner
        self._without = set(without)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is written inside, the records afterwards are what they were before.

        Yields:
            Nothing.

        Raises:
            RuntimeError: if a tensor among them was changed in place, which is not copied.
        """
        attributes = vars(self._owner)
        before = dict(attributes)
        contents: list[tuple[Any, Any]] = []
        tensors: list[tuple[str, Tensor, int]] = []
        for name, value in before.items():
            if name not in self._without:
                self._remember(name, value, contents, tensors)
        try:
            yield
        finally:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
            for container, copy in contents:
                _refill(container, copy)
        moved = sorted({name for name, tensor, version in tensors if tensor._version != version})
        if moved:
            raise RuntimeError(
                f"The loss changes tensors of {type(self._owner).__name__}.{', '.join(moved)} in place, which a "
                "repeated pass does once more. Assign a new tensor: self.x = self.x + y."
            )

    def _remember(
        self, name: str, value: Any, contents: list[tuple[Any, Any]], tensors: list[tuple[str, Tensor, int]]
    ) -> None:
        """Copy the containers in an attribute and note the versions of its tensors."""
        waiting, seen, entries, start = [value], set(), 0, len(contents)
        while waiting:
            item = waiting.pop()
            if isinstance(item, Tensor):
                if not item.is_inference():  # these have no version, and nobody may change them
                    tensors.append((name, item, item._version))
            elif type(item) in CONTAINERS or type(item) is tuple:
                if id(item) in seen:
                    continue
                seen.add(id(item))
                entries += len(item)
                if entries > LARGEST:
                    del contents[start:]
                    self._leave(name)
                    return
                if not isinstance(item, tuple):
                    contents.append((item, item.copy()))
                values = item.values() if isinstance(item, dict) else item
                waiting.extend([inner for inner in values if type(inner) not in PLAIN])

    def _leave(self, name: str) -> None:
        self._without.add(name)
        warnings.warn(
            f"{type(self._owner).__name__}.{name} holds over {LARGEST} entries and is not looked after from now on: "
            "what the loss writes there is written by every pass. Clear it at times, or write in `log`.",
            stacklevel=2,
        )


def _refill(container: Any, copy: Any) -> None:
    """Give a container its earlier content; it stays the same object."""
    if isinstance(container, list):
        container[:] = copy
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(copy)
    else:
        container.update(copy)
