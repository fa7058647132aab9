"""Dense float64 programs of the methods for adapters, written from the papers: full matrices, no PEFT.

The model is `references.mlp_loss` with LoRA on its two linear layers. Weights are one flat vector of A and B of the
hidden layer, then of the head; a program returns that vector after each step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from family import drawn
from references import Layout, clip, layout_of, mlp_loss, mlp_shapes

LAYERS = ("hidden", "head")
SHAPES = mlp_shapes()
LOSS = mlp_loss(SHAPES)
Windows = Sequence[Sequence[Any]]


def adapter_layout(rank: int) -> Layout:
    """Which slice of the flat vector is which half of which layer."""
    shapes = {}
    for layer in LAYERS:
        outputs, inputs = SHAPES[f"{layer}.weight"]
        shapes |= {f"{layer}.A": (rank, inputs), f"{layer}.B": (outputs, rank)}
    return layout_of(shapes)


def halves(w: Tensor, rank: int) -> dict[str, Tensor]:
    """A (rank, inputs) and B (outputs, rank) of both layers, views of a flat vector."""
    layout = adapter_layout(rank)
    return {n: w[s].view((rank, -1) if n.endswith("A") else (-1, rank)) for n, s in layout.items()}


def products(w: Tensor, rank: int) -> dict[str, Tensor]:
    """B A of both layers, as full matrices."""
    parts = halves(w, rank)
    return {layer: parts[f"{layer}.B"] @ parts[f"{layer}.A"] for layer in LAYERS}


def window_loss(base: Tensor, shifts: dict[str, Tensor], window: Sequence[Any]) -> Tensor:
    """The mean loss of a window at the base weights plus a full matrix for each adapted layer."""
    layout = layout_of(SHAPES)
    parts = []
    for name, shape in SHAPES.items():
        shift = shifts.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        parts.append(base[layout[name]] if shift is None else (base[layout[name]].view(shape) + shift).reshape(-1))
    return torch.stack([LOSS(torch.cat(parts), batch) for batch in window]).mean()


def grads(loss_of: Callable[..., Tensor], *vectors: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().clone().requires_grad_(True) for v in vectors]
    return torch.autograd.grad(loss_of(*leaves), leaves)


def in_turn(windows: Windows, steps: int) -> list[Sequence[Any]]:
    return [windows[step % len(windows)] for step in range(steps)]


def bi_lora(
    base: Tensor, w: Tensor, aux: Tensor, windows: Windows, updates: Any, *, rho: float, scaling: float,
    ranks: tuple[int, int], max_norm: float, lr_factor: Callable[[int], float], steps: int,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Liu et al. 2026, Eq. 9, with an optimizer for each half: the auxiliary ascends, then is clipped globally."""
    path, memories = [], ({}, {})
    for step, now in enumerate(in_turn(windows, steps)):

        def loss_of(w: Tensor, aux: Tensor, window: Any = now) -> Tensor:
            main, second = products(w, ranks[0]), products(aux, ranks[1])
            return window_loss(base, {n: scaling * main[n] + scaling * second[n] for n in LAYERS}, window)

        g, g_aux = grads(loss_of, w, aux)
        w = updates[0](w, clip(g, max_norm), memories[0], lr_factor(step))
        aux = updates[1](aux, -g_aux, memories[1], lr_factor(step))
        c = math.sqrt(sum(float(m.square().sum()) for m in products(aux, ranks[1]).values()))
        aux = aux * math.sqrt(rho / c) if c > rho else aux
        path.append((w, aux))
    return path


def bar(
    base: Tensor, w: Tensor, windows: Windows, update: Any, *, mu: Callable[[int], float], kind: str, lr: float,
    scaling: float, rank: int, max_norm: float, lr_factor: Callable[[int], float], steps: int,
) -> list[Tensor]:  # fmt: skip
    """Li et al. 2024, Algorithms oBAR and nBAR: x = B and y = A are stretched before the optimizer's step."""
    path, memory = [], {}
    for step, now in enumerate(in_turn(windows, steps)):

        def loss_of(w: Tensor, window: Any = now) -> Tensor:
            return window_loss(base, {n: scaling * m for n, m in products(w, rank).items()}, window)

        (g,) = grads(loss_of, w)
        weights, gradients, k = halves(w.clone(), rank), halves(g, rank), mu(step) * lr * lr_factor(step)
        for layer in LAYERS:
            x, y = weights[f"{layer}.B"], weights[f"{layer}.A"]
            if kind == "n":
                grow_x = gradients[f"{layer}.B"].norm() >= gradients[f"{layer}.A"].norm()
            else:
                grow_x = x.norm() < y.norm()
            x *= 1 + k if grow_x else 1 - k
            y *= 1 - k if grow_x else 1 + k
        w = torch.cat([weights[n].reshape(-1) for n in adapter_layout(rank)])
        w = update(w, clip(g, max_norm), memory, lr_factor(step))
        path.append(w)
    return path


def flat_lora(
    base: Tensor, w: Tensor, windows: Windows, update: Any, *, sigma: Callable[[int], float], seed: int, name: str,
    scaling: float, rank: int, max_norm: float, lr_factor: Callable[[int], float], steps: int,
) -> list[Tensor]:  # fmt: skip
    """Li et al. 2025: noise on the merged weights, in proportion to their rows. `name` is a layer's with {} in it."""
    path, memory, layout = [], {}, layout_of(SHAPES)
    for step, now in enumerate(in_turn(windows, steps)):
        noise = {}
        for layer, product in products(w, rank).items():
            merged = base[layout[f"{layer}.weight"]].view(SHAPES[f"{layer}.weight"]) + scaling * product
            draw = drawn(seed, step, f"flat_lora/{name.format(layer)}", merged.shape).double()
            spread = sigma(step) * merged.norm(dim=1, keepdim=True) / math.sqrt(merged.shape[1])
            noise[layer] = draw * spread

        def loss_of(w: Tensor, window: Any = now, noise: Any = noise) -> Tensor:
            return window_loss(base, {n: scaling * m + noise[n] for n, m in products(w, rank).items()}, window)

        (g,) = grads(loss_of, w)
        w = update(w, clip(g, max_norm), memory, lr_factor(step))
        path.append(w)
    return path
