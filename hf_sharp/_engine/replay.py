"""Passes that leave no trace: the random stream of an earlier pass repeated, buffers kept as they are."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

SMALL = (
    4096  # integer buffers up to this size are copied; larger ones are tables (quantised weights) that nobody moves
)


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
def streams_kept(devices: Iterable[torch.device]) -> Iterator[None]:
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


def buffer_copies(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's buffers, for a pass that must not touch the buffers: a graph may have saved them.

    Args:
        model: the module.

    Returns:
        Copies by name; large integer buffers, which are tables that nobody moves, are left out.
    """
    small = {n: b for n, b in model.named_buffers() if b.is_floating_point() or b.is_complex() or b.numel() <= SMALL}
    return {name: buffer.detach().clone() for name, buffer in small.items()}


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever moves the buffers inside (BatchNorm statistics, counters), they are afterwards what they were before.

    Args:
        model: the module whose buffers are looked after; also those that its forward replaces by new tensors.

    Yields:
        Nothing.

    Raises:
        RuntimeError: if a large integer buffer moved, which is not copied because such buffers are quantised weights.
    """
    kept: list[tuple[nn.Module, str, Tensor, Tensor | None, int]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                small = buffer.is_floating_point() or buffer.is_complex() or buffer.numel() <= SMALL
                kept.append((module, name, buffer, buffer.detach().clone() if small else None, buffer._version))
    try:
        yield
    finally:
        with torch.no_grad():
            moved = [_restore(*record) for record in kept]
    if any(moved):
        names = [name for (_, name, *_), bad in zip(kept, moved, strict=True) if bad]
        raise RuntimeError(
            f"The forward pass changes the integer buffers {names} of over {SMALL} entries, which a second pass would "
            "change twice. Keep such counters in a floating-point buffer."
        )


def _restore(module: nn.Module, name: str, buffer: Tensor, copy: Tensor | None, version: int) -> bool:
    if module._buffers.get(name) is not buffer:
        module._buffers[name] = buffer
    if copy is not None:
        buffer.copy_(copy)
    return copy is None and buffer._version != version
