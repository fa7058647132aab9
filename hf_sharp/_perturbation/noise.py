"""Random numbers that are the same on every rank, in every re-run of a step, and never from the global stream."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._engine.landscape import Landscape
from hf_sharp._engine.switches import eager
from hf_sharp._tensors.shards import placed
from hf_sharp._tensors.vector import ParamVector


def gaussian(landscape: Landscape, sigma: float, tag: str) -> ParamVector:
    """Normal noise on all trainables.

    Args:
        landscape: the step's, whose seed and step decide the numbers.
        sigma: the standard deviation.
        tag: which draw of the step this is.

    Returns:
        A new vector, equal on all ranks.
    """
    return ParamVector(
        placed(_noise(p.shape, landscape.facts.random(f"{tag}/{name}", p.device), sigma, p.dtype), p)
        for name, p in landscape.facts.parameters.items()
    )


def _noise(shape: torch.Size, generator: torch.Generator, sigma: float, dtype: torch.dtype) -> Tensor:
    """Drawn in float32 for every dtype, so that all see the same numbers."""
    draw = torch.randn(shape, generator=generator, device=generator.device)
    return draw.to(torch.promote_types(dtype, torch.float32)).mul_(sigma).to(dtype)


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules whose output is a model's embedded input.

    Args:
        model: the unwrapped model.

    Returns:
        What `model.get_input_embeddings()` gives, and the modules that share its weight: encoder-decoders call those.

    Raises:
        ValueError: if the model does not say.
    """
    find = getattr(model, "get_input_embeddings", None)
    try:
        named = find() if callable(find) else None
    except (NotImplementedError, AttributeError):
        named = None
    if not isinstance(named, nn.Module):
        raise ValueError(
            f"Noise on the inputs goes to the output of the input embedding, and {type(model).__name__} does not name "
            "it: give the model a `get_input_embeddings()`, or use TRAM with reference='previous'."
        )
    weight = getattr(named, "weight", None)
    shared = [m for m in model.modules() if m is not named and weight is not None and _table(m) is weight]
    return [named, *shared]


def _table(module: nn.Module) -> Tensor | None:
    return module.weight if isinstance(module, nn.Embedding) else None


@contextmanager
def noisy_inputs(landscape: Landscape, sigma: float) -> Generator[None]:
    """While open, the embedded inputs carry normal noise; the inputs themselves are not touched.

    The noise goes to what a forward embeds first: of an encoder-decoder that is the encoder's input. A row's noise
    depends on seed, step and the row's number in the window over all ranks, and on nothing else. Compiled code would
    run past the hooks, so the passes inside are eager.

    Args:
        landscape: the step's, whose model gets the noise while this is open.
        sigma: the standard deviation.

    Yields:
        Nothing.

    Raises:
        ValueError: if no forward inside embedded anything, for one because the batch holds `inputs_embeds`.
    """
    model, embedded = landscape.model, []

    def begin(module: nn.Module, inputs: Any) -> None:
        del module, inputs
        embedded.append(0)

    def add_noise(module: nn.Module, inputs: Any, output: Any) -> Any:
        del inputs
        if not embedded or embedded[-1]:
            return output
        if not isinstance(output, Tensor):
            raise ValueError(
                f"The input embedding {type(module).__name__} returns no single tensor to add noise to. Use TRAM with "
                "reference='previous'."
            )
        embedded[-1] = 1
        each, _ = divmod(output.shape[0], landscape.window.row_count())
        facts = landscape.facts
        first = landscape.window.first_row(facts.rank, facts.ranks) * max(each, 1)
        rows = [
            _noise(
                output.shape[1:], landscape.facts.random(f"input/{first + row}", output.device), sigma, output.dtype
            )
            for row in range(output.shape[0])
        ]
        return output + torch.stack(rows)

    handles: list[Any] = []

    def put_back() -> None:
        for handle in handles:
            handle.remove()

    with landscape.region(put_back), eager(landscape.region):
        handles.append(model.register_forward_pre_hook(begin))
        for module in input_embeddings(model):
            handles.append(module.register_forward_hook(add_noise))
        yield
    if not embedded or not all(embedded):
        raise ValueError(
            "The noise on the inputs reached nothing: the model's input embedding was not called, because the batch "
            "holds inputs_embeds, or the model embeds its inputs elsewhere. Use TRAM with reference='previous'."
        )
