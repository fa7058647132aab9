"""What is known at a step without looking at the data: what schedules, balls, masks and methods read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hf_sharp._tensors.shards import placed
from hf_sharp._tensors.vector import ParamVector


def _no_grids() -> Mapping[str, torch.dtype | None]:
    return {}


@dataclass(frozen=True)
class StepFacts:
    """The facts of one optimizer step, written down once by the host when the step begins.

    Attributes:
        parameters: the trainables of the optimizer's groups by name, each tied tensor once. Their order is that of
            every `ParamVector`.
        step: the number of optimizer steps made before this one; methods keep no counters.
        total_steps: the number of optimizer steps of this training, None if unknown.
        warmup_steps: how many of them the learning rate warms up, None if unknown.
        lr: the present learning rate (of the first group).
        lr_max: the largest learning rate of the schedule.
        inflation: how many times the mean over the window the host's loss is: the number of micro-batches of all ranks
            where a model ignores how many items they have; 1 where it is the mean, and where no method asked.
        loss_scale: the factor on the loss that the gradients carry, a 0-dim tensor; 1 without a gradient scaler.
        seed: the training's seed.
        rank: the number of this process among `ranks`.
        ranks: how many processes train together.
        sharded: whether parameters are spread over ranks; no rank then has a gradient by itself.
        shifts_labels: whether the labels of a position are those of the next one, as in causal language models.
        autocast: the 16-bit dtype that the host's forward computes in, None for the weights' own precision.
        skips_overflows: whether a scaler skips the step where a gradient is not finite.
        added: the parameters that the method trains beside the model's (`Part.adds`), by the method's names.
        find_grids: gives `grids`; called at most once, where a shift is added.
    """

    parameters: Mapping[str, nn.Parameter]
    step: int
    total_steps: int | None
    warmup_steps: int | None
    lr: float
    lr_max: float
    loss_scale: Tensor
    seed: int
    rank: int = 0
    ranks: int = 1
    sharded: bool = False
    inflation: float = 1.0
    shifts_labels: bool = False
    autocast: torch.dtype | None = None
    skips_overflows: bool = False
    added: Mapping[str, nn.Parameter] = field(default_factory=lambda: MappingProxyType({}))
    find_grids: Callable[[], Mapping[str, torch.dtype | None]] = field(default=_no_grids, repr=False)

    @cached_property
    def names(self) -> list[str]:
        """The parameters' names, in the order of every `ParamVector`."""
        return list(self.parameters)

    @cached_property
    def grids(self) -> Mapping[str, torch.dtype | None]:
        """The 16-bit format in which a forward sees each parameter, None where it sees all of it."""
        return self.find_grids()

    def named(self, vector: ParamVector) -> dict[str, Tensor]:
        """A vector as a dict, the form in which methods keep state.

        Args:
            vector: over the parameters.

        Returns:
            Its tensors by parameter name, where there are any.
        """
        return {name: t for name, t in zip(self.names, vector.tensors, strict=True) if t is not None}

    def check_shapes(self, named: Mapping[str, Tensor]) -> None:
        """Refuse what was kept from a step at which a parameter had another shape.

        Args:
            named: tensors by parameter name.

        Raises:
            ValueError: naming the parameter, both shapes and the way out.
        """
        for name, parameter in self.parameters.items():
            if name in named and named[name].shape != parameter.shape:
                raise ValueError(
                    f"The method keeps a tensor of shape {tuple(named[name].shape)} for {name}, which has the shape "
                    f"{tuple(parameter.shape)} now: it was resized in mid-training (resize_token_embeddings). Resize "
                    "before training, or let the method forget what it keeps: method.reset()."
                )

    def vector(self, named: Mapping[str, Tensor]) -> ParamVector:
        """The vector of a dict that `named` made, where the parameters are now.

        Args:
            named: tensors by parameter name.

        Returns:
            The vector, None where the dict has nothing.
        """
        self.check_shapes(named)
        return ParamVector(placed(named[name], p) if name in named else None for name, p in self.parameters.items())

    def cast(self, vector: ParamVector) -> ParamVector:
        """A vector in the dtypes of the parameters.

        Args:
            vector: over the parameters.

        Returns:
            The same tensors where nothing is to be cast.
        """
        pairs = zip(vector.tensors, self.parameters.values(), strict=True)
        return ParamVector(None if t is None else t.to(p.dtype) for t, p in pairs)

    def random(self, tag: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A private generator, the same on every rank for the same seed, step and tag.

        Args:
            tag: what is drawn, such as a parameter's name.
            device: where to draw; kinds of devices give different numbers.

        Returns:
            The generator; the global random stream is not touched.
        """
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{tag}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
