"""`WeightAveraging` in any Trainer: the mean by hand, evaluated and saved, and training as if it were not there."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_sharp import SharpTrainer, WeightAveraging, sam
from models import batch_of, mlp_rows, tiny_mlp
from references import flat
from training import Recorder, build, train, weights
from unlearn_runs import tiny_gpt2, unlearn

STEPS = 10
SETTINGS = {"max_steps": STEPS, "learning_rate": 0.05, "optim": "adamw_torch"}


def path(tmp_path, callbacks=(), **settings):
    """The weights after every step, as callbacks before ours see them, and the trainer."""
    seen = []
    look = Recorder(lambda state, model, **_: seen.append(flat(model)))
    model = tiny_mlp(dropout=0.2)
    own = {**SETTINGS, **settings}
    trainer = train(Trainer, model, mlp_rows(60), tmp_path, callbacks=[look, *callbacks], **own)
    return seen, trainer


def by_hand(seen, start, every, decay=None):
    chosen = [w for step, w in enumerate(seen, start=1) if step >= start and (step - start) % every == 0]
    if decay is None:
        return sum(chosen) / len(chosen)
    mean = chosen[0]
    for w in chosen[1:]:
        mean = decay * mean + (1 - decay) * w
    return mean


@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize(("start", "first"), [(4, 4), (0.3, 3), (0, 1)])
def test_the_mean_is_in_the_model_at_the_end_and_training_is_untouched(start, first, decay, tmp_path):
    plain, _ = path(tmp_path)
    seen, trainer = path(tmp_path, [WeightAveraging(start, every=2, decay=decay)])
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    torch.testing.assert_close(weights(trainer), by_hand(plain, first, 2, decay), rtol=0, atol=1e-14)
    assert (weights(trainer) - plain[-1]).abs().max() > 1e-3


def test_the_mean_is_evaluated_and_saved_and_the_weights_go_on(tmp_path):
    rows = mlp_rows(12, seed=5)
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    settings |= {"eval_dataset": {"a": rows, "b": rows}}  # an evaluation moves the random stream, with or without us
    plain, _ = path(tmp_path, **settings)
    seen, trainer = path(tmp_path, [WeightAveraging(4, every=1)], **settings)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    expected = {3: plain[2], 6: sum(plain[3:6]) / 3, 9: sum(plain[3:9]) / 6}
    logged = {line["step"]: line for line in trainer.state.log_history if "eval_b_loss" in line}
    model = tiny_mlp()
    for step, w in expected.items():
        torch.nn.utils.vector_to_parameters(w, model.parameters())
        loss = model.eval()(**batch_of(rows))["loss"].item()
        assert logged[step]["eval_b_loss"] == pytest.approx(loss, abs=1e-12)
        saved = build(Trainer, tiny_mlp(), rows, tmp_path)
        saved._load_from_checkpoint(str(tmp_path / f"checkpoint-{step}"))
        torch.testing.assert_close(weights(saved), w, rtol=0, atol=1e-14)


@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("at", [2, 6])
def test_a_resumed_run_is_the_uninterrupted_one(at, decay, tmp_path):
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2}
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{at}")):
        own = {"callbacks": [WeightAveraging(4, every=3, decay=decay)], "method": sam(0.1), **settings}
        trainer = build(SharpTrainer, tiny_mlp(dropout=0.2), mlp_rows(60), tmp_path, **own)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(weights(trainer))
    assert torch.equal(*runs)


def test_the_best_checkpoint_is_a_mean_and_stays(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    seen, trainer = path(tmp_path, [WeightAveraging(1, every=1)], eval_dataset=mlp_rows(12), **settings)
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert 1 < best < STEPS  # the largest loss comes early
    torch.testing.assert_close(weights(trainer), sum(seen[:best]) / best, rtol=0, atol=1e-12)


def test_weights_of_16_bits_are_averaged_in_32(tmp_path):
    seen = []
    look = Recorder(lambda state, model, **_: seen.append(flat(model)))
    model = tiny_gpt2(float64=False).bfloat16()
    settings = {"objective": "npo", "method": sam(0.5), "max_steps": 6, "optim": "sgd", "learning_rate": 0.5}
    trainer = unlearn(model, tmp_path, callbacks=[look, WeightAveraging(2, every=1)], **settings)
    mean = torch.stack([w.float() for w in seen[1:]]).mean(0)
    assert weights(trainer).dtype == torch.bfloat16 and not torch.equal(seen[1], seen[-1])
    assert (weights(trainer) != mean.bfloat16()).float().mean() < 0.01  # where the two means round apart


class Evaluate(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def test_an_evaluation_at_the_end_of_an_epoch_sees_the_mean(tmp_path):
    rows = mlp_rows(12, seed=5)
    plain, _ = path(tmp_path)
    own = {"callbacks": [Evaluate(), WeightAveraging(1, every=1)], "eval_dataset": rows, **SETTINGS}
    trainer = build(Trainer, tiny_mlp(dropout=0.2), mlp_rows(20), tmp_path, **own)
    trainer.train()
    first = next(line for line in trainer.state.log_history if "eval_loss" in line)
    seen, _ = path(tmp_path, [])
    model = tiny_mlp()
    torch.nn.utils.vector_to_parameters(sum(seen[:5]) / 5, model.parameters())
    assert first["step"] == 5 and seen[4].equal(plain[4])
    assert first["eval_loss"] == pytest.approx(model.eval()(**batch_of(rows))["loss"].item(), abs=1e-12)


REFUSED = {
    "start": ({"start": 1.0}, "share of training in"),
    "negative": ({"start": -1}, "share of training in"),
    "every": ({"every": 0}, "at least 1"),
    "decay": ({"decay": 1.0}, "None for the equal mean"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_right_are_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        WeightAveraging(**settings)


def test_runs_that_cannot_be_averaged_are_refused(tmp_path):
    with pytest.raises(ValueError, match="begins at step 10, and training ends with step 10"):
        path(tmp_path, [WeightAveraging(10)])
    settings = {"save_strategy": "steps", "save_steps": 6}
    path(tmp_path, **settings)
    own = {**SETTINGS, "callbacks": [WeightAveraging(3)], **settings}
    trainer = build(Trainer, tiny_mlp(dropout=0.2), mlp_rows(60), tmp_path, **own)
    with pytest.raises(ValueError, match="is missing: this run resumes after"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
