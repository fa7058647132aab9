"""Quantization as an attack: rounding can undo the small changes that unlearning made (Zhang et al., 2025)."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Model = TypeVar("Model", bound=nn.Module)


def quantize(model: Model, bits: int) -> Model:
    """Round the weights of a copy to few bits, as a deployed model's are, and leave them in their own dtype.

    Round to nearest, symmetric, one scale a row (output) of each linear layer: w becomes s round(w / s) with
    s = max |w| / (2^(bits - 1) - 1). The output head, embeddings, norms and biases keep their precision, as in the
    quantizers in use. Measure the copy like any other model.

    Args:
        model: any model; it is not changed.
        bits: from 2 to 8; usual are 8 and 4.

    Returns:
        The rounded copy.

    Raises:
        ValueError: if the number of bits is out of range, an adapter is not merged, or no linear layer is there.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits is from 2 to 8; got {bits}.")
    if getattr(model, "peft_config", None) is not None:
        raise ValueError(
            "An adapter beside its base is not what would be deployed: quantize(model.merge_and_unload(), bits)."
        )
    rounded = copy.deepcopy(model)
    get_head = getattr(rounded, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    layers = [m for m in rounded.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    if not layers:
        raise ValueError("There is no linear layer to quantize.")
    with torch.no_grad():
        for layer in layers:
            rows = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            rows.copy_(_nearest(rows, 2 ** (bits - 1) - 1))
    return rounded


def _nearest(rows: Tensor, most: int) -> Tensor:
    """The nearest multiples of each row's scale; a row of zeros stays."""
    wide = rows.float() if rows.dtype.itemsize < 4 else rows
    scale = wide.abs().amax(dim=1, keepdim=True) / most
    return torch.where(scale > 0, (wide / scale).round() * scale, 0.0)
