"""Dense float64 rules for the family around SAM, written from the papers. Imports torch and `references` only.

Signature and conventions are those of `references`. `trajectory` fills `state["now"]`: the learning-rate factor, the
optimizer's memory, the present window and the number of steps. A rule leaves its perturbation in `state["e"]`. Rules
that look into the window themselves are in `family_outputs`.

Throughout: g = gradient at w, e = perturbation, gs = gradient at w + e, norms over the whole vector.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from references import TINY, GradFn, Layout, LossFn, plain

Rule = Callable[..., Tensor]


def unit(v: Tensor) -> Tensor:
    return v / v.norm().clamp_min(TINY)


def now(state: dict, key: str, default: Any = None) -> Any:
    """What `trajectory` says of the present step; `default` where the rule is called by itself."""
    return state.get("now", {}).get(key, default)


def drawn(seed: int, step: int, tag: str, shape: Sequence[int], sample: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Float32 numbers of a private generator that depends on seed, step and tag only."""
    digest = blake2b(f"{seed}/{step}/{tag}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return sample(tuple(shape), generator=generator, dtype=torch.float32)


# ---- two gradients, combined ------------------------------------------------------------------------------------


def gsam(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    rho: float,
    rho_min: float,
    alpha: float,
    minimize_fp: bool = True,
) -> Tensor:
    """Zhuang et al. 2022: gs - alpha g_orth, g_orth = the part of g orthogonal to gs; the radius follows the lr.

    Without `minimize_fp`: g + alpha gs_orth, where gs_orth is the part of gs orthogonal to g.
    """
    factor = min(1.0, max(0.0, now(state, "lr_factor", 1.0)))
    g = grad_fn(w)
    e = state["e"] = (rho_min + (rho - rho_min) * factor) * unit(g)
    gs = grad_fn(w + e)
    if minimize_fp:
        return gs - alpha * orthogonal(g, gs)
    return g + alpha * orthogonal(gs, g)


def orthogonal(a: Tensor, b: Tensor) -> Tensor:
    """The part of a that is orthogonal to b."""
    return a - (a @ unit(b)) * unit(b)


def looksam(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, every: int, alpha: float
) -> Tensor:
    """Liu et al. 2022: every k-th step gs; between them g + alpha ||g|| o, o = the last gs_orth / ||gs_orth||."""
    g = grad_fn(w)
    if step % every != 0 and "o" in state:
        return g + alpha * g.norm() * state["o"]
    e = state["e"] = rho * unit(g)
    gs = grad_fn(w + e)
    gv = orthogonal(gs, g)
    noise = 100 * torch.finfo(gs.dtype).eps * gs.norm()
    state["o"] = torch.zeros_like(gv) if gv.norm() < noise else unit(gv)
    return gs


def wsam(grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, gamma: float) -> Tensor:
    """Yue et al. 2023, coupled: (1 - a) g + a gs, a = gamma / (1 - gamma)."""
    a = gamma / (1 - gamma)
    g = grad_fn(w)
    e = state["e"] = rho * unit(g)
    return (1 - a) * g + a * grad_fn(w + e)


def gam(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, r: float, alpha: float
) -> Tensor:
    """Zhang et al. 2023: g + alpha rho grad ||grad L||(w_adv), w_adv = w + rho f/||f||, f = grad ||grad L||(w).

    Both gradients of a norm are differences of length r along the gradient.
    """
    g = grad_fn(w)
    f = (grad_fn(w + r * unit(g)) - g) / r
    e = state["e"] = rho * unit(f)
    g2 = grad_fn(w + e)
    g3 = grad_fn(w + e + r * unit(g2))
    return g + alpha * rho * (g3 - g2) / r


# ---- another direction ------------------------------------------------------------------------------------------


def msam(grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, warmup: int = 0) -> Tensor:
    """Becker et al. 2025: the gradient at w - rho m/||m||, m = the optimizer's momentum; w while there is none.

    `warmup`: the number of steps of the learning-rate warm-up, in which nothing is shifted.
    """
    memory = now(state, "memory", {})
    m = memory.get("buffer", memory.get("m"))
    e = state["e"] = torch.zeros_like(w) if m is None or step < warmup else -rho * unit(m)
    return grad_fn(w + e)


def previous_gradient_sam(grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float) -> Tensor:
    """S2-SAM, AsyncSAM, DP-SAT: e = rho g'/||g'||, g' = what this rule returned the last time; e = 0 at first."""
    e = state["e"] = rho * unit(state.get("returned", torch.zeros_like(w)))
    g = state["returned"] = grad_fn(w + e)
    return g


def friendly_sam(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, sigma: float, lam: float
) -> Tensor:
    """Li et al. 2024, the authors' program: d = g - sigma m, then m = lam m + (1 - lam) g; at first d = m = g."""
    g = grad_fn(w)
    if "m" in state:
        d = g - sigma * state["m"]
        state["m"] = lam * state["m"] + (1 - lam) * g
    else:
        d = state["m"] = g
    e = state["e"] = rho * unit(d)
    return grad_fn(w + e)


def vasso(grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, theta: float) -> Tensor:
    """Li and Giannakis 2023: d = (1 - theta) d + theta g, at first d = g; e = rho d/||d||."""
    g = grad_fn(w)
    d = state["d"] = (1 - theta) * state["d"] + theta * g if "d" in state else g
    e = state["e"] = rho * unit(d)
    return grad_fn(w + e)


def randomized_smoothing(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    sigma: float,
    samples: int,
    seed: int,
    shapes: Mapping[str, Sequence[int]],
) -> Tensor:
    """The mean of the gradients at w + sigma z_k, z_k standard normal, drawn by parameter."""
    total = torch.zeros_like(w)
    for k in range(samples):
        z = torch.empty_like(w)
        for name, part in layout.items():
            z[part] = drawn(seed, step, f"{k}/{name}", shapes[name]).reshape(-1)
        total = total + grad_fn(w + sigma * z)
    return total / samples


def lookbehind_sam(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, k: int
) -> Tensor:
    """Mordido et al. 2024: k ascent steps, each along the gradient before it; fast weights descend every gradient.

    The slow weights go the share 1/k of the way, with inner learning rate 1: the change of w is what is descended.
    """
    climbed, fast, g = w, w, grad_fn(w)
    for _ in range(k):
        climbed = climbed + rho * unit(g)
        state.setdefault("e", climbed - w)
        g = grad_fn(climbed)
        fast = fast - g
    return -(fast - w) / k


# ---- penalties, by differences and by double backward -----------------------------------------------------------


def gradient_penalty(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, lam: float, r: float
) -> Tensor:
    """Zhao et al. 2022: the gradient of L + lam ||grad L||, as g + (lam/r) (gs - g), e = r g/||g||."""
    g = grad_fn(w)
    e = state["e"] = r * unit(g)
    return g + lam / r * (grad_fn(w + e) - g)


def curvature_regularization(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, lam: float, mu: float, r: float
) -> Tensor:
    """The gradient of L + lam ||D||, D = grad L(w + mu v) - grad L(w), v = g/||g|| constant, by differences.

    It is g + lam (H(w + mu v) - H(w)) D/||D||, and each product H(.) x is (grad L(. + r x) - grad L(.)) / r.
    """
    here = grad_fn(w)
    away = mu * unit(here)
    there = grad_fn(w + away)
    n = r * unit(there - here)
    bend = (grad_fn(w + away + n) - there) - (grad_fn(w + n) - here)
    return here + lam / r * bend


def gradient_penalty_exact(loss_fn: LossFn, w: Tensor, window: Sequence[Any], lam: float) -> Tensor:
    """The gradient of L + lam ||grad L|| by double backward."""
    w = w.detach().clone().requires_grad_(True)
    loss = _mean_loss(loss_fn, w, window)
    g = torch.autograd.grad(loss, w, create_graph=True)[0]
    return torch.autograd.grad(loss + lam * g.norm(), w)[0]


def curvature_exact(loss_fn: LossFn, w: Tensor, window: Sequence[Any], lam: float, mu: float) -> Tensor:
    """The gradient of L + lam ||grad L(w + mu v) - grad L(w)||, v = g/||g|| constant, by double backward."""
    w = w.detach().clone().requires_grad_(True)
    loss = _mean_loss(loss_fn, w, window)
    here = torch.autograd.grad(loss, w, create_graph=True)[0]
    away = w + mu * unit(here.detach())
    there = torch.autograd.grad(_mean_loss(loss_fn, away, window), away, create_graph=True)[0]
    return torch.autograd.grad(loss + lam * (there - here).norm(), w)[0]


def _mean_loss(loss_fn: LossFn, w: Tensor, window: Sequence[Any]) -> Tensor:
    return torch.stack([loss_fn(w, batch) for batch in window]).mean()


# ---- combinators: rules made of a rule; `settings` are those of `inner` -----------------------------------------


def every(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, interval: int, inner: Rule, **settings: Any
) -> Tensor:
    """The inner rule at every interval-th step, the plain gradient at the others."""
    rule, settings = (inner, settings) if step % interval == 0 else (plain, {})
    return rule(grad_fn, w, layout, state, step, **settings)


def with_probability(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    p: float,
    seed: int,
    inner: Rule,
    **settings: Any,
) -> Tensor:
    """Zhao et al. 2022 (SS-SAM): the inner rule with probability p, else the plain gradient."""
    taken = bool(drawn(seed, step, "WithProbability", (), torch.rand) < p)
    state.setdefault("taken", []).append(taken)
    rule, settings = (inner, settings) if taken else (plain, {})
    return rule(grad_fn, w, layout, state, step, **settings)


def after(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, start: float, inner: Rule, **settings: Any
) -> Tensor:
    """The plain gradient while step < start * steps, then the inner rule."""
    rule, settings = (plain, {}) if step < start * now(state, "steps") else (inner, settings)
    return rule(grad_fn, w, layout, state, step, **settings)


def adaptive(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    lam1: float = -1.0,
    lam2: float = 1.0,
    decay: float = 0.9,
    inner: Rule,
    **settings: Any,
) -> Tensor:
    """Jiang et al. 2023 (AE-SAM): the inner rule where s = ||g||^2 >= mu + c sqrt(var), c from lam2 down to lam1.

    mu and var are running means of s and of (s - mu)^2, the latter with the new mu; at first mu = s and var = 0.
    """
    g = grad_fn(w)
    s = g @ g
    mu, var = state.get("spread", (s, torch.zeros_like(s)))
    mu = decay * mu + (1 - decay) * s if "spread" in state else s
    var = decay * var + (1 - decay) * (s - mu) ** 2
    state["spread"] = mu, var
    t = step / now(state, "steps")
    taken = bool(s >= mu + (lam1 * t + lam2 * (1 - t)) * var.sqrt())
    state.setdefault("taken", []).append(taken)
    return inner(grad_fn, w, layout, state, step, **settings) if taken else g
