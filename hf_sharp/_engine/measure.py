"""What a shift of the weights really was, and what the gradient there says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_sharp._engine.rounding import on_grid
from hf_sharp._tensors.shards import summed
from hf_sharp._tensors.vector import TINY, ParamVector, chunks, wide

Arrives = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None]


@torch.no_grad()
def measure_shift(
    weights: Sequence[nn.Parameter],
    saved: Sequence[Tensor],
    steps: Sequence[Tensor],
    grids: Sequence[torch.dtype | None],
    through: Sequence[Arrives | None],
) -> dict[str, Tensor]:
    """How much of the intended shift a forward sees: of 16-bit and quantised weights most of it can round away.

    Args:
        weights: the shifted weights w'.
        saved: the weights w before the shift.
        steps: the intended shift e.
        grids: the 16-bit format in which a forward sees each weight, None for all of it.
        through: of a weight that a forward sees through a function, what gives the shift that it sees and the one that
            it should see, from w', w and e; None for other weights.

    Returns:
        `sharp_component` = <w' - w, e> / |e|^2, which should be 1, and `sharp_noise` = |w' - w - e| / |e|; 1 and 0
        for e = 0.
    """
    along: list[tuple[Tensor, Tensor]] = []
    length: list[tuple[Tensor, Tensor]] = []
    noise: list[tuple[Tensor, Tensor]] = []
    for weight, old, step, grid, arrives in zip(weights, saved, steps, grids, through, strict=True):
        for real, wanted in _shifts(weight, old, step, grid, arrives):
            along.append((weight, (real * wanted).sum()))
            length.append((weight, wanted.square().sum()))
            noise.append((weight, real.sub_(wanted).square().sum()))
    squared = summed(length)
    component, rest = summed(along) / squared, (summed(noise) / squared).sqrt()
    return {
        "sharp_component": torch.where(squared == 0, torch.ones_like(component), component),
        "sharp_noise": torch.where(squared == 0, torch.zeros_like(rest), rest),
    }


def _shifts(
    weight: Tensor, old: Tensor, step: Tensor, grid: torch.dtype | None, arrives: Arrives | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The shift that a forward sees and the one that it should see, in parts."""
    seen = None if arrives is None else arrives(weight, old, step)
    if seen is not None:
        yield wide(seen[0]), wide(seen[1])
        return
    for new, before, part in chunks(weight.detach(), old, step):
        yield on_grid(new, grid) - on_grid(before, grid), wide(part)


@torch.no_grad()
def measure_gradient(
    weights: Sequence[nn.Parameter],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    there: ParamVector,
    grids: Sequence[torch.dtype | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient at the shifted weights says of the shift, with e = w' - w taken tensor by tensor.

    Args:
        weights: the shifted weights w'.
        saved: the weights w before the shift.
        grads: the gradient g_s at w', for the shifted weights only.
        there: the whole gradient g_s.
        grids: the 16-bit format in which a forward sees each weight, None for all of it.

    Returns:
        cos(g_s, e), <g_s, e> and |e|^2.
    """
    along: list[tuple[Tensor, Tensor]] = []
    length: list[tuple[Tensor, Tensor]] = []
    for weight, old, grad, grid in zip(weights, saved, grads, grids, strict=True):
        gradient = torch.zeros_like(old) if grad is None else grad
        for new, before, part in chunks(weight.detach(), old, gradient):
            epsilon = on_grid(new, grid) - on_grid(before, grid)
            length.append((weight, epsilon.square().sum()))
            along.append((weight, (wide(part) * epsilon).sum()))
    product, squared = summed(along), summed(length)
    return product / (squared.sqrt() * there.norm()).clamp_min(TINY), product, squared
