"""One canonical setting for every method, which all batteries share: a new method is one row here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import references
from hf_sharp import FisherMask, Method, Perturbation, Plain, asam, fisher_sam, fsam, sam, sam_on

NORMS = ("norm.weight", "norm.bias")  # of TinyMLP


@dataclass
class Case:
    """A method beside its dense reference.

    Args:
        method: makes the method; `method(0.0)` is the one that perturbs nothing.
        rule: the reference of the same settings.
        settings: keywords of the rule.
        radius: the radius that `method()` has.
    """

    method: Callable[..., Method]
    rule: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    radius: float = 0.0


def row(make: Callable[..., Method], rule: Callable[..., Any], radius: float, **settings: Any) -> Case:
    return Case(lambda rho=radius: make(rho=rho), rule, {"rho": radius, **settings}, radius)


METHODS = {
    "plain": Case(lambda rho=0.0: Plain(), references.plain),
    "sam": row(sam, references.sam, 0.05),
    "asam": row(lambda rho: asam(rho, eta=0.02), references.asam, 0.5, eta=0.02, on="weights"),
    "asam_all": row(lambda rho: asam(rho, eta=0.0, on="all"), references.asam, 0.2, eta=0.0, on="all"),
    "fsam": row(lambda rho: fsam(rho, keep=0.3, every=2), references.fsam, 0.05, keep=0.3, every=2),
    "fsam_tensor": row(
        lambda rho: fsam(rho, keep=0.4, every=3, scope="tensor", outside="never", renormalise=True),
        references.fsam,
        0.05,
        keep=0.4,
        every=3,
        scope="tensor",
        outside="never",
        renormalise=True,
    ),
    "sam_on": row(sam_on, references.sam_on, 0.1, subset=NORMS),
    "sam_on_adaptive": row(
        lambda rho: sam_on(rho, ball="adaptive", eta=0.05),
        references.sam_on,
        0.3,
        subset=NORMS,
        ball="adaptive",
        eta=0.05,
    ),
    "fisher_sam": row(lambda rho: fisher_sam(rho, eta=5.0), references.fisher_sam, 0.1, eta=5.0),
}
PERTURBING = {name: case for name, case in METHODS.items() if case.radius}
MASK = FisherMask(keep=0.3, every=2)
assert Perturbation(0.05, mask=MASK) == fsam(keep=0.3, every=2).perturbation
