# Written by `make generated` from the presets' signatures and docstrings.
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

from hf_sharp._perturbation.schedules import Schedule

MethodName = Literal[
    "asam",
    "bar",
    "bi_lora",
    "curvature_regularization",
    "fisher_sam",
    "flat_lora",
    "friendly_sam",
    "fsam",
    "gam",
    "gradient_penalty",
    "gsam",
    "lookbehind_sam",
    "looksam",
    "mesa",
    "msam",
    "plain",
    "previous_gradient_sam",
    "randomized_smoothing",
    "saf",
    "sam",
    "sam_on",
    "tram",
    "vasso",
    "wsam",
]
SCHEDULES: dict[str, Callable[[float, float], Schedule]]
SCHEDULE_OPTIONS: tuple[str, ...]

def schedule_settings(rho: Any) -> dict[str, Any]: ...

class Option(NamedTuple):
    kind: type
    help: str

def options_among(methods: Mapping[str, Callable[..., Any]]) -> dict[str, Option]: ...
def declare(cls: type, methods: Mapping[str, Callable[..., Any]]) -> None: ...

@dataclass
class Options:
    method: MethodName = "sam"
    _: KW_ONLY
    interval: int | None = None
    """The method at every so many steps only, plain training between (1 by default)."""
    start: float | None = None
    """The share of training that is plain before (0.0 by default)."""
    rho: float | None = None
    """The radius (0.05 by default, asam 0.5, fisher_sam 0.1, gam 0.2, msam 1.0, sam_on 0.5, tram 0.1)."""
    fraction: float | None = None
    """The share of the window that the ascent gradient is taken on (1.0 by default)."""
    lam: float | None = None
    """curvature_regularization (1.0), gradient_penalty (0.04): weight of the penalty. friendly_sam (0.9): how much of
    the old mean a step keeps. mesa (0.8), saf (0.3): weight of the divergence."""
    eta: float | None = None
    """asam (0.01): added to |w| in T. fisher_sam (0.1): weight of the Fisher diagonal F, the squared gradient of the
    window. sam_on (0.01): of the adaptive ball. tram (None): added to |w|."""
    per_rank: bool | None = None
    """asam (False), fisher_sam (False), sam (False), sam_on (False): under DDP each rank ascends by its own rows
    (m-sharpness), without communication."""
    sigma: float | None = None
    """flat_lora (0.05): the last noise, reached from zero along half a cosine, in units of a row's root mean square.
    friendly_sam (1.0): how much of the mean is taken away. randomized_smoothing (0.001): standard deviation of
    the noise on every weight. tram (0.1): standard deviation of the noise on the embedded inputs, for "noise"
    and "fisher"."""
    alpha: float | None = None
    """gam (0.1): weight of the flatness. gsam (0.4): how much of the orthogonal part is removed. looksam (0.7): weight
    of the reused part."""
    r: float | None = None
    """curvature_regularization (0.001), gam (0.02): length of the differences. gradient_penalty (0.05): length of the
    difference."""
    every: int | None = None
    """fsam (100): how many steps a mask is used. looksam (5): SAM at steps that this divides."""
    mu: float | None = None
    """bar (0.5): strength, times the learning rate. curvature_regularization (0.01): how far along the gradient its
    turn is measured."""
    on: str | None = None
    """asam (weights), sam_on (weights): "weights" or "all"."""
    samples: int | None = None
    """fsam (32): rows for "per_sample". randomized_smoothing (3): draws a step."""
    temperature: float | None = None
    """mesa (5.0), saf (5.0): divides the logits."""
    ball: str | None = None
    """sam_on (l2): "l2" or "adaptive" (as in ASAM)."""
    decay: float | None = None
    """mesa (0.999): how much of the old average a step keeps."""
    embeddings: str | None = None
    """fsam (modules): told by "modules" or by "names"."""
    fisher: str | None = None
    """fsam (batch): "batch" or "per_sample"."""
    gamma: float | None = None
    """wsam (0.9): weight of the sharpness in [0, 1)."""
    keep: float | None = None
    """fsam (0.1): the share of eligible entries that is perturbed."""
    kind: str | None = None
    """bar (n): "n" balances by the gradients (nBAR), "o" by the weights (oBAR)."""
    kl: str | None = None
    """tram (forward): "forward" as in the paper, "reverse" or "symmetric"."""
    lag: int | None = None
    """saf (3): how many visits ago."""
    max_radius: float | None = None
    """tram (None): the radius is at most this."""
    minimize_fp: bool | None = None
    """gsam (True): True descends the perturbed loss, as in the paper."""
    outside: str | None = None
    """fsam (always): biases, embeddings and BatchNorm are "always" perturbed or "never"."""
    rank: int | None = None
    """bi_lora (8): of the auxiliary."""
    reference: str | None = None
    """tram (previous): "previous", "pretrained", "noise" or "fisher"."""
    renormalise: bool | None = None
    """fsam (False): True gives the masked perturbation the full radius."""
    rho_min: float | None = None
    """gsam (None): the radius at learning rate zero."""
    scale: float | None = None
    """tram (1.0): times the divergence."""
    scope: str | None = None
    """fsam (global): the largest entries of the whole network ("global") or of each tensor ("tensor")."""
    steps: int | None = None
    """lookbehind_sam (2): ascent steps."""
    theta: float | None = None
    """vasso (0.9): weight of the present gradient in (0, 1]."""
    rho_schedule: str | None = None
    """Radius over time: constant, linear, cosine, follows_lr, zero_during_warmup."""
    rho_end: float | None = None
    """Last radius of a schedule (0 where none is said)."""
