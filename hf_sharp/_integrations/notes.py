"""What users are told while they train: as what a forward sees the weights, and which passes run uncompiled."""

from __future__ import annotations

import torch

from hf_sharp._engine.host import Host
from hf_sharp._engine.seen import seen_through
from hf_sharp._methods.base import Method


def seen_weights(host: Host) -> tuple[str, str]:
    """As what the forward sees the weights, for the warning that this is too coarse for a perturbation.

    Args:
        host: the training loop.

    Returns:
        The end of "weights ...", and what to do about it.
    """
    facts, seen = host.facts(), seen_through(host.model.modules())
    names = sorted({name for p in facts.parameters.values() if id(p) in seen for name in seen[id(p)].names})
    if names:
        return f"that pass through {', '.join(names)}", "Use a larger rho, or begin to quantise later."
    grids = {name: grid for name, grid in facts.grids.items() if grid is not None}
    stored = {facts.parameters[name].dtype for name in grids or facts.parameters}
    formats = ", ".join(sorted({str(dtype) for dtype in set(grids.values()) or stored}))
    if grids and stored == {torch.float32}:  # the weights are fine, the forward's casts of them are not
        return f"of {formats}, to which the forward casts them", "Use adapters, a larger rho, or train in float32."
    return f"of {formats}", "Use float32 weights with bf16=True, adapters, or a larger rho."


def uncompiled(method: Method) -> str:
    """What the note at the start of a compiled training says of passes that are not.

    Args:
        method: the method.

    Returns:
        A sentence that follows another, or nothing.
    """
    names = [type(part).__name__ for _, part in method.named_parts() if "outputs" in part.needs]
    if not names:
        return ""
    which = "its only one" if method.cost < 2 else "its first one"
    return f" torch_compile does not reach the pass whose outputs {names[0]} compares, {which}."
