"""A method's settings in a hyperparameter search: what a search names `sharp_...` belongs to the method."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np

from hf_sharp._methods.base import Method
from hf_sharp._methods.sum import Sum
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
def settings_apart(trainer: Any, trial: Any) -> Generator[tuple[Any, dict[str, Any]]]:
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
    check_names(rest, trainer)
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
    names = ", ".join(PREFIX + name for name in found)
    if config is None and ("method" not in found or isinstance(method, Sum)):
        raise ValueError(
            f"The search sets {names}, but the Trainer was given method={method!r}, which has no settings to replace. "
            'Give it a method by name or by a preset, as in SharpTrainer(..., method="sam") or method=sam(start=0.5), '
            "or search sharp_method too."
        )
    unknown = [name for name in found if name not in {field.name for field in fields(SharpConfig)}]
    if unknown:
        close = difflib.get_close_matches(unknown[0], [field.name for field in fields(SharpConfig)], n=1)
        hint = f" Did you mean '{PREFIX}{close[0]}'?" if close else ""
        raise ValueError(f"The search sets {PREFIX}{unknown[0]}, and no method has an option {unknown[0]}.{hint}")
    kept = {} if config is None else config.to_dict()
    if "method" in found and found["method"] != kept.get("method"):
        kept = {}
    try:
        return read_method({**kept, **found})
    except ValueError as error:
        raise ValueError(f"The search sets {names}. {error}") from error


def check_names(rest: Mapping[str, Any], trainer: Any) -> None:
    """Refuse names that look like a method's settings and would set nothing, since they lack the prefix.

    A name that neither is one nor is among the Trainer's arguments is left to the Trainer, which warns, where
    `model_init` takes the trial and may read it there.

    Args:
        rest: a trial's values without those whose names begin with `sharp_`.
        trainer: the Trainer.

    Raises:
        ValueError: with the right spelling.
    """
    options = {field.name for field in fields(SharpConfig)}
    right = {**{PREFIX + name: PREFIX + name for name in options}, **{name: PREFIX + name for name in options}}
    read_by_model = trainer.model_init is not None and bool(inspect.signature(trainer.model_init).parameters)
    for name in rest:
        if hasattr(trainer.args, name):
            continue
        bare = re.sub(r"^(sharp|method)\W*", "", name)
        if name in options or bare != name or not read_by_model:
            close = difflib.get_close_matches(bare, [*right, *vars(trainer.args)], n=1)
            hint = f" Did you mean '{right.get(close[0], close[0])}'?" if close else ""
            raise ValueError(
                f"The search sets '{name}', which is no argument of the Trainer, so it would change nothing.{hint} A "
                f"method's settings are searched as {PREFIX} + their name: {PREFIX}rho, {PREFIX}method."
            )
