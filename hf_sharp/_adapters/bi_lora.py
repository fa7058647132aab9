"""Bi-LoRA (Liu et al., ICLR 2026): an auxiliary adapter climbs while the adapter descends, in one backward. Cost: 1.

    W' = W + s B1 A1 + s B2 A2;  B1, A1 descend, B2, A2 ascend the same gradient, with the same learning rate (Eq. 9)
    c = sqrt(sum over layers ||B2 A2||^2);  after each update, where c > rho:  B2, A2 <- sqrt(rho / c) B2, A2

A2 starts as LoRA's A does, B2 at zero. The paper writes plain gradient steps; here both halves go through the host's
optimizer, the auxiliary's gradient negated. The auxiliary is in the model during the passes of training steps only:
the logged loss is the one with the auxiliary, and evaluation, merging and saving never meet it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_sharp._adapters.lora import LoraLinear, lora_linears, refuse_shards
from hf_sharp._checks import check_count
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.schedules import Schedule, check_strength, strength_at
from hf_sharp._tensors.vector import ParamVector, total

NAME = "Bi-LoRA"


class Joined(NamedTuple):
    """A layer's adapter and its auxiliary.

    Attributes:
        linear: the layer.
        a: A2, of (rank, inputs).
        b: B2, of (outputs, rank).
    """

    linear: LoraLinear
    a: nn.Parameter
    b: nn.Parameter


@dataclass(frozen=True)
class BiLoRA(Method):
    """The gradient at weights that a second, climbing adapter has perturbed; it climbs by the same backward.

    Args:
        rho: radius of the auxiliary's product over all layers together, without the scaling s; a number or a schedule.
            0 leaves the auxiliary out.
        rank: of the auxiliary.

    Example:
        >>> BiLoRA(rho=0.05).cost
        1.0
    """

    ahead = True

    rho: float | Schedule = 0.05
    rank: int = 8

    def __post_init__(self) -> None:
        check_strength(self.rho, "rho")
        check_count(self.rank, "rank", "a number of rows")

    @property
    def needs(self) -> frozenset[str]:
        """Adapters among the modules, parameters of its own in the optimizer, a call after the update to clip them."""
        return frozenset({"modules", "parameters", "update"})

    @property
    def cost(self) -> float:
        """One evaluation."""
        return 1.0

    def check(self, landscape: Landscape) -> None:
        """Refuse a model whose adapters the auxiliary cannot join."""
        refuse_shards(landscape, NAME)
        lora_linears(landscape.model, NAME)

    def start_note(self, landscape: Landscape) -> str:
        """The auxiliary's size: it perturbs by parameters of its own, and no share of the model's."""
        linears = lora_linears(landscape.model, NAME)
        entries = sum(self.rank * (linear.down.in_features + linear.up.out_features) for linear in linears)
        return f"climbs in {len(linears)} layers with an auxiliary adapter of {entries:,} entries"

    def adds(self, landscape: Landscape) -> dict[str, Tensor]:
        """A2 uniform in 1 / sqrt(inputs), as LoRA's A; B2 zero; in float32 or better, on the adapters' devices."""
        values = {}
        for linear in lora_linears(landscape.model, NAME):
            weight, inputs, outputs = linear.down.weight, linear.down.in_features, linear.up.out_features
            kind = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
            draw = torch.rand(self.rank, inputs, generator=landscape.facts.random(f"bi_lora/{linear.name}"))
            values[f"{linear.name}.A2"] = ((2 * draw - 1) / math.sqrt(inputs)).to(**kind)
            values[f"{linear.name}.B2"] = torch.zeros(outputs, self.rank, **kind)
        return values

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The auxiliary joins the adapters for each micro-batch's pass."""
        if strength_at(self.rho, landscape.facts, "rho") == 0:
            return FirstPass()
        layers = self._layers(landscape)
        return FirstPass(within=lambda: joined(layers, landscape.region))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The gradient of the one pass, its auxiliary half negated; after the update the auxiliary is clipped."""
        here, rho, added = landscape.evaluate(), strength_at(self.rho, landscape.facts, "rho"), landscape.facts.added
        if rho == 0:
            return here
        parameters = list(added.values())
        grads = ParamVector(p.grad for p in parameters)
        if landscape.facts.ranks > 1:
            grads = _mean_over_ranks(parameters, landscape)
        for parameter, grad in zip(parameters, grads.tensors, strict=True):
            parameter.grad = None if grad is None else grad.neg_()
        pairs = [(a, added[name.removesuffix("A2") + "B2"]) for name, a in added.items() if name.endswith(".A2")]
        return here.with_update(after=lambda: clip_(pairs, rho))

    def _layers(self, landscape: Landscape) -> list[Joined]:
        added, linears = landscape.facts.added, lora_linears(landscape.model, NAME)
        if {f"{linear.name}.A2" for linear in linears} != {name for name in added if name.endswith(".A2")}:
            raise ValueError(
                "The active adapters are not those that training began with, so Bi-LoRA's auxiliary does not fit. "
                "Activate the same adapters again, or train the others in a training of their own."
            )
        return [Joined(linear, added[f"{linear.name}.A2"], added[f"{linear.name}.B2"]) for linear in linears]


@torch.no_grad()
def clip_(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], rho: float) -> None:
    """Scale all auxiliaries by one factor such that the norm of their products is at most rho.

    The norm comes from products of (rank, rank): ||B A||^2 = tr((B'B)(A A')). What was clipped is not clipped again.

    Args:
        pairs: A2 and B2 of all layers, changed in place.
        rho: the radius.
    """
    squares = []
    for a, b in pairs:
        with torch.autocast(a.device.type, enabled=False):
            squares.append(((b.T @ b) * (a @ a.T)).sum())
    norm = total(squares).clamp_min(0).sqrt()
    slack = 64 * torch.finfo(norm.dtype).eps  # rounding of the last clipping
    factor = torch.where(norm > rho * (1 + slack), (rho / norm).sqrt(), torch.ones_like(norm))
    ParamVector(t.detach() for pair in pairs for t in pair).scale_(factor)


@contextmanager
def joined(layers: Sequence[Joined], region: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    """While open, the layers' adapters are [B1 B2] [A1; A2], wherever the model's own code calls them.

    One pair of products of higher rank, so that the auxiliary costs no pass over the activations of its own. PEFT's
    layers stay as they are (casts, dropout, quantised weights, switched-off adapters); compiled code notices.

    Args:
        layers: the layers and their auxiliaries.
        region: `Landscape.region`.

    Yields:
        Nothing.
    """
    before = [(m, vars(m).get("forward")) for linear, *_ in layers for m in (linear.down, linear.up)]

    def put_back() -> None:
        for module, forward in before:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward

    with region(put_back):
        for linear, a, b in layers:
            for module, extra, dim in ((linear.down, a, 0), (linear.up, b, 1)):
                module.forward = _joint(module, extra, dim)
        yield


def _joint(module: nn.Linear, extra: nn.Parameter, dim: int) -> Callable[..., Any]:
    """A forward for the module with its weight prolonged."""

    def forward(input: Tensor) -> Tensor:
        kind = input.device.type
        x = input.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else input
        out = JointLinear.apply(x, module.weight, extra, dim)
        return out if module.bias is None else out + module.bias.to(out.dtype)

    return forward


class JointLinear(torch.autograd.Function):
    """x times the transpose of two weights joined; the joined weight is made anew for the backward, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, main: Tensor, extra: Tensor, dim: int) -> Tensor:
        """The product.

        Args:
            ctx: torch's.
            x: of (..., inputs).
            main: a weight.
            extra: what prolongs it.
            dim: along which dimension.

        Returns:
            A tensor of (..., outputs).
        """
        ctx.save_for_backward(x, main, extra)
        ctx.dim = dim
        return F.linear(x, torch.cat([main.to(x.dtype), extra.to(x.device, x.dtype)], dim))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """The gradients of x and of both weights.

        Args:
            ctx: torch's.
            *grads: the gradient of the product.

        Returns:
            The gradients in the order of `forward`'s tensors, and None for `dim`.
        """
        (grad,), (x, main, extra) = grads, ctx.saved_tensors
        joined = torch.cat([main.to(x.dtype), extra.to(x.device, x.dtype)], ctx.dim)
        both = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        first, second = both.split([main.shape[ctx.dim], extra.shape[ctx.dim]], ctx.dim)
        towards_x = grad @ joined if ctx.needs_input_grad[0] else None
        return towards_x, first.to(main.dtype, copy=True), second.to(extra.device, extra.dtype, copy=True), None


def _mean_over_ranks(parameters: Sequence[nn.Parameter], landscape: Landscape) -> ParamVector:
    """The mean of the parameters' gradients over the ranks, in one reduction; none counts as zero."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = landscape.ranks.mean(ParamVector([torch.cat([g.reshape(-1) for g in grads])])).present()[0]
    parts = flat.split([g.numel() for g in grads])
    return ParamVector(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


@remembered
def bi_lora(rho: Rho = 0.05, rank: int = 8, interval: int = 1, start: float = 0.0) -> Method:
    """Bi-LoRA (Liu et al., 2026): an auxiliary adapter climbs while the adapter descends, in one backward.

    Args:
        rho: the radius; that of the auxiliary's product over all layers. The paper's 0.05; 0.1 for SuperGLUE and Qwen.
        rank: of the auxiliary; the paper's 8.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: an auxiliary adapter, with its gradient and optimizer state.
    """
    return timed(BiLoRA(rho, rank), interval, start)
