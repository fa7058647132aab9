"""How long a training step takes."""

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """Measures the time of a training step, without evaluation, saving, logging and data loading.

    The device is waited for at both ends of a step. Of a longer run the first steps, which warm up, do not count.
    """

    warm_up = 3

    def __init__(self) -> None:
        self.durations: list[float] = []
        self.started: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        if self.started is not None:
            self.durations.append(self._now() - self.started)
            self.started = None

    @property
    def seconds_per_step(self) -> float | None:
        """Median duration of a step, or None before the first one."""
        counted = self.durations[self.warm_up :] or self.durations
        return statistics.median(counted) if counted else None

    @staticmethod
    def _now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()
