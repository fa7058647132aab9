"""`make_sharp`: any Trainer class, its name, signature and pickle, and what it refuses."""

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer

import hf_sharp
from hf_sharp import SharpSeq2SeqTrainer, SharpTrainer, make_sharp, sam
from hf_sharp._integrations.any_trainer import TRL
from models import mlp_rows, tiny_mlp
from training import train, weights

ROOT = Path(__file__).parents[1]


class Own(Trainer):
    """A Trainer of one's own."""

    def __init__(self, model, args=None, *, colour="red", **kwargs):
        super().__init__(model, args, **kwargs)
        self.colour, self.steps, self.losses = colour, 0, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.steps += 1
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs["loss"] + 0.01 * outputs["logits"].square().mean()
        self.losses.append(loss.item())
        return (loss, outputs) if return_outputs else loss


SharpOwn = make_sharp(Own)


def test_the_ready_ones_are_themselves():
    assert make_sharp(Trainer) is SharpTrainer and make_sharp(Seq2SeqTrainer) is SharpSeq2SeqTrainer
    assert make_sharp(SharpTrainer) is SharpTrainer and make_sharp(SharpOwn) is SharpOwn is make_sharp(Own)


def test_the_class_says_what_it_is():
    assert repr(SharpOwn) == f"<class '{__name__}.SharpOwn'>" and issubclass(SharpOwn, Own)
    assert SharpOwn.__doc__.startswith("`Own` with the further arguments of `SharpMixin`.\n\nA Trainer of one's own.")
    shown = str(inspect.signature(SharpOwn))
    assert shown.startswith("(model, args=None, *, colour='red', method:") and shown.endswith("**kwargs)")


def test_a_subclass_with_other_arguments_shows_its_own():
    class Further(SharpOwn):
        def __init__(self, model, size):
            super().__init__(model)

    assert list(inspect.signature(Further).parameters) == ["model", "size"]


def test_a_class_that_can_be_found_is_pickled():
    assert pickle.loads(pickle.dumps(SharpOwn)) is SharpOwn


def test_what_the_class_overrides_is_called_in_every_pass_and_counts_once(tmp_path):
    settings = {"max_steps": 3}
    plain = train(Own, tiny_mlp(), mlp_rows(20), tmp_path, **settings)
    same = train(SharpOwn, tiny_mlp(), mlp_rows(20), tmp_path, method=sam(0.0), **settings)
    moved = train(SharpOwn, tiny_mlp(), mlp_rows(20), tmp_path, method=sam(0.2), **settings)
    assert torch.equal(weights(plain), weights(same)) and not torch.equal(weights(plain), weights(moved))
    assert plain.losses == same.losses and plain.steps == same.steps == moved.steps == 3
    assert moved.losses[0] == plain.losses[0] and moved.losses[1] != plain.losses[1] and moved.colour == "red"


@pytest.mark.parametrize("given", [3, "SFTTrainer", torch.nn.Linear, None])
def test_what_is_no_trainer_class_is_refused(given):
    with pytest.raises(TypeError, match=r"takes a subclass of transformers\.Trainer, the class itself; got"):
        make_sharp(given)


def test_trainers_that_generate_are_refused_with_the_reason_and_so_are_those_made_from_them():
    class GRPOTrainer(Trainer):
        pass

    class Better(GRPOTrainer):
        pass

    with pytest.raises(ValueError, match=r"GRPOTrainer generates its data between steps.*Train offline, with SFT"):
        make_sharp(Better)


def test_an_argument_of_the_same_name_is_refused():
    class Clash(Trainer):
        def __init__(self, model, method="mine"):
            super().__init__(model)

    with pytest.raises(ValueError, match="Clash has an argument method of its own"):
        make_sharp(Clash)


@pytest.mark.parametrize("name", TRL)
def test_trls_trainers_without_trl_say_how_to_get_it(name, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == "trl" else found(module))
    with pytest.raises(ImportError, match=rf"{name} needs TRL, which is not installed: pip install trl"):
        getattr(hf_sharp, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_sharp' has no attribute 'SharpNothing'"):
        _ = hf_sharp.SharpNothing


def test_importing_the_package_imports_no_trl():
    code = "import sys, hf_sharp; sys.exit(any(m.split('.')[0] == 'trl' for m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
        == 0
    )
