"""Dense float64 rules that look into the window: TRAM, MESA, SAF, and an ascent gradient from part of the window.

`logits_fn(w, batch, noise=None)` gives the logits of one micro-batch, with `noise` (rows, tokens, width) added to what
the embeddings give. Logits of two dimensions are one position a row; of three, one a token, valid where the label is
not -100; with `causal` the label of a position is the next token's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from family import Rule, drawn, now
from references import TINY, GradFn, Layout, LossFn, layout_of, sam, scaling, window_gradient

Batch = Mapping[str, Tensor]
LogitsFn = Callable[..., Tensor]


def mlp_logits(shapes: Mapping[str, tuple[int, ...]]) -> LogitsFn:
    """logits_fn(w, {"x": (rows, tokens)}, noise=None) of the model of `references.mlp_loss`."""
    layout = layout_of(shapes)

    def logits_fn(w: Tensor, batch: Batch, noise: Tensor | None = None) -> Tensor:
        p = {name: w[part].view(shapes[name]) for name, part in layout.items()}
        embedded = p["embed.weight"][batch["x"]]
        if noise is not None:
            embedded = embedded + noise
        h = torch.tanh(embedded.mean(dim=1) @ p["hidden.weight"].T + p["hidden.bias"])
        h = F.layer_norm(h, h.shape[1:], p["norm.weight"], p["norm.bias"], eps=1e-5)
        return h @ p["head.weight"].T + p["head.bias"]

    return logits_fn


def noisy_loss(logits_fn: LogitsFn) -> LossFn:
    """loss_fn(w, batch, noise=None): the cross-entropy of the logits."""
    return lambda w, batch, noise=None: F.cross_entropy(logits_fn(w, batch, noise), batch["labels"])


# ---- positions, divergence, noise -------------------------------------------------------------------------------


def positions(logits: Tensor, batch: Batch, causal: bool = False) -> Tensor:
    """The logits of the valid positions, one a row: (positions, classes)."""
    if logits.dim() == 2:
        return logits
    labels = batch["labels"]
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100]


def divergence(reference: Tensor, present: Tensor, kl: str = "forward") -> Tensor:
    """From logits, by position: KL(reference || present); "reverse" swaps the two, "symmetric" is the mean of both."""
    a, b = reference.log_softmax(-1), present.log_softmax(-1)
    forward, reverse = (a.exp() * (a - b)).sum(-1), (b.exp() * (b - a)).sum(-1)
    return {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kl]


def input_noise(
    window: Sequence[Batch], step: int, *, sigma: float, width: int, seed: int, inputs: str = "x"
) -> list[Tensor]:
    """N(0, sigma^2) noise for each micro-batch; a row's numbers depend on its place in the window, not on the cut."""
    noises, row = [], 0
    for batch in window:
        count, tokens = batch[inputs].shape
        z = [drawn(seed, step, f"input/{row + i}", (tokens, width)) for i in range(count)]
        noises.append(sigma * torch.stack(z).double())
        row += count
    return noises


# ---- TRAM -------------------------------------------------------------------------------------------------------


def tram(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    logits_fn: LogitsFn,
    reference: str = "previous",
    kl: str = "forward",
    scale: float = 1.0,
    max_radius: float | None = None,
    eta: float = 0.0,
    sigma: float = 0.1,
    width: int = 6,
    seed: int = 0,
    inputs: str = "x",
    causal: bool = False,
) -> Tensor:
    """Sherborne et al. 2024, Eq. 7: e = d T^2 g/||T g||, T = |w| + eta, d = min(scale * KL, max_radius).

    KL is the mean over the window's valid positions between the model and a reference: "previous", the weights of the
    last call; "pretrained", those of the first; "noisy", the present weights with noise on the embeddings.
    """
    window = now(state, "window")
    first, previous = state.setdefault("first", w), state.get("previous", w)
    state["previous"] = w
    noises = [None] * len(window)
    if reference == "noisy":
        noises = input_noise(window, step, sigma=sigma, width=width, seed=seed, inputs=inputs)
    against = {"previous": previous, "pretrained": first, "noisy": w}[reference]
    apart = [
        divergence(
            positions(logits_fn(against, batch, noise), batch, causal),
            positions(logits_fn(w, batch), batch, causal),
            kl,
        )
        for batch, noise in zip(window, noises, strict=True)
    ]
    d = scale * torch.cat(apart).mean()
    if max_radius is not None:
        d = d.clamp(max=max_radius)
    state["radius"] = d
    g = grad_fn(w)
    t = scaling(w, layout, eta, on="all")
    e = state["e"] = d * t**2 * g / (t * g).norm().clamp_min(TINY)
    return grad_fn(w + e)


def tram_fisher(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    noisy_loss_fn: LossFn,
    rho: float,
    sigma: float,
    eta: float,
    width: int = 6,
    seed: int = 0,
    inputs: str = "x",
) -> Tensor:
    """Sherborne et al. 2024, Eq. 8 and 9: e = rho D g/sqrt(g' D g), D = 1/(1 + eta F), F = (gradient at x + z)^2."""
    window = now(state, "window")
    noises = input_noise(window, step, sigma=sigma, width=width, seed=seed, inputs=inputs)
    v = w.detach().clone().requires_grad_(True)
    losses = [noisy_loss_fn(v, batch, noise) for batch, noise in zip(window, noises, strict=True)]
    fisher = torch.autograd.grad(torch.stack(losses).mean(), v)[0] ** 2
    g = grad_fn(w)
    d = 1 / (1 + eta * fisher)
    e = state["e"] = rho * d * g / (g @ (d * g)).sqrt().clamp_min(TINY)
    return grad_fn(w + e)


# ---- the loss against one's own past ----------------------------------------------------------------------------


def mesa(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    logits_fn: LogitsFn,
    lam: float,
    decay: float,
    temperature: float,
    causal: bool = False,
) -> Tensor:
    """Du et al. 2022: the gradient of L + lam T^2 mean KL(softmax(teacher/T) || softmax(now/T)).

    The teacher's weights are w at first, then decay * teacher + (1 - decay) * w, moved before each evaluation.
    """
    teacher = state["teacher"] = decay * state["teacher"] + (1 - decay) * w if "teacher" in state else w
    v = w.detach().clone().requires_grad_(True)
    apart = []
    for batch in now(state, "window"):
        taught = positions(logits_fn(teacher, batch), batch, causal)
        apart.append(divergence(taught / temperature, positions(logits_fn(v, batch), batch, causal) / temperature))
    term = lam * temperature**2 * torch.cat(apart).mean()
    return grad_fn(w) + torch.autograd.grad(term, v)[0]


def saf(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    logits_fn: LogitsFn,
    lam: float,
    lag: int,
    temperature: float,
    causal: bool = False,
    mean_over: str = "all",
) -> Tensor:
    """Du et al. 2022: as `mesa`, the teacher being the sample's own logits `lag` visits ago (batches: "sample_index").

    A sample seen fewer than `lag` times has no term; `mean_over="all"` counts it in the mean (the paper's 1/|B|),
    "referenced" does not.
    """
    history = state.setdefault("history", {})
    v = w.detach().clone().requires_grad_(True)
    total, counted, seen = torch.zeros((), dtype=w.dtype), 0, []
    for batch in now(state, "window"):
        logits = logits_fn(v, batch)
        for row, sample in enumerate(batch["sample_index"].tolist()):
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            present = logits[row : row + 1]
            seen.append((sample, present.detach()))
            past = history.get(sample, [])
            if len(past) >= lag:
                taught = positions(past[-lag], alone, causal) / temperature
                apart = divergence(taught, positions(present, alone, causal) / temperature)
                total = total + apart.sum()
            if len(past) >= lag or mean_over == "all":
                counted += len(positions(present, alone, causal))
    for sample, logits in seen:
        history.setdefault(sample, []).append(logits)
    g = grad_fn(w)
    if not total.requires_grad:
        return g
    return g + torch.autograd.grad(lam * temperature**2 * total / counted, v)[0]


# ---- the ascent gradient from part of the window ----------------------------------------------------------------


def fraction(
    grad_fn: GradFn,
    w: Tensor,
    layout: Layout,
    state: dict,
    step: int,
    *,
    share: float,
    batch_loss: LossFn,
    inner: Rule = sam,
    **settings: Any,
) -> Tensor:
    """Bahri et al. 2022: the first gradient that the inner rule asks for comes from the leading part of the window."""
    part = leading_part(now(state, "window"), share)
    first = iter([lambda v: window_gradient(batch_loss, v, part)])
    return inner(lambda v: next(first, grad_fn)(v), w, layout, state, step, **settings)


def leading_part(window: Sequence[Batch], share: float) -> list[Batch]:
    """Whole micro-batches if the window has several, else rows of the one; at least one of them."""
    if len(window) > 1:
        return list(window[: max(1, round(share * len(window)))])
    rows = max(1, round(share * len(next(iter(window[0].values())))))
    return [{key: value[:rows] for key, value in window[0].items()}]
