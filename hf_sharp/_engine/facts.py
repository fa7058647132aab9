"""What is known at a step without looking at the data: what schedules, balls and masks read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_sharp._engine.host import Host
from hf_sharp._tensors.shards import placed
from hf_sharp._tensors.vector import ParamVector


class Facts:
    """The host's facts under the names that methods use.

    Args:
        host: the training loop.
    """

    def __init__(self, host: Host) -> None:
        self.host = host

    @property
    def step(self) -> int:
        """The number of optimizer steps made before this one; methods keep no counters."""
        return self.host.step

    @property
    def total_steps(self) -> int | None:
        """The number of optimizer steps of this training, None if unknown."""
        return self.host.total_steps

    @property
    def warmup_steps(self) -> int | None:
        """How many steps the learning rate warms up, None if unknown."""
        return self.host.warmup_steps

    @property
    def lr(self) -> float:
        """The present learning rate."""
        return self.host.lr

    @property
    def lr_max(self) -> float:
        """The largest learning rate of the schedule."""
        return self.host.lr_max

    @property
    def loss_scale(self) -> Tensor:
        """The factor that this step's gradients carry, a 0-dim tensor; 1 without a scaler."""
        return self.host.loss_scale

    @property
    def names(self) -> list[str]:
        """The parameters' names, in the order of every `ParamVector`."""
        return list(self.host.parameters)

    @property
    def weights(self) -> ParamVector:
        """The present weights, as views: they change when the weights do."""
        return ParamVector(p.detach() for p in self.host.parameters.values())

    @property
    def added(self) -> Mapping[str, nn.Parameter]:
        """The method's own parameters, those of `Part.adds`; their gradients are left to the method."""
        return self.host.added

    @property
    def autocast(self) -> torch.dtype | None:
        """The 16-bit dtype that forwards compute in, None for the weights' own precision."""
        return self.host.autocast

    @property
    def shifts_labels(self) -> bool:
        """Whether the labels of a position are those of the next one, as in causal language models."""
        return self.host.shifts_labels

    def momentum(self) -> ParamVector | None:
        """The momentum that the optimizer has gathered so far, loss scale removed.

        Returns:
            SGD's momentum or Adam's first moment, not to be changed; None before the first step.
        """
        found = self.host.momentum()
        return None if found is None else ParamVector(found.get(name) for name in self.names)

    def mean_over_ranks(self, vector: ParamVector) -> ParamVector:
        """The mean of a vector over all ranks.

        Args:
            vector: one that this rank has by itself, with tensors for the same parameters on every rank.

        Returns:
            The mean, equal on all ranks.
        """
        if self.host.ranks == 1:
            return vector
        means = iter(self.host.mean_over_ranks(vector.present()))
        return vector.map(lambda _: next(means))

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks, so that no rank can have a gradient by itself."""
        return self.host.sharded

    def over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks.

        Args:
            value: the same shape on every rank.

        Returns:
            The sum, equal on all ranks.
        """
        return value if self.host.ranks == 1 else self.host.mean_over_ranks([value])[0] * self.host.ranks

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by name, sharded ones with their shards."""
        self.host.reshard()
        return dict(self.host.model.named_modules())

    def named(self, vector: ParamVector) -> dict[str, Tensor]:
        """A vector as a dict, the form in which methods keep state.

        Args:
            vector: over the parameters.

        Returns:
            Its tensors by parameter name, where there are any.
        """
        return {name: t for name, t in zip(self.names, vector.tensors, strict=True) if t is not None}

    def vector(self, named: Mapping[str, Tensor]) -> ParamVector:
        """The vector of a dict that `named` made, where the parameters are now.

        Args:
            named: tensors by parameter name.

        Returns:
            The vector, None where the dict has nothing.
        """
        parameters = self.host.parameters.items()
        return ParamVector(placed(named[name], p) if name in named else None for name, p in parameters)

    def cast(self, vector: ParamVector) -> ParamVector:
        """A vector in the dtypes of the parameters.

        Args:
            vector: over the parameters.

        Returns:
            The same tensors where nothing is to be cast.
        """
        pairs = zip(vector.tensors, self.host.parameters.values(), strict=True)
        return ParamVector(None if t is None else t.to(p.dtype) for t, p in pairs)

    def random(self, tag: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A private generator, the same on every rank for the same seed, step and tag.

        Args:
            tag: what is drawn, such as a parameter's name.
            device: where to draw; kinds of devices give different numbers.

        Returns:
            The generator; the global random stream is not touched.
        """
        digest = hashlib.blake2b(f"{self.host.seed}/{self.step}/{tag}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
