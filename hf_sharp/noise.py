"""Random numbers that are the same on every rank, in every re-run of a step, and never from the global stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_sharp.vector import ParamVector

if TYPE_CHECKING:
    from hf_sharp.landscape import Landscape


def gaussian(landscape: Landscape, sigma: float, tag: str) -> ParamVector:
    """Normal noise on all trainables.

    Args:
        landscape: where this is; its seed and step decide the numbers.
        sigma: the standard deviation.
        tag: which draw of the step this is.

    Returns:
        A new vector, equal on all ranks.
    """
    return ParamVector(
        _noise(p.shape, landscape.random(f"{tag}/{name}", p.device), sigma, p.dtype)
        for name, p in landscape.host.parameters.items()
    )


def _noise(shape: torch.Size, generator: torch.Generator, sigma: float, dtype: torch.dtype) -> Tensor:
    """Drawn in float32 for every dtype, so that all see the same numbers."""
    draw = torch.randn(shape, generator=generator, device=generator.device)
    return draw.to(torch.promote_types(dtype, torch.float32)).mul_(sigma).to(dtype)


def input_embedding(model: nn.Module) -> nn.Module:
    """The module whose output is a model's embedded input.

    Args:
        model: the unwrapped model.

    Returns:
        What `model.get_input_embeddings()` gives.

    Raises:
        ValueError: if the model does not say.
    """
    find = getattr(model, "get_input_embeddings", None)
    module = find() if callable(find) else None
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"Noise on the inputs goes to the output of the input embedding, and {type(model).__name__} does not name "
            "it: give the model a `get_input_embeddings()`, or use TRAM with reference='previous'."
        )
    return module


@contextmanager
def noisy_inputs(landscape: Landscape, sigma: float) -> Iterator[None]:
    """While open, the embedded inputs carry normal noise; the inputs themselves are not touched.

    A row's noise depends on seed, step and the row's number in the window over all ranks, and on nothing else.

    Args:
        landscape: where this is.
        sigma: the standard deviation.

    Yields:
        Nothing.
    """

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        del module, inputs
        first = landscape.first_row()
        rows = [
            _noise(output.shape[1:], landscape.random(f"input/{first + row}", output.device), sigma, output.dtype)
            for row in range(output.shape[0])
        ]
        return output + torch.stack(rows)

    handle = input_embedding(landscape.host.model).register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
