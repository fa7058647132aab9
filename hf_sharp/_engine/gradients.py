"""`p.grad` of the parameters: taken away after a pass, put there for the host, and watched in between."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_sharp._engine.facts import StepFacts
from hf_sharp._tensors.entries import TINY, alike, norm_of, norms_of_each, wide
from hf_sharp._tensors.shards import local
from hf_sharp._tensors.vector import ParamVector

Mark = list[tuple[int, int]]  # of each gradient, which tensor it is and how often it was changed in place


def collect(facts: StepFacts, only: Collection[str] | None, copied: bool) -> ParamVector:
    """Take the gradients away; every `p.grad` of the parameters is None afterwards.

    Args:
        facts: whose parameters.
        only: names of the parameters that were asked for; the others' gradients are dropped. None for all.
        copied: whether a later backward would write into these very tensors.

    Returns:
        The gradients, None where there is none.

    Raises:
        ValueError: if one is sparse.
        RuntimeError: if none came for the parameters asked for.
    """
    grads: list[Tensor | None] = []
    wanted = None if only is None else set(only)
    for name, parameter in facts.parameters.items():
        grad, parameter.grad = parameter.grad, None
        if grad is not None and grad.layout is not torch.strided:
            raise ValueError(
                f"The gradient of '{name}' is sparse, which has no place in one vector over the parameters: make "
                "the embedding with sparse=False."
            )
        keep = grad is not None and (wanted is None or name in wanted)
        grads.append((grad.clone() if copied else grad) if keep and grad is not None else None)
    if wanted is not None and all(g is None for g in grads):
        raise RuntimeError(
            "No gradient came for the parameters asked for: the loss does not reach them, or a part of the model "
            "does not support a backward towards a subset (reentrant checkpointing, for one: use "
            "use_reentrant=False, or a method over all parameters)."
        )
    return ParamVector(grads)


def put(parameters: Iterable[nn.Parameter], grads: Iterable[Tensor | None]) -> None:
    """Set every `p.grad`, as the host would find it after a backward of its own.

    Args:
        parameters: the parameters.
        grads: one for each, in any dtype; None where there is none.
    """
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = None if grad is None else grad.to(parameter.dtype)


def clear(parameters: Iterable[nn.Parameter]) -> None:
    """Drop gradients.

    Args:
        parameters: whose.
    """
    for parameter in parameters:
        parameter.grad = None


class Left(NamedTuple):
    """What a micro-batch has left in `p.grad`, to see later whether anybody else has changed it.

    Attributes:
        mark: which tensors they are, and their version counters.
        norms: of each gradient there is, 0-dim tensors; nothing waits for them unless the mark has changed.
        sample: the parameter with the fewest entries that has a gradient, and a copy of that; None if none has one.
    """

    mark: Mark
    norms: list[Tensor]
    sample: tuple[nn.Parameter, Tensor] | None


def mark(parameters: Iterable[nn.Parameter]) -> Mark:
    """What is in `p.grad` now.

    Args:
        parameters: the parameters.

    Returns:
        Which tensors they are, and their version counters.
    """
    return [(0, 0) if p.grad is None else (id(p.grad), p.grad._version) for p in parameters]


def left(parameters: Collection[nn.Parameter]) -> Left:
    """What is in `p.grad` now, with what tells a clipping from another change.

    Args:
        parameters: the parameters.

    Returns:
        The record.
    """
    found = min((p for p in parameters if p.grad is not None), key=lambda p: p.numel(), default=None)
    sample = None if found is None or found.grad is None else (found, found.grad.detach().clone())
    return Left(mark(parameters), _norms(parameters), sample)


def is_clipped(before: Left, parameters: Collection[nn.Parameter]) -> bool:
    """Whether all gradients were multiplied by one number of at most 1, as clipping does; waits for the device.

    Args:
        before: what was left.
        parameters: the same parameters.

    Returns:
        False also where a gradient came or went.
    """
    if before.sample is None or [m[0] for m in before.mark] != [m[0] for m in mark(parameters)]:
        return False
    parameter, sample = before.sample
    assert parameter.grad is not None
    old, new = wide(local(sample)), wide(local(parameter.grad))
    were, are = (
        torch.stack([norm.to(old.device, torch.float64) for norm in norms])
        for norms in (before.norms, _norms(parameters))
    )
    share = norm_of(are) / norm_of(were).clamp_min(TINY)
    # 1e-3: a 16-bit gradient is rounded once more when it is scaled.
    scaled = torch.allclose(are, share * were, rtol=1e-3, atol=0)
    return bool(share <= 1 + 1e-3) and scaled and torch.allclose(new, share.to(old.dtype) * old, rtol=1e-2, atol=0)


def _norms(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    grads = [wide(local(p.grad)) for p in parameters if p.grad is not None]
    if not grads:
        return []
    return norms_of_each(grads) if alike(grads) else [norm_of(grad) for grad in grads]
