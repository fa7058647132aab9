"""Dicts of names: attributes of objects; attributes, buffers, parameters and children of modules.

They are read very often and move rarely, so the names are learnt once and the values read by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()  # stands for a name that there is not
PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None)})  # nothing inside; told apart first, for speed


def unchanged(now: Any, before: Any) -> bool:
    """Whether a value is what it was: the same object, or the same number or text.

    Args:
        now: the value.
        before: the earlier one.

    Returns:
        False also for an equal value of another type, and for zeros of another sign.
    """
    if now is before:
        return True
    return type(now) is type(before) and type(now) in PLAIN and repr(now) == repr(before)


def difference(names: dict[str, Any], before: dict[str, Any], apart: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What has to be assigned in a dict of names to make it what it was.

    Args:
        names: the dict.
        before: what it was.
        apart: names that do not count.

    Returns:
        Earlier values by name; `MISSING` for names that have to go.
    """
    found = {key: MISSING for key in names if key not in before and key not in apart}
    found.update(
        {
            key: value
            for key, value in before.items()
            if (now := names.get(key, MISSING)) is not value and not unchanged(now, value)
        }
    )
    return found


def restore_names(names: dict[str, Any], earlier: dict[str, Any], order: Iterable[str] = ()) -> None:
    """Assign and delete in a dict of names; nothing else in it is touched.

    Args:
        names: the dict.
        earlier: values by name; `MISSING` for names that have to go.
        order: the order of the names, where it counts.
    """
    for key, value in earlier.items():
        if value is MISSING:
            names.pop(key, None)
        else:
            names[key] = value
    for key in order:
        if key in names:
            names[key] = names.pop(key)


class Before(NamedTuple):
    """Many dicts of names as they were: a row of values for each that has names."""

    names: NamesOf
    keys: list[tuple[str, ...]]
    sizes: list[int]
    full: list[tuple[Callable[[Any], Any], dict[str, Any]]]
    rows: list[tuple[Any, ...]]
    places: list[tuple[str, str, str]]  # for each value in the rows: its owner's name and class, its own name

    def values(self) -> Iterator[Any]:
        """All values, as many as `places`.

        Returns:
            An iterator over them.
        """
        return chain.from_iterable(self.rows)

    def unmoved(self) -> bool:
        """Whether every name has the value that it had; names of equal numbers count as moved."""
        now = self.names.read(self.sizes, self.full)
        return now is not None and all(map(is_, chain.from_iterable(now), self.values()))


class NamesOf:
    """Dicts of names of many owners, read at once.

    Args:
        owners: for each dict, its owner's name and class, and the dict.
        apart: names that are not looked at.
    """

    def __init__(self, owners: list[tuple[str, str, dict[str, Any]]], apart: frozenset[str] = frozenset()) -> None:
        self.owners, self.apart = owners, apart
        self.dicts = [names for _, _, names in owners]
        self._learn()

    def _learn(self) -> None:
        self._keys = [tuple(key for key in names if key not in self.apart) for names in self.dicts]
        self._sizes = list(map(len, self.dicts))
        pairs = zip(self._keys, self.dicts, strict=True)
        # The first name is read twice, because `itemgetter` gives no tuple for a single name.
        self._full: list[Any] = [(itemgetter(*keys, keys[0]), names) for keys, names in pairs if keys]
        owned = zip(self.owners, self._keys, strict=True)
        self._places = [(o, cls, key) for (o, cls, _), keys in owned for key in (*keys, *keys[:1])]

    def read(self, sizes: list[int], full: list[Any]) -> list[tuple[Any, ...]] | None:
        """The values of names that are known.

        Args:
            sizes: how many names each dict had.
            full: how to read them.

        Returns:
            A row for each dict with names; None if names came or went.
        """
        if list(map(len, self.dicts)) != sizes:
            return None
        try:
            return [get(names) for get, names in full]
        except KeyError:
            return None

    def take(self) -> Before:
        """The dicts as they are now.

        Returns:
            The record.
        """
        rows = self.read(self._sizes, self._full)
        if rows is None:
            self._learn()
            rows = [get(names) for get, names in self._full]
        return Before(self, self._keys, self._sizes, self._full, rows, self._places)

    def moved(self, before: Before) -> Iterator[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]]:
        """What moved since a record.

        Args:
            before: the record.

        Yields:
            A dict, what has to be assigned in it, and the order of its names where names came or went.
        """
        if before.unmoved():
            return
        rows = iter(before.rows)
        for names, keys in zip(self.dicts, before.keys, strict=True):
            old = dict(zip(keys, next(rows), strict=False)) if keys else {}
            earlier = difference(names, old, self.apart)
            if earlier:
                ordered = not self.apart and list(names) != list(keys)
                yield names, earlier, keys if ordered else ()
