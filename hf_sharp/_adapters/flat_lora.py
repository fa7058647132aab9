"""Flat-LoRA (Li et al., ICML 2025): LoRA under random noise on the merged weights instead of an ascent. Cost: 1.

    W' = W + s B A;  row i of W' is shifted by z_i ~ N(0, sigma_t^2 ||W'_i||^2 / inputs), the same for the whole window
    sigma_t = sigma (1 - cos(pi t / T)) / 2;  descend the gradient of A and B there

The noise is added to the frozen W, comes anew from (seed, step, layer) for each micro-batch, and a copy of W brings
back every bit. (The authors' code draws from the global generator, and subtracts the noise again, by which W drifts.)
The logged loss is that of the shifted weights.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sharp._adapters.lora import LoraLinear, lora_linears, refuse_shards
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import Rho, remembered, scheduled, timed
from hf_sharp._perturbation.schedules import Cosine, Schedule, check_strength, strength_at
from hf_sharp._tensors.vector import wide

NAME = "Flat-LoRA"


class Base(NamedTuple):
    """The frozen weight of an adapted layer.

    Attributes:
        linear: the layer.
        weight: W as it is stored.
    """

    linear: LoraLinear
    weight: nn.Parameter

    @property
    def rows(self) -> Tensor:
        """A view of W of (outputs, inputs)."""
        return self.weight.detach().T if self.linear.layer.fan_in_fan_out else self.weight.detach()

    def halves(self) -> tuple[Tensor, Tensor]:
        """All active adapters joined: A of (ranks, inputs) and s B of (outputs, ranks), in float32 or better."""
        layer, weight = self.linear.layer, self.weight
        kind: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        a = torch.cat([layer.lora_A[name].weight.detach() for name in active])
        b = torch.cat([layer.scaling[name] * layer.lora_B[name].weight.detach() for name in active], dim=1)
        return a.to(**kind), b.to(**kind)


@dataclass(frozen=True)
class FlatLoRA(Method):
    """The adapters' gradient at base weights under noise in proportion to their rows.

    Args:
        sigma: the noise in units of a row's root mean square; a number, or a schedule (in the paper it rises along
            half a cosine).

    Example:
        >>> FlatLoRA(sigma=0.05).cost
        1.0
    """

    ahead = True

    sigma: float | Schedule = 0.05

    def __post_init__(self) -> None:
        check_strength(self.sigma, "sigma")

    @property
    def needs(self) -> frozenset[str]:
        """The adapters, and the base weights under them, are found among the modules."""
        return frozenset({"modules"})

    @property
    def cost(self) -> float:
        """One evaluation."""
        return 1.0

    def check(self, landscape: Landscape) -> None:
        """Refuse a model without plain adapters, and weights that noise cannot be added to."""
        refuse_shards(landscape, NAME)
        _bases(landscape.model)

    def start_note(self, landscape: Landscape) -> str:
        """Frozen weights carry the noise, and they are no share of the trainables."""
        sizes = [base.weight.numel() for base in _bases(landscape.model)]
        return f"puts noise on {len(sizes)} frozen base weights ({sum(sizes):,} entries) during each pass"

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The noise is known before the data; each micro-batch's pass draws the same."""
        sigma = strength_at(self.sigma, landscape.facts, "sigma")
        return FirstPass(within=lambda: _noisy(landscape, sigma)) if sigma > 0 else FirstPass()

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The first evaluation, under the noise."""
        return landscape.evaluate()


@contextmanager
def _noisy(landscape: Landscape, sigma: float) -> Generator[None]:
    bases = _bases(landscape.model)
    with landscape.restored([base.weight for base in bases]):
        for base in bases:
            _add_noise_(base, sigma, landscape.facts.random(f"flat_lora/{base.linear.name}", base.weight.device))
        torch.clear_autocast_cache()
        yield


@torch.no_grad()
def _add_noise_(base: Base, sigma: float, generator: torch.Generator) -> None:
    """Row by row, a part of the layer at a time; ||W'_i||^2 = ||W_i||^2 + 2 <W_i, b_i A> + ||b_i A||^2."""
    (everything, inputs), device = (base.rows, base.rows.shape[1]), base.weight.device
    size = max(1, (2**16 if device.type == "cpu" else 2**24) // inputs)
    with torch.autocast(device.type, enabled=False):
        a, all_b = base.halves()
        square = a @ a.T
        for rows, b in zip(everything.split(size), all_b.split(size), strict=True):
            w = wide(rows)
            squares = w.square().sum(1) + 2 * ((w @ a.T) * b).sum(1) + ((b @ square) * b).sum(1)
            spread = sigma * (squares.clamp_min(0) / inputs).sqrt()
            draw = torch.randn(rows.shape, generator=generator, device=device)
            rows.add_(draw.to(w.dtype).mul_(spread.unsqueeze(1)))


def _bases(model: nn.Module) -> list[Base]:
    found: dict[int, Base] = {}
    for linear in lora_linears(model, NAME):
        weight = linear.layer.get_base_layer().weight
        _refuse_quantised(linear, weight)
        found.setdefault(id(weight), Base(linear, weight))
    return list(found.values())


def _refuse_quantised(linear: LoraLinear, weight: Tensor) -> None:
    kind = type(linear.layer.get_base_layer()).__name__
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        raise ValueError(
            f"{NAME} adds noise to the base weights, and those of '{linear.name}' ({kind}) are quantised. Load the "
            "model in 16 or 32 bits, or use bi_lora, which leaves the base weights alone."
        )


@remembered
def flat_lora(sigma: Rho = 0.05, interval: int = 1, start: float = 0.0) -> Method:
    """Flat-LoRA (Li et al., 2025): the adapters' gradient under random noise on the base weights.

    Args:
        sigma: the last noise, reached from zero along half a cosine, in units of a row's root mean square; or a
            schedule (`Constant(0.05)` for none). The authors' 0.05 for language models, 0.15 for CLIP.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: a copy of the adapted base weights.
    """
    return timed(FlatLoRA(scheduled(sigma, lambda last: Cosine(0.0, last))), interval, start)
