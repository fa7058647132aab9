"""Switches of torch that a `with` block turns for a while, and that Ctrl-C in its exit would leave turned."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch


class Switches(NamedTuple):
    """Whether gradients are recorded, and what autocast does.

    Attributes:
        grad: whether operations are recorded.
        casts: for each kind of device, whether autocast is on, and to which dtype it casts.
        cache: whether autocast keeps its casts of weights.
        depth: how many autocast regions are open.
    """

    grad: bool
    casts: list[tuple[str, bool, torch.dtype]]
    cache: bool
    depth: int

    @classmethod
    def record(cls) -> Switches:
        """Read them, for the CPU and the accelerator of this machine; this waits for nothing.

        Returns:
            The record.
        """
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kinds = ["cpu"] if device is None else ["cpu", device.type]
        casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        depth = torch.autocast_increment_nesting() - 1  # there is no other way to read it
        torch.autocast_decrement_nesting()
        return cls(torch.is_grad_enabled(), casts, torch.is_autocast_cache_enabled(), depth)

    def restore(self) -> None:
        """Set them to this record."""
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        torch.autocast_increment_nesting()
        while torch.autocast_decrement_nesting() > self.depth:
            pass
        if not self.depth:
            torch.clear_autocast_cache()  # as the outermost region does on its way out


@contextmanager
def eager(region: Callable[[Callable[[], None]], AbstractContextManager[None]]) -> Generator[None]:
    """While open, compiled code runs as it was written.

    Args:
        region: of the list of what is out of its place.

    Yields:
        Nothing.
    """
    stances: list[Any] = []

    def put_back() -> None:
        for stance in stances:
            stance.__exit__(None, None, None)

    with region(put_back):
        stances.append(torch.compiler.set_stance("force_eager"))
        yield
