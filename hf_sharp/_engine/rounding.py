"""Shifts that 16-bit numbers cannot hold: added with stochastic rounding, so that they are right on average.

Rounded to nearest, a perturbation whose entries are far below the spacing of the weights' format mostly vanishes, and
what is left points elsewhere (Gaussian weights of 1e8 entries in bf16, rho 0.05: 0.07 of it along its direction).
Rounded up or down at random, with the probabilities that make the mean right, all of it is there, at the price of
random noise whose length the metric `sharp_noise` shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage] (there is no public base)

from hf_sharp._tensors.shards import sharded
from hf_sharp._tensors.vector import chunks, wide

CHOICES = ("stochastic", "nearest")


def stochastic(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round at random to one of the two neighbours, with the mean of the number itself.

    Args:
        value: float32 or better; inf and NaN stay what they are.
        dtype: torch.bfloat16 or torch.float16.
        generator: on the value's device.

    Returns:
        A tensor of that dtype; numbers that it holds exactly stay themselves.
    """
    value = value.float()
    if dtype == torch.bfloat16:  # the upper half of the bits of a float32: the carry of a random lower half rounds up
        bits = value.contiguous().view(torch.int32)
        draw = torch.randint(0, 2**16, bits.shape, generator=generator, device=value.device, dtype=torch.int32)
        rounded = ((bits + draw) & -(2**16)).view(torch.float32)
        return torch.where(value.isfinite(), rounded, value).to(dtype)
    nearest = value.to(dtype)
    rest = value - nearest.float()
    bits = nearest.contiguous().view(torch.int16)
    away = (rest > 0) == (nearest > 0)  # from zero
    step = torch.where(away, 1, -1).to(torch.int16)
    beside = torch.where(nearest == 0, torch.where(rest > 0, 1, -(2**15) + 1).to(torch.int16), bits + step).view(dtype)
    draw = torch.rand(value.shape, generator=generator, device=value.device)
    chance = (rest / (beside.float() - nearest.float())).nan_to_num(0.0, 0.0, 0.0)
    return torch.where((rest != 0) & (draw < chance) & nearest.isfinite(), beside, nearest)


def cast_by_autocast(modules: Iterable[nn.Module]) -> set[int]:
    """The weights that autocast casts before it uses them.

    Args:
        modules: the model's.

    Returns:
        ids of the weights of linear layers and convolutions; not of those that an embedding shares, which reads them
        as they are.
    """
    modules = list(modules)
    matrices = [m for m in modules if isinstance(m, nn.Linear | _ConvNd) or type(m).__name__ == "Conv1D"]
    tables = {id(own_weight(m)) for m in modules if isinstance(m, nn.Embedding)}
    return {id(weight) for m in matrices if (weight := own_weight(m)) is not None} - tables


def own_weight(module: nn.Module, name: str = "weight") -> nn.Parameter | None:
    """A module's own parameter of some name, read where it is kept.

    Args:
        module: any.
        name: the parameter's.

    Returns:
        The parameter; None for a parametrized module, whose `weight` is made anew, which may move its state.
    """
    return dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(name)


def grids_of(
    parameters: Mapping[str, nn.Parameter],
    modules: Iterable[nn.Module],
    autocast: torch.dtype | None,
    gathered: torch.dtype | None = None,
) -> dict[str, torch.dtype | None]:
    """The 16-bit format in which a forward sees each parameter.

    Args:
        parameters: by name.
        modules: the model's.
        autocast: the dtype of the host's autocast, if it has one; it leaves float64 alone.
        gathered: the dtype to which FSDP casts the shards that it gathers, if it does.

    Returns:
        Formats by the same names, None where all of a parameter is seen.
    """
    cast: set[int] = set() if autocast is None else cast_by_autocast(modules)
    grids: dict[str, torch.dtype | None] = {}
    for name, parameter in parameters.items():
        dtype = (gathered if sharded(parameter) else None) or parameter.dtype
        seen = autocast if id(parameter) in cast and dtype != torch.float64 else None
        grids[name] = dtype if dtype.itemsize == 2 else seen
    return grids


def on_grid(tensor: Tensor, grid: torch.dtype | None) -> Tensor:
    """A tensor as a forward sees it, in float32 or better.

    Args:
        tensor: the weights.
        grid: the format it is seen in, None for its own.

    Returns:
        The values.
    """
    return wide(tensor if grid is None else tensor.to(grid))


@torch.no_grad()
def move_rounded_(weight: Tensor, step: Tensor, grid: torch.dtype, generator: torch.Generator) -> None:
    """Shift a weight to where a forward that sees it in 16 bits is shifted by the step on average.

    Args:
        weight: changed in place, from the value that the forward sees.
        step: of its shape.
        grid: the format that the forward sees.
        generator: on the weight's device.
    """
    for target, part in chunks(weight, step):
        target.copy_(stochastic(on_grid(target, grid) + wide(part), grid, generator))
