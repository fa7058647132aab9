"""A hyperparameter search reaches the method: each trial trains as a Trainer of its own with those settings would."""

import json
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import integrations, trainer
from transformers.trainer_utils import HPSearchBackend

from hf_sharp import SAM, Linear, Perturbation, SharpConfig, SharpTrainer, asam, sam
from hf_sharp._integrations.search import divide, searched
from hf_sharp._presets.names import METHODS, options_of
from models import mlp_rows, tiny_mlp
from training import build, train, weights


def fresh():
    return tiny_mlp()


def backend_trying(values, kept, listed):
    """A backend that tries the values one after the other, as Optuna (or, listed, as Ray and W&B) hands them."""

    class Backend:
        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction):
            for number in range(n_trials):
                trial = dict(values[number]) if listed else SimpleNamespace(number=number, params=values[number])
                trainer.train(trial=trial)
                kept.append((weights(trainer), trainer.method, trainer.sharp_config))

    return Backend


def search(values, folder, monkeypatch, listed=False, **settings):
    """What every trial left: weights, method and settings; and the trainer."""
    kept = []
    kind = HPSearchBackend.WANDB if listed else HPSearchBackend.OPTUNA
    backends = {kind: backend_trying(values, kept, listed)}
    monkeypatch.setattr(trainer, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends)
    monkeypatch.setattr(integrations, "hp_params", dict if listed else lambda trial: trial.params)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="0")))  # names a folder
    searching = build(SharpTrainer, None, mlp_rows(20), folder, **{"model_init": fresh, **settings})
    searching.hyperparameter_search(lambda trial: trial.params, n_trials=len(values), backend=kind)
    return kept, searching


@pytest.mark.parametrize("listed", [False, True], ids=["asked for", "listed"])
def test_a_trial_trains_as_its_own_trainer_would(listed, tmp_path, monkeypatch, capsys):
    values = [
        {"sharp_rho": 0.3, "learning_rate": 0.02},
        {"sharp_method": "asam", "sharp_rho": 0.7, "sharp_eta": 0.1},
        {},
        {"sharp_interval": numpy.int64(2)},
    ]
    given = {"method": "sam", "rho": 0.1, "start": 0.2}
    kept, searching = search(values, tmp_path, monkeypatch, listed, method=given)
    alone = [sam(0.3, start=0.2), asam(0.7, eta=0.1), sam(0.1, start=0.2), sam(0.1, start=0.2, interval=2)]
    assert [method for _, method, _ in kept] == alone
    for method, (found, _, _) in zip(alone, kept, strict=True):
        own = train(SharpTrainer, None, mlp_rows(20), tmp_path, model_init=fresh, method=method, learning_rate=0.02)
        assert torch.equal(weights(own), found)  # the Trainer's own values stay from trial to trial
    printed = capsys.readouterr().out
    assert all(printed.count(repr(method)) >= 1 for method in alone)
    assert not any(name.startswith("sharp_") for name in vars(searching.args))


def test_a_trial_without_settings_is_the_method_that_was_given(tmp_path, monkeypatch):
    kept, _ = search([{"sharp_method": "sam", "sharp_rho": 0.5}, {}], tmp_path, monkeypatch)
    plain = train(SharpTrainer, None, mlp_rows(20), tmp_path, model_init=fresh)
    assert [method for _, method, _ in kept] == [sam(0.5), None]
    assert torch.equal(kept[1][0], weights(plain)) and not torch.equal(kept[0][0], weights(plain))


def test_checkpoints_of_a_trial_hold_its_settings(tmp_path, monkeypatch):
    search([{"sharp_rho": 0.3}], tmp_path, monkeypatch, method="sam", save_strategy="steps", save_steps=5)
    record = json.loads((tmp_path / "run-0" / "checkpoint-5" / "sharp_config.json").read_text())
    assert record["settings"] == {**sam(0.3)._call} and record["settings"]["rho"] == 0.3


@pytest.mark.parametrize(
    "method, values, message",
    [
        (SAM(Perturbation(0.1)), {"sharp_rho": 0.2}, 'sets sharp_rho, but .*method="sam"'),
        (None, {"sharp_rho": 0.2, "sharp_start": 0.5}, "sets sharp_rho, sharp_start, but"),
        ("sam", {"sharp_roh": 0.2}, "sets sharp_roh, and no method has an option roh. Did you mean 'sharp_rho'"),
        ("sam", {"sharp_keep": 0.2}, "'sam' has no option keep"),
        ("sam", {"sharp_rho": -0.2}, "rho is a radius"),
        ("sam", {"sharp_method": "sma"}, "no method 'sma'"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_way_out(method, values, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        search([values], tmp_path, monkeypatch, method=method)


@pytest.mark.parametrize("name", METHODS)
def test_every_keyword_of_every_preset_can_be_searched(name):
    """The values are those that `SharpConfig` takes, so it is enough that each one arrives there."""
    known = {field.name for field in fields(SharpConfig)}
    for option in options_of(name):
        assert option in known
        own, rest = divide({f"sharp_{option}": 0.5, "learning_rate": 0.1})
        assert own == {option: 0.5} and rest == {"learning_rate": 0.1}
    assert searched((None, None), {"method": name})[0] == METHODS[name]()


@pytest.mark.parametrize("listed", [False, True], ids=["asked for", "listed"])
def test_a_method_made_by_a_preset_is_searched_from_its_own_settings(listed, tmp_path, monkeypatch):
    values = [{"sharp_rho": 0.3}, {"sharp_interval": 2}, {"sharp_method": "asam"}, {}]
    given = sam(Linear(0.2, 0.1), start=0.2)
    kept, _ = search(values, tmp_path, monkeypatch, listed, method=given)
    alone = [sam(Linear(0.3, 0.1), start=0.2), sam(Linear(0.2, 0.1), start=0.2, interval=2), asam(), given]
    assert [method for _, method, _ in kept] == alone


MISSPELT = {"rho": "rho", "keep": "keep", "sharp.rho": "rho", "sharp-rho": "rho", "method.rho": "rho", "rhoo": "rho"}


@pytest.mark.parametrize("method", ["sam", None], ids=["sam", "no method"])
@pytest.mark.parametrize("name", MISSPELT)
def test_a_name_without_the_prefix_is_refused_with_the_right_spelling(name, method, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"sets '{name}'.*Did you mean 'sharp_{MISSPELT[name]}'"):
        search([{name: 0.1}], tmp_path, monkeypatch, method=method)


def test_a_misspelt_argument_of_the_trainer_is_refused_too(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"sets 'learning_rat'.*Did you mean 'learning_rate'"):
        search([{"learning_rat": 0.1}], tmp_path, monkeypatch, method="sam")


def test_a_name_that_the_model_may_read_is_left_to_the_trainer(tmp_path, monkeypatch):
    kept, _ = search([{"width": 8}], tmp_path, monkeypatch, method="sam", model_init=lambda trial: fresh())
    assert len(kept) == 1


def test_optuna_finds_the_radius(tmp_path):
    optuna = pytest.importorskip("optuna", exc_type=ImportError)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = mlp_rows(20)
    searching = build(SharpTrainer, None, rows, tmp_path, model_init=fresh, method="sam", eval_dataset=rows)
    best = searching.hyperparameter_search(
        lambda trial: {"sharp_rho": trial.suggest_float("sharp_rho", 0.01, 1.0, log=True)},
        n_trials=4,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    own = train(SharpTrainer, None, rows, tmp_path, model_init=fresh, method=sam(best.hyperparameters["sharp_rho"]))
    assert best.objective == own.evaluate(rows)["eval_loss"]
