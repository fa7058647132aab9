"""`ClosureHost`: what the engine needs of an optimizer and a closure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._engine.evaluation import Hook
from hf_sharp._engine.facts import StepFacts
from hf_sharp._engine.host import Host
from hf_sharp._integrations.momentum import momentum_of
from hf_sharp._tensors.shards import sharded


class ClosureHost(Host):
    """A closure as a `Host`: it makes forward and backward of the whole batch, as torch has it.

    Args:
        optimizer: the base optimizer.
        model: whose names and modules the method may ask for, or None.

    Attributes:
        given: that model, or None.
        largest: the largest learning rate so far.
    """

    accumulates = False

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None) -> None:
        self.optimizer, self.step, self.seed = optimizer, 0, 0
        self.added: Mapping[str, nn.Parameter] = {}
        self.model = nn.Module() if model is None else model  # without one there are no buffers to look after
        self.given, self.named = model, _names(optimizer, model)
        self.loss: Any = None
        self.largest = 0.0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainables of the base optimizer's groups."""
        own = {id(p) for p in self.added.values()}
        held = [p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad and id(p) not in own]
        if any(sharded(p) and id(p) not in self.named for p in held):  # `accelerator.prepare` has sharded the model
            self.reshard()
            self.named = _names(self.optimizer, self.given)
        return {self.named.get(id(p), f"parameter {index}"): p for index, p in enumerate(held)}

    def facts(self) -> StepFacts:
        """Those of the base optimizer; no length of training is known, and a scaler is refused."""
        parameters, first = self.parameters, self.optimizer.param_groups[0]
        lr = float(first["lr"])
        self.largest = max(self.largest, lr)
        return StepFacts(
            parameters=parameters,
            step=self.step,
            total_steps=None,
            warmup_steps=None,
            lr=lr,
            lr_max=float(first.get("initial_lr", self.largest)),  # schedulers set it
            loss_scale=torch.ones((), device=next((p.device for p in parameters.values()), None)),
            seed=self.seed,
            sharded=any(sharded(p) for p in parameters.values()),
            added=self.added,
            find_grids=lambda: {n: p.dtype if p.dtype.itemsize == 2 else None for n, p in parameters.items()},
        )

    def reshard(self) -> None:
        """Of the model, where it is known; a backward has done it otherwise."""
        for module in self.model.modules():
            if callable(getattr(module, "reshard", None)):
                module.reshard()  # pyright: ignore[reportCallIssue]

    def normaliser(self, batches: Sequence[Any] | None) -> None:
        """The closure divides its loss itself."""

    def backward(
        self, batch: Any, normaliser: None, only: Sequence[nn.Parameter] | None, hook: Hook | None = None
    ) -> Tensor:
        """The closure; all gradients, whatever is asked for."""
        del normaliser, only, hook
        with torch.enable_grad():
            loss = batch()
        self.loss = loss if self.loss is None else self.loss
        value = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(0.0 if loss is None else float(loss))
        return value.sum()

    def forward(self, batch: Any) -> Any:
        """A closure has no outputs."""
        raise NotImplementedError

    def recompute(self, weights: Mapping[str, Tensor]) -> Any:
        """A closure has no outputs."""
        raise NotImplementedError

    def row_backward(self, row: Any) -> None:
        """A closure has no rows."""
        raise NotImplementedError

    def unsynced(self) -> AbstractContextManager[Any]:
        """The closure decides."""
        return nullcontext()

    def refuse_subsets(self, reason: str) -> None:
        """Nothing to refuse: a closure gives all gradients."""

    def momentum(self) -> dict[str, Tensor] | None:
        """The base optimizer's."""
        return momentum_of(self.optimizer, self.parameters)

    def mean_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """One process."""
        return tensors


def _names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[int, str]:
    if model is not None:
        return {id(p): name for name, p in model.named_parameters()}
    return {
        id(p): name
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }
