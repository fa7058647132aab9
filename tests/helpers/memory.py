"""The peak of what a training keeps alive, counted in bytes of tensors: no clock and no allocator has a part in it."""

import gc
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_sharp import Method, SharpTrainer
from hf_sharp.recipes.report import LiveTensors
from models import Rows
from training import build


class Watch(TrainerCallback):
    """Forgets the peak of the first step, after which the optimizer has its moments."""

    def __init__(self, live: LiveTensors):
        self.live = live

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.live.peak = self.live.now


def peak_bytes(model: Any, method: Method | None, rows: Rows, folder: Any, logging_steps: int = 100) -> int:
    """Peak of steps 2 to 4 of AdamW on single rows; without a method the host's own Trainer trains."""
    gc.collect()
    live = LiveTensors()
    cls, own = (Trainer, {}) if method is None else (SharpTrainer, {"method": method})
    settings = {"per_device_train_batch_size": 1, "max_steps": 4, "optim": "adamw_torch_fused"}
    settings |= {"logging_steps": logging_steps, "callbacks": [Watch(live)]}
    trainer = build(cls, model, rows, folder, **settings, **own)
    with live:
        for parameter in model.parameters():
            live.track(parameter)
        trainer.train()
    return live.peak
