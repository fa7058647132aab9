"""Gained and forgotten: values by hand, and sentences that say no more than the seeds show."""

import gc
import math

import pytest
import torch
from transformers import Trainer

from hf_sharp import SharpTrainer, sam
from hf_sharp.recipes import report
from hf_sharp.recipes.report.memory import LiveTensors, PeakMemory
from models import mlp_rows, text_rows, tiny_bert, tiny_mlp
from training import arguments, train

PLACES = ["new", "old"]


def row(method, seed, *path, seconds=0.1, memory=2**20):
    return {"method": method, "seed": seed, "path": list(path), "seconds_per_step": seconds, "memory": memory}


def test_perplexities_are_read_off_the_log_step_by_step():
    history = [
        {"loss": 3.0, "step": 5},
        {"eval_new_loss": math.log(8), "step": 0},
        {"eval_old_loss": math.log(2), "step": 0},
        {"eval_new_loss": math.log(4), "eval_old_loss": 9.0, "step": 5},
        {"eval_old_loss": math.log(3), "step": 5},  # evaluated again: the last one counts
        {"eval_new_loss": 1.0, "step": 7},  # one place only
    ]
    assert report.perplexities(history, PLACES) == [pytest.approx([8, 2]), pytest.approx([4, 3])]
    assert report.perplexities(history, ["new"]) == [pytest.approx([8]), pytest.approx([4]), [pytest.approx(math.e)]]


BASE = [(100, 10), (50, 20), (30, 40)]


@pytest.mark.parametrize(
    "ours, expected",
    [
        ([(100, 10), (40, 25)], 25 - 30),
        ([(100, 10), (50, 20)], 0.0),
        ([(100, 10), (75, 15)], 0.0),
        ([(100, 10), (30, 41)], 1.0),
        ([(100, 10), (50, 18), (20, 60)], 18 + 42 * 20 / 30 - 40),  # ours learned more, and is read at 30
        ([(100, 10), (100, 12)], None),
        ([(100, 10), (120, 12)], None),  # it got worse
    ],
)
def test_excess_by_hand(ours, expected):
    assert report.excess(ours, BASE) == (None if expected is None else pytest.approx(expected))
    back = report.excess(BASE, ours)
    assert back == (None if expected is None else pytest.approx(-expected))


def test_excess_on_a_path_that_turns_takes_the_first_time():
    path = [(100, 10), (60, 20), (80, 30), (40, 40)]
    assert report.excess([(100, 10), (70, 20)], path) == pytest.approx(20 - 17.5)
    assert report.excess([(50, 1), (50, 2)], [(60, 1), (50, 3)]) is None  # it did not move


def table_of(ends, **more):
    """Three seeds of a baseline from (100, 10) to (20, 50), and of another method that ended as given."""
    rows = [row("lora", seed, (100, 10), (20, 50)) for seed in range(len(ends))]
    return rows + [row("other", seed, (100, 10), end, **more) for seed, end in enumerate(ends)]


def test_the_table_says_what_was_gained_forgotten_and_taken():
    lines = report.exchange(table_of([(28, 44), (28, 43), (28, 42)], seconds=0.2, memory=3 * 2**20), PLACES, "lora")
    heads, dashes, before, base, other, less, sentence = lines.splitlines()
    assert before.split() == "before - 100.00 10.00 - - - - - - -".split()
    assert heads.split("  ")[0].strip() == "method" and set(dashes) == {"-"} and less.startswith("Perplexities: less")
    assert base.split() == "lora 3 20.00 50.00 - - - 100.0 1.00 1.0 1.00".split()
    # At 28 the baseline had forgotten up to 46: -2, -3, -4, with a 95 % interval of 4.303 / sqrt(3) = 2.48 around -3.
    expected = "other 3 28.00 43.00 +8.00 +/- 0.00 -7.00 +/- 2.48 -3.00 +/- 2.48 200.0 2.00 3.0 3.00"
    assert other.split() == expected.split()
    assert sentence == "other: forgets less than lora at equal gain (-3.00 +/- 2.48)."


@pytest.mark.parametrize(
    "ends, words",
    [
        ([(28, 48), (28, 49), (28, 50)], "forgets more than lora at equal gain (+3.00 +/- 2.48)"),
        ([(28, 45), (28, 46), (28, 48)], "no difference to lora at equal gain that 3 seeds can show"),
        ([(28, 40)], "-6.00 out-of-domain at equal gain; one seed is a hint at most"),
        ([(28, 40), (110, 40)], "1 of 2 pairs of runs did not get better in-domain"),
    ],
)
def test_sentences(ends, words):
    assert words in report.exchange(table_of(ends), PLACES, "lora").splitlines()[-1]


def test_without_an_old_domain_there_is_no_sentence():
    rows = [row("lora", 0, (100,), (20,)), row("other", 0, (100,), (19,), memory=None)]
    lines = report.exchange(rows, PLACES[:1], "lora").splitlines()
    assert len(lines) == 6 and lines[4].split() == "other 1 19.00 -1.00 - 100.0 1.00 - -".split()


def test_the_picture_has_a_line_a_run_and_one_entry_a_method(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    labels = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: labels.append(k.get("label")) or plot(*a, **k))
    report.plot_paths(table_of([(28, 44), (28, 43)]), tmp_path / "a.png", PLACES)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(labels) == 8 and [label for label in labels if label] == ["lora", "other"]


# ---- memory of a step


def test_the_peak_of_a_step_counts_what_sam_copies(tmp_path):
    """Beyond plain training: one copy of the trainables, within a tenth (activations come and go)."""
    peaks = {}
    for name, method in (("plain", None), ("sam", sam(0.1))):
        gc.collect()
        others = LiveTensors()  # what tests before left alive
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
                others.track(thing)
        model = tiny_bert(dropout=0.0, hidden_size=64, intermediate_size=128, vocab_size=3000)
        model.accepts_loss_kwargs = False
        memory = PeakMemory()
        settings = {"callbacks": [memory], "max_steps": 4, "logging_steps": 10, "per_device_train_batch_size": 1}
        train(SharpTrainer, model, text_rows(20), tmp_path, method=method, **settings)
        peaks[name] = memory.peak - others.now
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        del model
    assert 3.9 < peaks["plain"] / size < 6  # weights, gradients, two moments, and what the optimizer needs
    assert (peaks["sam"] - peaks["plain"]) / size == pytest.approx(1, abs=0.35)


def test_a_short_run_has_no_peak(tmp_path):
    memory = PeakMemory()
    train(Trainer, tiny_mlp(), mlp_rows(20), tmp_path, max_steps=2, callbacks=[memory])
    assert memory.peak is None and not arguments(tmp_path).device.type == "cuda"
    before = torch.ones(3) + 1  # no mode is left on
    assert before.sum() == 6
