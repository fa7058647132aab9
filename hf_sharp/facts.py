"""What is known at a step without looking at the data: what schedules, balls and masks read."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from hf_sharp.host import Host
from hf_sharp.vector import ParamVector


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
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by name."""
        return dict(self.host.model.named_modules())

    def random(self, tag: str) -> torch.Generator:
        """A private generator on the CPU, the same on every rank for the same seed, step and tag.

        Args:
            tag: what is drawn, such as a parameter's name.

        Returns:
            The generator; the global random stream is not touched.
        """
        digest = hashlib.blake2b(f"{self.host.seed}/{self.step}/{tag}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
