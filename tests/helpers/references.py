"""Dense float64 programs written from the papers, to compare the library with. Imports torch and nothing of ours.

Everything is one flat vector `w`. A `Layout` says which slice of it is which parameter, in the model's own order:

* a rule, `rule(grad_fn, w, layout, state, step, **settings) -> g`, returns the gradient that the optimizer is given;
  `grad_fn(w)` is the gradient of the whole window's loss, `state` a dict that the rule keeps between steps;
* an optimizer, `optimizer(w, g, memory, factor) -> w`, is made by `sgd(...)` or `adamw(...)`;
* `trajectory(...)` runs a rule with an optimizer over windows of micro-batches; the weights after each step.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

Layout = dict[str, slice]
GradFn = Callable[[Tensor], Tensor]
LossFn = Callable[[Tensor, Any], Tensor]
Optimizer = Callable[[Tensor, Tensor, dict, float], Tensor]

TINY = 1e-12


# ---- flat vectors -----------------------------------------------------------------------------------------------


def layout_of(shapes: Mapping[str, Sequence[int]]) -> Layout:
    """The slice of each named tensor when all are laid end to end."""
    layout, start = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        layout[name] = slice(start, start + size)
        start += size
    return layout


def entrywise(layout: Layout, value: Callable[[str], float]) -> Tensor:
    """A vector that holds value(name) on every entry of that tensor: how parameter groups are expressed here."""
    vector = torch.empty(max(part.stop for part in layout.values()), dtype=torch.float64)
    for name, part in layout.items():
        vector[part] = value(name)
    return vector


def flat(model: torch.nn.Module) -> Tensor:
    """The trainable parameters of a model laid end to end, tied ones once."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def functional(model: torch.nn.Module) -> tuple[Tensor, Layout, LossFn]:
    """A model that returns {"loss": ...} as (w0, layout, loss_fn(w, batch)); the model itself is not touched.

    Dropout, if any, draws from the global stream; buffers move on a private copy of the model.
    """
    private = copy.deepcopy(model)
    shapes = {name: p.shape for name, p in private.named_parameters() if p.requires_grad}
    layout = layout_of(shapes)

    def loss_fn(w: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        tensors = {name: w[part].view(shapes[name]) for name, part in layout.items()}
        return functional_call(private, tensors, kwargs=dict(batch))["loss"]

    return flat(model), layout, loss_fn


def window_gradient(loss_fn: LossFn, w: Tensor, window: Sequence[Any]) -> Tensor:
    """Gradient at w of the mean of the micro-batch losses of one accumulation window."""
    w = w.detach().clone().requires_grad_(True)
    loss = torch.stack([loss_fn(w, batch) for batch in window]).mean()
    return torch.autograd.grad(loss, w)[0]


# ---- a small model as a pure function ---------------------------------------------------------------------------


def mlp_shapes(vocab: int = 11, width: int = 6, hidden: int = 8, classes: int = 3) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `mlp_loss`'s parameters; `models.TinyMLP` has the same, in this order."""
    return {
        "embed.weight": (vocab, width),
        "hidden.weight": (hidden, width),
        "hidden.bias": (hidden,),
        "norm.weight": (hidden,),
        "norm.bias": (hidden,),
        "head.weight": (classes, hidden),
        "head.bias": (classes,),
    }


def mlp_loss(shapes: Mapping[str, tuple[int, ...]], norm: str = "layer") -> LossFn:
    """loss_fn(w, {"x": (rows, tokens), "labels": (rows,)}): mean embedding, tanh layer, norm, linear head, CE."""
    layout = layout_of(shapes)

    def loss_fn(w: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        p = {name: w[part].view(shapes[name]) for name, part in layout.items()}
        pooled = p["embed.weight"][batch["x"]].mean(dim=1)
        h = torch.tanh(pooled @ p["hidden.weight"].T + p["hidden.bias"])
        over = 1 if norm == "layer" else 0
        spread = (h.var(dim=over, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = (h - h.mean(dim=over, keepdim=True)) / spread * p["norm.weight"] + p["norm.bias"]
        return F.cross_entropy(h @ p["head.weight"].T + p["head.bias"], batch["labels"])

    return loss_fn


# ---- gradient rules ---------------------------------------------------------------------------------------------


def plain(grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int) -> Tensor:
    """The gradient itself."""
    return grad_fn(w)


def sam(grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float) -> Tensor:
    """Foret et al. 2021: e = rho g / ||g||."""
    g = grad_fn(w)
    e = state["e"] = rho * g / g.norm().clamp_min(TINY)
    return grad_fn(w + e)


def asam(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, eta: float, on: str = "weights"
) -> Tensor:
    """Kwon et al. 2021: e = rho T^2 g / ||T g||, with T = |w| + eta on weight tensors (or on all) and 1 elsewhere."""
    g = grad_fn(w)
    t = scaling(w, layout, eta, on)
    e = state["e"] = rho * t**2 * g / (t * g).norm().clamp_min(TINY)
    return grad_fn(w + e)


def scaling(w: Tensor, layout: Layout, eta: float, on: str) -> Tensor:
    """ASAM's T; `on="weights"` goes by the name, as the authors' program does."""
    t = w.abs() + eta
    if on == "all":
        return t
    return torch.where(entrywise(layout, _is_weight).bool(), t, torch.ones_like(t))


def _is_weight(name: str) -> bool:
    return any(part == "weight" or part.startswith("weight_") for part in name.split("."))


def fsam(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    rho: float,
    keep: float,
    every: int,
    scope: str = "global",
    outside: str = "always",
    renormalise: bool = False,
    batch_norm: Collection[str] = (),
) -> Tensor:
    """Zhong et al. 2022, the Fisher mask: e = rho g / ||g|| on the kept entries, the norm being over all of g.

    `batch_norm` names the parameters of BatchNorm layers, which stand outside the mask like biases and embeddings.
    """
    g = grad_fn(w)
    if step % every == 0:
        state["mask"] = fisher_mask(g**2, layout, keep, scope, outside, batch_norm)
    masked = torch.where(state["mask"], g, torch.zeros_like(g))
    length = (masked if renormalise else g).norm().clamp_min(TINY)
    e = state["e"] = rho * masked / length
    return grad_fn(w + e)


def fisher_mask(
    fisher: Tensor, layout: Layout, keep: float, scope: str, outside: str, batch_norm: Collection[str] = ()
) -> Tensor:
    """True on the int(keep * eligible) largest eligible entries (ties: lowest index), if "always" outside too."""
    stands_outside = {name for name in layout if "bias" in name or "embed" in name or name in set(batch_norm)}
    eligible = entrywise(layout, lambda name: name not in stands_outside).bool()
    mask = ~eligible if outside == "always" else torch.zeros_like(eligible)
    everything = torch.arange(fisher.numel())
    if scope == "global":
        pools = [everything[eligible]]
    else:
        pools = [everything[part] for name, part in layout.items() if name not in stands_outside]
    for pool in pools:
        order = fisher[pool].sort(descending=True, stable=True).indices
        mask[pool[order[: int(keep * pool.numel())]]] = True
    return mask


def sam_on(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    rho: float,
    subset: Collection[str],
    ball: str = "l2",
    eta: float = 0.01,
    on: str = "weights",
) -> Tensor:
    """Mueller et al. 2023: only the subset (the norm layers) moves, and the norm is over the subset."""
    g = grad_fn(w) * entrywise(layout, lambda name: name in set(subset))
    t = scaling(w, layout, eta, on) if ball == "adaptive" else torch.ones_like(w)
    e = state["e"] = rho * t**2 * g / (t * g).norm().clamp_min(TINY)
    return grad_fn(w + e)


def fisher_sam(
    grad_fn: GradFn, w: Tensor, layout: Layout, state: dict, step: int, *, rho: float, eta: float
) -> Tensor:
    """Kim et al. 2022, the Fisher metric: e = rho D g / sqrt(g' D g), D = 1 / (1 + eta g^2)."""
    g = grad_fn(w)
    d = 1 / (1 + eta * g**2)
    e = state["e"] = rho * d * g / (g @ (d * g)).sqrt().clamp_min(TINY)
    return grad_fn(w + e)


# ---- optimizers -------------------------------------------------------------------------------------------------


def sgd(lr: float | Tensor, momentum=0.0, weight_decay: float | Tensor = 0.0, nesterov=False) -> Optimizer:
    """SGD as torch defines it: the first buffer is the gradient itself, weight decay is part of the gradient."""

    def update(w: Tensor, g: Tensor, memory: dict, factor: float = 1.0) -> Tensor:
        d = g + weight_decay * w
        if momentum:
            memory["buffer"] = momentum * memory["buffer"] + d if "buffer" in memory else d
            d = d + momentum * memory["buffer"] if nesterov else memory["buffer"]
        return w - factor * lr * d

    return update


def adamw(lr: float | Tensor, betas=(0.9, 0.999), eps=1e-8, weight_decay: float | Tensor = 0.0) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019) as torch defines it: weights decay first, by lr times weight_decay."""

    def update(w: Tensor, g: Tensor, memory: dict, factor: float = 1.0) -> Tensor:
        t = memory["t"] = memory.get("t", 0) + 1
        m = memory["m"] = betas[0] * memory.get("m", torch.zeros_like(w)) + (1 - betas[0]) * g
        v = memory["v"] = betas[1] * memory.get("v", torch.zeros_like(w)) + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        return w * (1 - factor * lr * weight_decay) - factor * lr * m_hat / (v_hat.sqrt() + eps)

    return update


def clip(g: Tensor, max_norm: float) -> Tensor:
    """Global-norm clipping by torch's convention, with its 1e-6 in the denominator."""
    return g * (max_norm / (g.norm() + 1e-6)).clamp(max=1.0)


def linear_decay(total: int, warmup: int = 0) -> Callable[[int], float]:
    """The Trainer's default schedule, as a factor of the learning rate."""
    return lambda step: step / warmup if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


# ---- the loop ---------------------------------------------------------------------------------------------------


def trajectory(
    rule: Callable[..., Tensor],
    loss_fn: LossFn,
    w0: Tensor,
    batches: Sequence[Sequence[Any]],
    optimizer: Optimizer,
    steps: int,
    *,
    layout: Layout,
    max_norm: float | None = None,
    lr_factor: Callable[[int], float] = lambda step: 1.0,
    state: dict | None = None,
    **settings: Any,
) -> list[Tensor]:
    """The weights after each step.

    Args:
        rule: the gradient rule; `settings` are its keywords.
        loss_fn: loss of flat weights and one micro-batch, a mean over its rows.
        w0: flat float64 start.
        batches: windows, each a list of micro-batches; a window's loss is the mean of theirs. Taken round and round.
        optimizer: from `sgd` or `adamw`; lr and weight_decay may be vectors made by `entrywise`.
        steps: number of optimizer steps.
        layout: which slice of the vector is which parameter.
        max_norm: global-norm clipping of the gradient handed to the optimizer, or None.
        lr_factor: step -> factor of the learning rate.
        state: a dict to look into afterwards (the last perturbation `e`, the mask); fresh if None.
        **settings: keywords of the rule.
    """
    w, memory, path = w0.detach().clone(), {}, []
    state = {} if state is None else state
    for step in range(steps):
        window = batches[step % len(batches)]
        state["now"] = {"lr_factor": lr_factor(step), "memory": memory, "window": window, "steps": steps}
        g = rule(lambda v, window=window: window_gradient(loss_fn, v, window), w, layout, state, step, **settings)
        w = optimizer(w, g if max_norm is None else clip(g, max_norm), memory, lr_factor(step))
        path.append(w)
    return path
