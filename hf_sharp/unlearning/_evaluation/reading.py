"""Looking at a model without leaving a trace: no gradients, no dropout, and afterwards the mode that it was in."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def reading(model: nn.Module) -> Generator[torch.device]:
    """Put a model into evaluation mode for a while, without gradients.

    Args:
        model: any module; its parts may be in different modes, and each gets its own back, also after an exception.

    Yields:
        The device of its first parameter, where inputs belong.

    Raises:
        ValueError: if it is an encoder-decoder, whose answers these measurements do not cover.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; these are measurements of causal LMs.")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, training in modes:
            module.training = training
