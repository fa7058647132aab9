"""Which method smooths which term of an objective, and how both are written down."""

from __future__ import annotations

import math
from typing import Any

from hf_sharp._integrations.record import columns_of, plain_value
from hf_sharp._methods import Method, Plain, Sum
from hf_sharp._presets.config import MethodLike, read_method
from hf_sharp.unlearning._objectives.base import Objective
from hf_sharp.unlearning._objectives.names import settings_of

FORGET = "forget"


def sum_of(method: MethodLike, objective: Objective) -> Sum:
    """The method of each term.

    Args:
        method: what the trainer was given.
        objective: the objective.

    Returns:
        A `Sum` over the objective's terms.

    Raises:
        ValueError: if a given `Sum` has other terms, or contradicts the objective's weights.
    """
    weights = objective.weights
    if not isinstance(method, Sum):
        smoothing = Plain() if method is None else read_method(method)[0]
        assert smoothing is not None
        methods: dict[str, Method] = {name: smoothing if name == FORGET else Plain() for name in weights}
        return Sum(weights, **methods)
    if set(method.methods) != set(weights):
        given = ", ".join(method.methods)
        raise ValueError(f"{objective!r} has the terms {', '.join(weights)}, and the method is a Sum of {given}.")
    if any(not math.isclose(weight, method.weights[name]) for name, weight in weights.items() if weight != 1):
        raise ValueError(
            f"The objective weighs its terms by {weights} and the Sum by {method.weights}. A Sum brings its own, 1 "
            f"where it says none: give it weights={weights}."
        )
    return method


def objective_record(objective: Objective) -> dict[str, Any]:
    """An objective as a flat file holds it.

    Args:
        objective: the objective.

    Returns:
        Its name under "objective", and its settings.
    """
    return {name: plain_value(value) for name, value in settings_of(objective).items()}


def smoothing_of(method: Sum) -> Method:
    """What smooths an unlearning.

    Args:
        method: the method of each term.

    Returns:
        That of the forget term where the others are plain, as a trainer takes it; else all of them.
    """
    others = [inner for name, inner in method.methods.items() if name != FORGET]
    return method.methods[FORGET] if all(isinstance(inner, Plain) for inner in others) else method


def unlearning_columns(method: Sum, objective: Objective) -> dict[str, Any]:
    """An unlearning as one row of a table of experiments.

    Args:
        method: the method of each term.
        objective: the objective.

    Returns:
        What smooths as `sharp_...`, and the objective and its settings as `unlearn_...`.
    """
    columns = columns_of(smoothing_of(method))
    return columns | {f"unlearn_{name}": value for name, value in objective_record(objective).items()}
