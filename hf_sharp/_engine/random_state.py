"""The random streams that a forward may draw from: read, and set again."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """The random streams of Python, NumPy, torch's CPU generator and the devices that hold parameters."""

    python: Any
    numpy: Any
    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def record(cls, devices: Iterable[torch.device]) -> RandomState:
        """Read all streams. Reading a device's stream is done on the host and waits for nothing.

        Args:
            devices: the devices besides the CPU whose generators a forward pass may draw from.

        Returns:
            The record.
        """
        states = {device: _module(device).get_rng_state(*_which(device)) for device in devices}
        return cls(random.getstate(), numpy.random.get_state(), torch.get_rng_state(), states)

    def restore(self) -> None:
        """Set all streams to this record."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            _module(device).set_rng_state(state, *_which(device))


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # torch.mps has one device and takes no argument


@contextmanager
def streams_kept(devices: Iterable[torch.device]) -> Generator[None]:
    """Whatever is drawn inside, the random streams afterwards are what they were before.

    Args:
        devices: the devices besides the CPU to look after.

    Yields:
        Nothing.
    """
    before = RandomState.record(devices)
    try:
        yield
    finally:
        before.restore()
