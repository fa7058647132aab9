"""A method's settings in a hyperparameter search: what a search names `sharp_...` belongs to the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from hf_sharp._methods.base import Method
from hf_sharp._presets.config import SharpConfig, read_method

PREFIX = "sharp_"
Given = tuple[Method | None, SharpConfig | None]


def divide(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the method's settings out of a trial's values.

    Args:
        values: what a search tries, by name.

    Returns:
        The method's settings, without the prefix `sharp_`, and the rest, which are the Trainer's arguments.
    """
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    own = {name.removeprefix(PREFIX): value for name, value in plain.items() if name.startswith(PREFIX)}
    return own, {name: value for name, value in values.items() if not name.startswith(PREFIX)}


@contextmanager
def settings_apart(trainer: Any, trial: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """While open, the Trainer finds its own arguments in a trial and nothing else.

    Ray and W&B hand over a dict of values; Optuna a trial, from which the Trainer's `hp_space` makes one.

    Args:
        trainer: a Trainer in a hyperparameter search.
        trial: what the search handed over.

    Yields:
        What to set the Trainer up with, and the method's settings.
    """
    listed, space = isinstance(trial, Mapping), trainer.hp_space
    own, rest = divide(trial if listed else space(trial))
    trainer.hp_space = lambda _: rest
    try:
        yield (rest if listed else trial), own
    finally:
        trainer.hp_space, trainer._trial = space, trial


def searched(given: Given, found: Mapping[str, Any]) -> Given:
    """The method of a trial: the one that the Trainer was given, with the settings that the search has found.

    Args:
        given: the method and the settings it came from, if any.
        found: settings by name, as `SharpConfig` has them. Another `method` starts from that one's defaults.

    Returns:
        The trial's method and its settings.

    Raises:
        ValueError: if there are no settings to replace, or the method does not take them.
    """
    if not found:
        return given
    method, config = given
    if config is None and "method" not in found:
        names = ", ".join(PREFIX + name for name in found)
        raise ValueError(
            f"The search sets {names}, but the Trainer was given method={method!r}, which has no settings to replace. "
            'Name the method, as in SharpTrainer(..., method="sam") or method={"method": "sam", "start": 0.5}, or '
            "search sharp_method too."
        )
    kept = {} if config is None else config.to_dict()
    if "method" in found and found["method"] != kept.get("method"):
        kept = {}
    return read_method({**kept, **found})
