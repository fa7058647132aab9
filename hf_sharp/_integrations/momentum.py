"""Where an optimizer keeps its running mean of gradients, and which optimizers have none that could be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEYS = ("momentum_buffer", "exp_avg")  # of SGD; of Adam and its kin, fused and capturable ones too
UNREADABLE = ("8bit", "4bit", "fp8", "muon", "schedulefree", "schedule_free", "adagrad", "lomo", "galore", "apollo")
WAY_OUT = "Use SGD with momentum or torch's AdamW, or the method PreviousGradientSAM, which needs no momentum."


def momentum_of(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor] | None:
    """The momentum of an optimizer over all its parameter groups.

    Args:
        optimizer: a torch optimizer, possibly inside Accelerate's wrapper.
        parameters: the trainables by name.

    Returns:
        The momentum tensors by name, not copies; None while the optimizer has made no step.

    Raises:
        ValueError: if the optimizer keeps no momentum, or keeps it in a form that cannot be read.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    _refuse(optimizer)
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter) or {}
        tensor = next((state[key] for key in KEYS if isinstance(state.get(key), Tensor)), None)
        if tensor is not None and tensor.is_floating_point() and tensor.shape == parameter.shape:
            found[name] = tensor
        elif state and (tensor is not None or not set(KEYS) & set(state)):
            raise ValueError(f"{_name(optimizer)} keeps {sorted(state)} and no readable momentum. {WAY_OUT}")
    return found or None


def refuse_name(name: str, options: str | None) -> None:
    """Refuse an optimizer that the Trainer will make itself by its name, before there is one.

    Args:
        name: as in `TrainingArguments(optim=...)`; its "sgd" and "rmsprop" have no momentum unless the options say so.
        options: as in `TrainingArguments(optim_args=...)`.

    Raises:
        ValueError: if its momentum could not be read, whatever the options.
    """
    unless_given = any(part in name.lower() for part in ("sgd", "rmsprop")) and "momentum" not in (options or "")
    if unless_given or any(part in name.lower() for part in (*UNREADABLE, "bnb", "adafactor")):
        raise ValueError(f"The optimizer '{name}' keeps no momentum that could be read. {WAY_OUT}")


def _refuse(optimizer: Any) -> None:
    name, kind = _name(optimizer), type(optimizer)
    if any(part in f"{kind.__module__}.{kind.__name__}".lower() for part in UNREADABLE):
        raise ValueError(f"The momentum of {name} cannot be read as a vector over the weights. {WAY_OUT}")
    groups = optimizer.param_groups
    without = ("momentum" in groups[0] and not any(g["momentum"] for g in groups)) or (
        "beta1" in groups[0] and all(g["beta1"] is None for g in groups)  # Adafactor
    )
    if groups and without:
        raise ValueError(f"{name} keeps no momentum with these settings. {WAY_OUT}")


def _name(optimizer: Any) -> str:
    return f"The optimizer {type(optimizer).__name__}" if optimizer is not None else "No optimizer"
