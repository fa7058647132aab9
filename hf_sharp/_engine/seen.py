"""Weights that a forward sees through a function of theirs: parametrizations, and the fake quantisers of modules.

A quantiser lets a gradient through as if it were not there, but moves in steps: of a perturbation that is shorter than
a step, most entries see nothing and a few see a whole step. That is right on average and far too long, and nothing in
the weights themselves shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_sharp._engine.rounding import own_weight
from hf_sharp._tensors.shards import sharded

Function = Callable[[Tensor], Tensor]
# Of `torch.ao.nn.qat` and of torchao, whose modules quantise their weight in the forward.
QUANTISERS = ("weight_fake_quant", "weight_fake_quantizer")


class Seen(NamedTuple):
    """What stands between a weight and the forward.

    Attributes:
        names: of its classes.
        function: from the weight to what the forward uses.
    """

    names: tuple[str, ...]
    function: Function


def seen_through(modules: Iterable[nn.Module]) -> dict[int, Seen]:
    """The weights that a forward does not see as they are.

    Parametrizations that make one tensor of several (weight normalisation) are left out, and modules that fold a
    BatchNorm into the weight before they quantise it.

    Args:
        modules: the model's.

    Returns:
        What stands before each weight, by the weight's id.
    """
    found: dict[int, Seen] = {}
    for module in modules:
        if parametrize.is_parametrized(module):
            for each in dict(module.named_children())["parametrizations"].children():
                if (original := own_weight(each, "original")) is not None:
                    found.setdefault(id(original), _seen(list(each.children())))
        weight, children = own_weight(module), dict(module.named_children())
        quantisers = [children[name] for name in QUANTISERS if name in children]
        if weight is not None and quantisers and "bn" not in children:
            found.setdefault(id(weight), _seen(quantisers))
    return found


def _seen(chain: list[Any]) -> Seen:
    def function(weight: Tensor) -> Tensor:
        for each in chain:
            weight = each(weight)
        return weight

    return Seen(tuple(type(each).__name__ for each in chain), function)


def shift_seen(
    function: Function, new: Tensor, old: Tensor, step: Tensor, kept: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, Tensor] | None:
    """What a forward sees of a shift, and what it should see.

    Args:
        function: from the weight to what the forward uses.
        new: the shifted weight w'.
        old: the weight w before.
        step: the intended shift e.
        kept: a context that leaves no trace of what the function draws and moves (observers of ranges, for one).

    Returns:
        f(w') - f(w), and e as the gradient takes it to arrive: J e, with the Jacobian that backward uses (that of a
        quantiser is 1 in its range). None for sharded weights, of which no rank sees all.
    """
    if sharded(new):
        return None
    with torch.enable_grad(), kept():
        weight = old.detach().clone().requires_grad_()
        before = function(weight)
        dual = torch.zeros_like(before, requires_grad=True)
        (back,) = torch.autograd.grad(before, weight, dual, create_graph=True)
        # Linear in the dual: its own derivative along e is J e. Some backwards of quantisers' own have no derivative.
        moved = torch.autograd.grad(back, dual, step, allow_unused=True)[0] if back.requires_grad else None
    with torch.no_grad(), kept():
        real = function(new.detach()) - before.detach()
    return real, step if moved is None and real.shape == step.shape else real if moved is None else moved
