"""`p.grad` of the parameters: taken away after a pass, put there for the host, and watched in between."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from hf_sharp._engine.facts import StepFacts
from hf_sharp._tensors.shards import local
from hf_sharp._tensors.vector import TINY, ParamVector, wide

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


def mark(parameters: Iterable[nn.Parameter]) -> Mark:
    """What is in `p.grad` now, to see later whether anybody else has changed it.

    Args:
        parameters: the parameters.

    Returns:
        Which tensors they are, and their version counters.
    """
    return [(0, 0) if p.grad is None else (id(p.grad), p.grad._version) for p in parameters]


def smallest(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, Tensor] | None:
    """A sample of the gradients, to see later how they were changed.

    Args:
        parameters: the parameters.

    Returns:
        The parameter with the fewest entries among those with a gradient, and a copy of that; None if none has one.
    """
    found = min((p for p in parameters if p.grad is not None), key=lambda p: p.numel(), default=None)
    return None if found is None or found.grad is None else (found, found.grad.detach().clone())


def is_scaled(sample: tuple[nn.Parameter, Tensor] | None) -> bool:
    """Whether a gradient was multiplied by a number of at most 1 since, as clipping does; waits for the device.

    Args:
        sample: what `smallest` gave.

    Returns:
        False also for a gradient that is gone.
    """
    if sample is None or sample[0].grad is None:
        return False
    (parameter, before), now = sample, sample[0].grad
    assert parameter.grad is now is not None
    before, now = wide(local(before)), wide(local(now))
    share = (now * before).sum() / before.square().sum().clamp_min(TINY**2)
    return bool(share <= 1) and torch.allclose(now, share * before, rtol=1e-3, atol=0)
