"""One canonical setting for every method, which all batteries share: a new method is one row here."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import family
import family_outputs
import models
import references
from hf_sharp import (
    SAM,
    Adaptive,
    After,
    Every,
    Method,
    Perturbation,
    Plain,
    WithProbability,
    asam,
    curvature_regularization,
    fisher_sam,
    friendly_sam,
    fsam,
    gam,
    gradient_penalty,
    gsam,
    lookbehind_sam,
    looksam,
    mesa,
    msam,
    previous_gradient_sam,
    randomized_smoothing,
    saf,
    sam,
    sam_on,
    tram,
    vasso,
    wsam,
)

NORMS = ("norm.weight", "norm.bias")  # of TinyMLP
SEED = 42  # that of TrainingArguments
SHAPES = references.mlp_shapes()
LOGITS = family_outputs.mlp_logits(SHAPES)


@dataclass
class Case:
    """A method beside its dense reference.

    Args:
        method: makes the method; `method(0.0)` is the one that must be plain training.
        rule: the reference of the same settings.
        settings: keywords of the rule.
        moves: whether the weights are shifted.
        tolerance: of weights after five steps; larger where differences of gradients are taken.
        steps: a period, over which the passes are counted.
        visits: whether it knows samples again: the data are then few rows with numbers, seen often.
        spread: by how much the mean number of passes may differ from the cost, where chance or data decide.
    """

    method: Callable[..., Method]
    rule: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    moves: bool = True
    tolerance: float = 1e-10
    steps: int = 6
    spread: float = 0.0
    visits: bool = False


def row(make: Callable[..., Method], rule: Callable[..., Any], rho: float, **settings: Any) -> Case:
    """A case whose strength is its radius."""
    return Case(lambda strength=1.0: make(rho=strength * rho), rule, {"rho": rho, **settings})


METHODS = {
    "plain": Case(lambda strength=1.0: Plain(), references.plain, moves=False),
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
    "gsam": Case(
        lambda strength=1.0: gsam(0.1 * strength, rho_min=0.02 * strength, alpha=0.4),
        family.gsam,
        {"rho": 0.1, "rho_min": 0.02, "alpha": 0.4},
    ),
    "gsam_here": Case(
        lambda strength=1.0: gsam(0.1 * strength, rho_min=0.0, alpha=0.5, minimize_fp=False),
        family.gsam,
        {"rho": 0.1, "rho_min": 0.0, "alpha": 0.5, "minimize_fp": False},
    ),
    "looksam": row(lambda rho: looksam(rho, every=3, alpha=0.6), family.looksam, 0.05, every=3, alpha=0.6),
    "msam": row(msam, family.msam, 0.2),
    "previous_gradient_sam": row(previous_gradient_sam, family.previous_gradient_sam, 0.1),
    "friendly_sam": row(
        lambda rho: friendly_sam(rho, sigma=0.9, lam=0.8), family.friendly_sam, 0.05, sigma=0.9, lam=0.8
    ),
    "vasso": row(lambda rho: vasso(rho, theta=0.6), family.vasso, 0.05, theta=0.6),
    "wsam": row(lambda rho: wsam(rho, gamma=0.8), family.wsam, 0.05, gamma=0.8),
    "lookbehind_sam": row(lambda rho: lookbehind_sam(rho, steps=3), family.lookbehind_sam, 0.05, k=3),
    "gam": row(lambda rho: gam(rho, r=0.02, alpha=0.3), family.gam, 0.1, r=0.02, alpha=0.3),
    "tram_previous": Case(
        lambda strength=1.0: tram("previous", scale=50.0 * strength),
        family_outputs.tram,
        {"logits_fn": LOGITS, "reference": "previous", "scale": 50.0},
    ),
    "tram_pretrained": Case(
        lambda strength=1.0: tram("pretrained", kl="symmetric", scale=20.0 * strength, max_radius=0.3, eta=0.01),
        family_outputs.tram,
        {
            "logits_fn": LOGITS,
            "reference": "pretrained",
            "kl": "symmetric",
            "scale": 20.0,
            "max_radius": 0.3,
            "eta": 0.01,
        },
    ),
    "tram_noise": Case(
        lambda strength=1.0: tram("noise", sigma=0.3, kl="reverse", scale=3.0 * strength),
        family_outputs.tram,
        {"logits_fn": LOGITS, "reference": "noisy", "sigma": 0.3, "kl": "reverse", "scale": 3.0, "seed": SEED},
    ),
    "tram_fisher": Case(
        lambda strength=1.0: tram("fisher", sigma=0.3, rho=0.1 * strength, eta=5.0),
        family_outputs.tram_fisher,
        {
            "noisy_loss_fn": family_outputs.noisy_loss(LOGITS),
            "sigma": 0.3,
            "rho": 0.1,
            "eta": 5.0,
            "seed": SEED,
        },
    ),
    "randomized_smoothing": Case(
        lambda strength=1.0: randomized_smoothing(0.02 * strength, samples=3),
        family.randomized_smoothing,
        {"sigma": 0.02, "samples": 3, "seed": SEED, "shapes": SHAPES},
    ),
    "gradient_penalty": Case(
        lambda strength=1.0: gradient_penalty(lam=0.05 * strength, r=0.02),
        family.gradient_penalty,
        {"lam": 0.05, "r": 0.02},
    ),
    "curvature_regularization": Case(
        lambda strength=1.0: curvature_regularization(lam=0.2 * strength, mu=0.05, r=0.01),
        family.curvature_regularization,
        {"lam": 0.2, "mu": 0.05, "r": 0.01},
    ),
    "mesa": Case(
        lambda strength=1.0: mesa(lam=2.0 * strength, decay=0.7, temperature=2.0),
        family_outputs.mesa,
        {"logits_fn": LOGITS, "lam": 2.0, "decay": 0.7, "temperature": 2.0},
        moves=False,
    ),
    "saf": Case(
        lambda strength=1.0: saf(lam=3.0 * strength, lag=1, temperature=2.0),
        family_outputs.saf,
        {"logits_fn": LOGITS, "lam": 3.0, "lag": 1, "temperature": 2.0},
        moves=False,
        visits=True,
    ),
    "every": Case(
        lambda strength=1.0: Every(2, vasso(0.05 * strength, theta=0.5)),
        functools.partial(family.every, interval=2, inner=family.vasso, rho=0.05, theta=0.5),
    ),
    "after": Case(
        lambda strength=1.0: After(0.5, SAM(Perturbation(0.05 * strength))),
        functools.partial(family.after, start=0.5, inner=references.sam, rho=0.05),
    ),
    "with_probability": Case(
        lambda strength=1.0: WithProbability(0.5, sam(0.05 * strength)),
        functools.partial(family.with_probability, p=0.5, seed=SEED, inner=references.sam, rho=0.05),
        steps=100,
        spread=0.1,
    ),
    "adaptive": Case(
        lambda strength=1.0: Adaptive(sam(0.05 * strength), decay=0.6),
        functools.partial(family.adaptive, decay=0.6, inner=references.sam, rho=0.05),
        steps=100,
        spread=0.15,
    ),
    "sam_fraction": row(
        lambda rho: sam(rho, fraction=0.5),
        functools.partial(family_outputs.fraction, share=0.5, batch_loss=references.mlp_loss(SHAPES)),
        0.05,
    ),
}


def rows_for(name: str, rows: models.Rows) -> models.Rows:
    """The rows that a method is trained on: as they are, or a few of them again and again, with their numbers."""
    if not METHODS[name].visits:
        return rows
    few = rows[:8]
    return [{**few[i % 8], "sample_index": torch.tensor(i % 8)} for i in range(len(rows))]


MOVING = {name: case for name, case in METHODS.items() if case.moves}
