"""What a step keeps alive: one copy of what moves, nothing beside it, also where metrics are measured."""

import pytest

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
from memory import peak_bytes
from models import text_rows, tiny_bert
from training import build


def peak(tmp_path, method, logging_steps=100):
    """Peak of steps 2 to 4 in copies of the trainables; most of the model is one tensor, and one row hides nothing."""
    model = tiny_bert(dropout=0.0, hidden_size=64, intermediate_size=128, vocab_size=5000, max_position_embeddings=64)
    model.accepts_loss_kwargs = False
    return peak_bytes(model, method, text_rows(8), tmp_path, logging_steps) / sum(
        4 * p.numel() for p in model.parameters()
    )


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
    plain = peak_of_plain(tmp_path)
    assert plain == pytest.approx(4, abs=0.15)  # weights, gradients and two moments
    assert peak(tmp_path, method) - plain <= bar
    assert peak(tmp_path, method, logging_steps=1) - plain <= bar + 3 * PART


def peak_of_plain(folder, known=[]):  # noqa: B006  one for all methods
    if not known:
        known.append(peak(folder, None))
    return known[0]


def test_metrics_are_computed_on_logging_steps_only(tmp_path, monkeypatch):
    from hf_sharp._engine import mover

    calls = []
    real = mover.measure_shift
    monkeypatch.setattr(mover, "measure_shift", lambda *a: (calls.append(1), real(*a))[1])
    model = tiny_bert(dropout=0.0)
    model.accepts_loss_kwargs = False
    build(SharpTrainer, model, text_rows(40), tmp_path, method=sam(), max_steps=6, logging_steps=3).train()
    assert len(calls) == 2
