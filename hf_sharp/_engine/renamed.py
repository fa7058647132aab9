"""Names of before 0.1, which still work with a warning and go with 0.3."""

from __future__ import annotations

import warnings
from typing import Any

FACTS = (
    *("step", "total_steps", "warmup_steps", "lr", "lr_max", "loss_scale", "names", "added", "autocast"),
    *("shifts_labels", "sharded", "named", "vector", "cast", "random"),
)
OF_EVALUATION = {"take": "donate"}
OF_LANDSCAPE = {name: f"facts.{name}" for name in FACTS} | {
    "look": "outputs_at",
    "opening": "plan",
    "over_ranks": "ranks.sum",
    "mean_over_ranks": "ranks.mean",
    "batches": "window.batches",
    "sample_index": "window.sample_index",
    "row_count": "window.row_count",
}


def renamed(owner: Any, name: str, names: dict[str, str]) -> Any:
    """What an old name of an attribute stands for, with a warning.

    Args:
        owner: the object that was asked.
        name: the name that it does not have.
        names: new names by old ones, with dots.

    Returns:
        The attribute under its new name.

    Raises:
        AttributeError: if it never had the name.
    """
    new = names.get(name)
    if new is None:
        raise AttributeError(f"'{type(owner).__name__}' object has no attribute '{name}'")
    warnings.warn(
        f"{type(owner).__name__}.{name} is called {new} now; the old name goes with hf_sharp 0.3.",
        DeprecationWarning,
        stacklevel=3,
    )
    for part in new.split("."):
        owner = getattr(owner, part)
    return owner
