"""Balancedness-aware regularisation (Li et al., NeurIPS 2024): what SAM does to adapters, without SAM. Cost: 1.

    W' = W + s x y,  x = B, y = A;  right before the optimizer's update, with k = mu lr,
    nBAR: where ||g_x|| >= ||g_y||:  x <- (1 + k) x, y <- (1 - k) y,  elsewhere the reverse
    oBAR: where ||x|| >= ||y||:      x <- (1 - k) x, y <- (1 + k) y,  elsewhere the reverse

It is like decoupled weight decay of a sign that each pair decides. What is zero (B at the start) stays zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sharp._engine.evaluation import Evaluation
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.schedules import Schedule, check_strength, strength_at
from hf_sharp._tensors.shards import local, summed
from hf_sharp._tensors.vector import alike, wide

KINDS = ("n", "o")
HALVES = {".lora_B.": ".lora_A.", ".lora_embedding_B.": ".lora_embedding_A."}  # PEFT's names of x and y
Pair = tuple[int, int]  # where x and y stand among the parameters


@dataclass(frozen=True)
class BAR(Method):
    """The plain gradient, and before each update a step that balances the two halves of every adapter.

    Args:
        mu: strength, times the learning rate; a number or a schedule.
        kind: "n" balances by the gradients (nBAR), "o" by the weights (oBAR).

    Example:
        >>> BAR(mu=0.5).cost
        1.0
    """

    mu: float | Schedule = 0.5
    kind: str = "n"

    def __post_init__(self) -> None:
        check_strength(self.mu, "mu")
        if self.kind not in KINDS:
            raise ValueError(f"kind is 'n' (nBAR, by the gradients) or 'o' (oBAR, by the weights); got {self.kind!r}.")

    @property
    def needs(self) -> frozenset[str]:
        """Adapters are told by the parameters' names; balancing comes right before the update."""
        return frozenset({"names", "update"})

    @property
    def cost(self) -> float:
        """One evaluation."""
        return 1.0

    def check(self, landscape: Landscape) -> None:
        """Refuse a model without adapters, and adapters in which 1 + k is 1."""
        pairs = _pairs(landscape.facts.names)
        if not pairs:
            raise ValueError(
                "BAR balances the two halves of LoRA adapters, and among the trainable parameters is no such pair "
                "(lora_A and lora_B in their names): use get_peft_model(model, LoraConfig(...)) of PEFT, or sam."
            )
        narrow = {t.dtype for x, _ in pairs if (t := landscape.weights.tensors[x]) is not None and t.itemsize < 4}
        if narrow:
            raise ValueError(
                f"BAR multiplies adapters by 1 + mu lr, which {narrow.pop()} rounds to 1. Keep the adapters in "
                "float32 (PEFT's autocast_adapter_dtype=True) and compute in 16 bits by bf16=True."
            )

    def start_note(self, landscape: Landscape) -> str:
        """It perturbs nothing, so the number of adapters stands in place of a share."""
        return f"balances {len(_pairs(landscape.facts.names))} adapters before each update"

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The gradient here; which half is the larger is decided now, and acted upon before the update."""
        here = landscape.evaluate()
        strength = strength_at(self.mu, landscape.facts, "mu") * landscape.facts.lr
        if strength == 0:
            return here
        grads, weights = here.grad.tensors, landscape.weights.tensors
        used = [pair for pair in _pairs(landscape.facts.names) if all(grads[half] is not None for half in pair)]
        if not used:
            return here
        compared, grows = (grads, strength) if self.kind == "n" else (weights, -strength)
        larger = _norms([compared[x] for x, _ in used]) >= _norms([compared[y] for _, y in used])
        signs = torch.where(larger, 1.0, -1.0)

        def balance() -> None:
            _stretch_([weights[x] for x, _ in used], signs, grows)
            _stretch_([weights[y] for _, y in used], signs, -grows)

        return here.with_update(balance)


def _pairs(names: Sequence[str]) -> list[Pair]:
    where = {name: index for index, name in enumerate(names)}
    partners = [(i, name.replace(up, down)) for name, i in where.items() for up, down in HALVES.items() if up in name]
    return [(index, where[partner]) for index, partner in partners if partner in where]


def _norms(tensors: Sequence[Tensor | None]) -> Tensor:
    """The norms of several tensors, as one tensor and without waiting for the device."""
    present = [t for t in tensors if t is not None]
    parts = [wide(local(t)) for t in present]
    norms = torch._foreach_norm(parts, 2) if alike(parts) else [torch.linalg.vector_norm(t) for t in parts]
    squares = torch.stack([n.to(norms[0].device) for n in norms]).square()
    return summed(zip(present, torch.diag(squares), strict=True)).sqrt()


@torch.no_grad()
def _stretch_(tensors: Sequence[Tensor | None], signs: Tensor, share: float) -> None:
    """Multiply each tensor by 1 + its sign times the share, in place."""
    for tensor, sign in zip(tensors, signs, strict=True):
        if tensor is not None:
            local(tensor).mul_(1 + sign.to(tensor.device, tensor.dtype) * share)


@remembered
def bar(mu: Rho = 0.5, kind: str = "n", interval: int = 1, start: float = 0.0) -> Method:
    """BAR (Li et al., 2024): before each update the two halves of every adapter are balanced; no perturbation at all.

    Args:
        mu: strength, times the learning rate. The paper searches 0.2 to 2 (0.05 for QQP, 0.1 to 0.3 for GPT-2).
        kind: "n" balances by the gradients (nBAR), "o" by the weights (oBAR).
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: none.
    """
    return timed(BAR(mu, kind), interval, start)
