"""What a step keeps alive: one copy of what moves, nothing beside it, also where metrics are measured."""

import gc

import pytest
from transformers import Trainer, TrainerCallback

from doors import build
from hf_sharp import (
    SharpTrainer,
    asam,
    fisher_sam,
    friendly_sam,
    fsam,
    gam,
    gradient_penalty,
    gsam,
    looksam,
    mesa,
    msam,
    randomized_smoothing,
    sam,
    sam_on,
    vasso,
    wsam,
)
from hf_sharp.recipes.report import LiveTensors
from models import text_rows, tiny_bert


class Watch(TrainerCallback):
    def __init__(self, live):
        self.live = live

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:  # the optimizer has its moments now
            self.live.peak = self.live.now


def peak(tmp_path, method, logging_steps=100):
    """Peak of steps 2 to 4 in copies of the trainables; most of the model is one tensor, and one row hides nothing."""
    gc.collect()
    model = tiny_bert(dropout=0.0, hidden_size=64, intermediate_size=128, vocab_size=5000, max_position_embeddings=64)
    model.accepts_loss_kwargs = False
    live = LiveTensors()
    cls = Trainer if method is None else SharpTrainer
    own = {} if method is None else {"method": method}
    settings = {
        "per_device_train_batch_size": 1,
        "max_steps": 4,
        "logging_steps": logging_steps,
        "optim": "adamw_torch_fused",
    }
    trainer = build(cls, model, text_rows(8), tmp_path, callbacks=[Watch(live)], **settings, **own)
    with live:
        for parameter in model.parameters():
            live.track(parameter)
        trainer.train()
    return live.peak / sum(4 * p.numel() for p in model.parameters())


PART = 65_536 / 446_659  # temporaries are parts of a tensor; in copies of this small model they are large


@pytest.mark.parametrize(
    "method, bar",
    [
        (sam(), 1.02),
        (fsam(), 1.27),
        (asam(), 1.02 + 6 * PART),
        (fisher_sam(), 1.02 + 6 * PART),
        (sam_on(), 0.02),
        (msam(), 1.02),
        (looksam(every=3), 2.02 + 2 * PART),
        (gsam(), 2.02 + 2 * PART),
        (wsam(), 2.02),
        (friendly_sam(), 3.02),
        (vasso(), 3.02),
        (gam(), 3.02),
        (mesa(), 2.02),
        (gradient_penalty(), 2.02),
        (randomized_smoothing(), 2.02),
    ],
    ids=lambda value: "" if isinstance(value, float) else type(value).__name__,
)
def test_the_peak_beyond_plain_training(method, bar, tmp_path):
    plain = peak(tmp_path, None)
    assert plain == pytest.approx(4, abs=0.15)  # weights, gradients and two moments
    assert peak(tmp_path, method) - plain <= bar
    assert peak(tmp_path, method, logging_steps=1) - plain <= bar + 3 * PART


def test_metrics_are_computed_on_logging_steps_only(tmp_path, monkeypatch):
    from hf_sharp._engine import landscape

    calls = []
    real = landscape.realised
    monkeypatch.setattr(landscape, "realised", lambda *a: (calls.append(1), real(*a))[1])
    model = tiny_bert(dropout=0.0)
    model.accepts_loss_kwargs = False
    build(SharpTrainer, model, text_rows(40), tmp_path, method=sam(), max_steps=6, logging_steps=3).train()
    assert len(calls) == 2
