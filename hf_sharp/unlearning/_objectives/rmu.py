"""Representation misdirection for unlearning (RMU; Li et al., 2024, WMDP): inner states towards a random direction.

    forget: L = mean over tokens of ||h_l(x) - c u||^2 / d,     u = r / ||r||,  r ~ U[0, 1]^d, drawn once
    retain: L = mean over tokens of ||h_l(x) - h_l^ref(x)||^2 / d

h_l is the output of layer l, d its width. The authors' code averages over all positions, padding among them; here, as
in open-unlearning, those count whose own label does (so with question and answer the answer's), and the mean is over
tokens of the window instead of over rows. The loss does not reach what comes after layer l, and the authors train
three matrices only, the down projections of layers l-2 to l: set `requires_grad` of the parameters accordingly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._checks import check_positive
from hf_sharp._tensors.divergences import IGNORED
from hf_sharp.unlearning._objectives.base import Part, Term
from hf_sharp.unlearning._objectives.forget_retain import ForgetRetain
from hf_sharp.unlearning._objectives.likelihood import targets
from hf_sharp.unlearning._objectives.models import Models

Layer = int | str


def layer_of(module: nn.Module, layer: Layer) -> tuple[str, nn.Module]:
    """A layer of a model.

    Args:
        module: the model.
        layer: its number among the model's blocks (the longest list of modules that is inside no other), or its name,
            of which the beginning may be left out.

    Returns:
        The full name and the module.

    Raises:
        ValueError: if there is no such layer, or several.
    """
    if isinstance(layer, str):
        found = [(name, m) for name, m in module.named_modules() if f".{name}".endswith(f".{layer}")]
        if len(found) != 1:
            raise ValueError(f"layer names one module of the model; '{layer}' fits {[name for name, _ in found]}.")
        return found[0]
    stacks = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [(n, m) for n, m in stacks if not any(n.startswith(f"{other}.") for other, _ in stacks if other != n)]
    name, blocks = max(outer, key=lambda pair: len(pair[1]), default=("", nn.ModuleList()))
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer is a number from 0 to below {len(blocks)}, or a module's name; got {layer}.")
    return f"{name}.{layer}", blocks[layer]


def unreached(module: nn.Module, layer: Layer) -> list[str]:
    """The trainable parameters that a loss at a layer's output does not reach.

    Args:
        module: the model.
        layer: as in `layer_of`.

    Returns:
        The names of those that the model lists after the layer's.
    """
    prefix = layer_of(module, layer)[0] + "."
    named = list(module.named_parameters())
    last = max((i for i, (name, _) in enumerate(named) if name.startswith(prefix)), default=len(named))
    return [name for name, parameter in named[last + 1 :] if parameter.requires_grad]


def hidden(call: Callable[[], Any], module: nn.Module, layer: Layer, part: Part) -> tuple[Tensor, Any]:
    """A layer's output in one call of a model.

    Args:
        call: makes the call.
        module: the model.
        layer: as in `layer_of`.
        part: what the model is called with.

    Returns:
        A tensor of shape (rows, tokens, width) in float32 or better, and the model's outputs.

    Raises:
        ValueError: if the layer was not called.
    """
    kept: list[Any] = []
    name, inner = layer_of(module, layer)
    handle = inner.register_forward_hook(lambda _, args, output: kept.append(output))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would pass the hook by
            outputs = call()
    finally:
        handle.remove()
    if not kept:
        raise ValueError(f"The forward pass does not call {name}, so it has no output to steer.")
    state = kept[-1][0] if isinstance(kept[-1], tuple) else kept[-1]
    state = state[:, -part["labels"].shape[1] :]  # under prompt tuning there are more positions than labels
    return state.float() if state.dtype.itemsize < 4 else state, outputs


@dataclass(frozen=True)
class HiddenTerm(Term):
    """A squared distance of hidden states; units are the tokens whose own label counts.

    Args:
        layer: as in `layer_of`.
    """

    layer: Layer

    def units(self, part: Part, models: Models) -> Tensor:
        """The number of tokens of each row that count."""
        del models
        return (targets(part, shifted=False) != IGNORED).sum(dim=1)

    def _distance(self, state: Tensor, goal: Tensor, part: Part) -> Tensor:
        each = (state - goal).square().mean(dim=-1)
        return each.masked_fill((targets(part, shifted=False) == IGNORED).to(each.device), 0.0).sum(dim=1)


@dataclass(frozen=True)
class Misdirection(HiddenTerm):
    """The distance from c u.

    Args:
        layer: as in `layer_of`.
        c: length of the goal.
        seed: of its direction.
    """

    c: float
    seed: int

    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """The distance of each row's states."""
        state, outputs = hidden(lambda: models.outputs(part), models.module, self.layer, part)
        if not state.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "No gradient reaches the layer that RMU steers: nothing up to it is trainable, or reentrant gradient "
                "checkpointing hides it (gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        return self._distance(state, self.direction(state.shape[-1]).to(state) * self.c, part), outputs

    def direction(self, width: int) -> Tensor:
        """The unit vector u.

        Args:
            width: the number of its entries.

        Returns:
            The same float64 vector on every call.
        """
        draw = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand(width, generator=draw, dtype=torch.float64)
        return uniform / uniform.norm()


@dataclass(frozen=True)
class SameStates(HiddenTerm):
    """The distance from the reference's states."""

    reference = True

    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """The distance of each row's states; the reference is called first, before there is a graph."""
        frozen = models.module if models.frozen is None else models.frozen
        goal, _ = hidden(lambda: models.reference(part), frozen, self.layer, part)
        state, outputs = hidden(lambda: models.outputs(part), models.module, self.layer, part)
        return self._distance(state, goal.to(state), part), outputs


@dataclass(frozen=True)
class RMU(ForgetRetain):
    """Hidden states of the forget data go to a random direction, those of the retain data stay.

    Args:
        layer: number or name of the layer; 7 in the authors' code, for models of 32.
        c: how far the forget states are sent, 20 in the authors' code; of the order of several times their norm.
        seed: of the direction.
        retain: "hidden", the states stay as they were; or "nll", "kl" as in other objectives; or None.
        retain_weight: its weight, 100 in the authors' code; the forget term has weight 1.

    Example:
        >>> RMU(layer=5).retain_weight
        100.0
    """

    layer: Layer = 7
    c: float = 20.0
    seed: int = 0
    retain: str | None = field(default="hidden", kw_only=True)
    retain_weight: float = field(default=100.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.c, "c")
        whole = isinstance(self.layer, int) and not isinstance(self.layer, bool)
        if not (whole or isinstance(self.layer, str)):
            raise ValueError(f"layer is a layer's number or name; got {self.layer!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is a whole number; got {self.seed!r}.")

    @property
    def forget_term(self) -> Term:
        """The distance from c u."""
        return Misdirection(self.layer, self.c, self.seed)

    @property
    def retain_terms(self) -> dict[str, Term]:
        """The states, or what other objectives have."""
        return {"hidden": SameStates(self.layer), **super().retain_terms}

    def unreached(self, module: nn.Module) -> list[str]:
        """What comes after the layer."""
        return unreached(module, self.layer)
