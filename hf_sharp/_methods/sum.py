"""A loss of named terms with a method for each: smoothing where it is wanted, plain gradients elsewhere.

    descend sum_k weight_k method_k(L_k)

A batch is a dict of batches, {"forget": {...}, "retain": {...}}; the loss of a term is the host's loss of its part,
normalised over that term's rows or tokens in the window. Cost: the mean of the terms' costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_sharp._checks import check_at_least_zero
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method


@dataclass(frozen=True, init=False, repr=False)
class Sum(Method):
    """The weighted sum of the gradients that each term's method gives.

    Args:
        weights: the terms' weights, 1 where it has none.
        **methods: a method for each term of the batch, by its name.

    Example:
        >>> from hf_sharp import SAM, Perturbation, Plain
        >>> Sum(forget=SAM(Perturbation(rho=0.01)), retain=Plain(), weights={"retain": 2.0}).cost
        1.5
    """

    methods: dict[str, Method]
    weights: dict[str, float]

    def __init__(self, weights: Mapping[str, float] | None = None, **methods: Method) -> None:
        if not methods or not all(isinstance(m, Method) for m in methods.values()):
            raise ValueError(
                f"Sum takes a method for each term, such as forget=SAM(...), retain=Plain(); got {methods}."
            )
        for name, method in methods.items():
            if any(part.needs & {"parameters", "update"} for _, part in method.named_parts()):
                raise ValueError(f"{method!r} has a part in the whole update; it cannot have the term '{name}' alone.")
        foreign = sorted(set(weights or {}) - set(methods))
        if foreign:
            raise ValueError(
                f"weights names {', '.join(foreign)}, and the terms are {', '.join(methods)}: give each weight the "
                "name of a term."
            )
        for name, weight in (weights or {}).items():
            check_at_least_zero(weight, f"weights['{name}']")
        object.__setattr__(self, "methods", dict(methods))
        object.__setattr__(self, "weights", {name: float((weights or {}).get(name, 1.0)) for name in methods})
        object.__setattr__(self, "_state", {})

    def __repr__(self) -> str:
        terms = ", ".join(f"{name}={method!r}" for name, method in self.methods.items())
        return f"Sum({terms}, weights={self.weights!r})"

    @property
    def period(self) -> int:
        """The longest of the terms' own."""
        return max(method.period for method in self.methods.values())

    @property
    def needs(self) -> frozenset[str]:
        """Batches that are dicts of batches, one for each term."""
        return frozenset({"terms"})

    @property
    def cost(self) -> float:
        """The mean over the terms, taken to be of equal size."""
        return sum(method.cost for method in self.methods.values()) / len(self.methods)

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The terms' weights; each term's landscape gets the plan of that term's method."""
        for name, method in self.methods.items():
            landscape[name].plan = method.plan_first_pass(landscape[name])
        return FirstPass(terms=self.weights)

    def gradient(self, landscape: Landscape) -> Evaluation:
        """Term by term, added up in the memory of the first."""
        answers = [(self.methods[name].gradient(landscape[name]), weight) for name, weight in self.weights.items()]
        (first, weight), *others = answers
        loss, grad = first.loss * weight, first.donate().scale_(weight)
        for other, weight in others:
            loss, grad = loss + other.loss * weight, grad.add_(other.donate(), weight)
        return Evaluation(loss, grad)
