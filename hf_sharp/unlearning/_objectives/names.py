"""Objectives by name, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hf_sharp.unlearning._objectives.base import Objective
from hf_sharp.unlearning._objectives.dpo import DPO, IDK
from hf_sharp.unlearning._objectives.gradient_ascent import GradientAscent, GradientDifference
from hf_sharp.unlearning._objectives.npo import NPO, SimNPO
from hf_sharp.unlearning._objectives.rmu import RMU

OBJECTIVES: dict[str, type[Objective]] = {
    "gradient_ascent": GradientAscent,
    "gradient_difference": GradientDifference,
    "npo": NPO,
    "simnpo": SimNPO,
    "dpo": DPO,
    "idk": IDK,
    "rmu": RMU,
}
ObjectiveLike = Objective | Mapping[str, Any] | str


def read_objective(objective: ObjectiveLike) -> Objective:
    """What a trainer was given as `objective=`.

    Args:
        objective: an `Objective`, a name in `OBJECTIVES`, or a dict of a name under "objective" and its settings.

    Returns:
        The objective.

    Raises:
        ValueError: if it is none of these, or has no such setting.
    """
    if isinstance(objective, Objective):
        return objective
    settings = dict(objective) if isinstance(objective, Mapping) else {"objective": objective}
    name = settings.pop("objective", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(
            f"objective is an Objective, such as NPO(beta=0.1), or one of {', '.join(OBJECTIVES)}; got {name!r}."
        )
    foreign = sorted(set(settings) - set(options_of(name)))
    if foreign:
        raise ValueError(f"'{name}' has no setting {', '.join(foreign)}. It takes {', '.join(options_of(name))}.")
    return OBJECTIVES[name](**settings)


def settings_of(objective: Objective) -> dict[str, Any]:
    """An objective as flat settings, those by default too, as `read_objective` takes them.

    Args:
        objective: the objective.

    Returns:
        Its name under "objective", that of its class if it has none, and its settings.
    """
    names = {kind: name for name, kind in OBJECTIVES.items()}
    values = {setting.name: getattr(objective, setting.name) for setting in fields(objective)}
    return {"objective": names.get(type(objective), type(objective).__name__), **values}


def options_of(name: str) -> tuple[str, ...]:
    """The settings that an objective takes.

    Args:
        name: a name in `OBJECTIVES`.

    Returns:
        Their names.
    """
    return tuple(setting.name for setting in fields(OBJECTIVES[name]))
