"""Checkpoints of an earlier release go on as that release would have gone on.

`tests/data/checkpoints-*` hold what the release wrote in the middle of a training, the weights that its uninterrupted
training ended with, and the script that made both (`make.py`).

The last bits of a sum differ between processors, so equality bit for bit is asked for only where plain training, which
needs nothing of this library, ends with the stored bits too.
"""

import importlib.util
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
FOLDER = Path(__file__).parent / "data" / "checkpoints-0.1.0.dev0"
METHODS = ("fsam", "friendly_sam", "looksam", "mesa", "bi_lora")
# float64 with weights of about 1: nine steps add up a few hundred roundings of 1e-16.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def made():
    """The script that made the checkpoints, as a module."""
    spec = importlib.util.spec_from_file_location("made", FOLDER / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def same_arithmetic(made, tmp_path_factory):
    """Whether this machine computes with the bits of the one that made the checkpoints."""
    torch.use_deterministic_algorithms(True)
    plain = made.make_trainer(None, str(tmp_path_factory.mktemp("plain")))
    plain.train()
    written = json.loads((FOLDER / "made.json").read_text(encoding="utf-8"))
    return made.machine().items() <= written.items() and largest_difference(plain, made, "plain") == 0


def largest_difference(trainer, made, name):
    """Between the weights of a trainer and those stored under a name; the names of the weights must agree."""
    stored, now = load_file(FOLDER / name / "final.safetensors"), made.weights_of(trainer)
    assert stored.keys() == now.keys()
    return max((stored[key] - now[key]).abs().max().item() for key in stored)


def resume(made, name, checkpoint, folder):
    trainer = made.make_trainer(name, str(folder))
    # FSAM's mask tells embeddings by module since then, which is said; here both rules give the same mask.
    said = pytest.warns(UserWarning, match="embeddings='modules'") if name == "fsam" else nullcontext()
    with said:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == made.LAST
    return trainer


def test_every_method_has_its_files(made):
    assert set(made.METHODS) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_an_old_checkpoint_ends_where_the_old_release_ended(name, made, tmp_path):
    trainer = resume(made, name, FOLDER / name / "checkpoint", tmp_path)
    assert largest_difference(trainer, made, name) < TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_bit_for_bit_on_a_processor_that_rounds_alike(name, made, same_arithmetic, tmp_path):
    if not same_arithmetic:
        pytest.skip("plain training ends with other last bits here than where the checkpoints were made")
    trainer = resume(made, name, FOLDER / name / "checkpoint", tmp_path)
    assert largest_difference(trainer, made, name) == 0


@pytest.mark.parametrize("name", METHODS)
def test_the_training_of_today_ends_there_too(name, made, tmp_path):
    """Or the test above would compare with another training than the one that a user goes on with."""
    trainer = made.make_trainer(name, str(tmp_path))
    trainer.train()
    assert largest_difference(trainer, made, name) < TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_what_the_method_remembers_is_needed_for_that(name, made, tmp_path):
    """With other numbers in the method's file training ends elsewhere: so the file is read, and it matters."""
    checkpoint = shutil.copytree(FOLDER / name / "checkpoint", tmp_path / "checkpoint")
    file = checkpoint / "sharp_state.safetensors"
    with safe_open(file, "pt") as opened:
        state, numbers = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    spoilt = {key: ~each if each.dtype == torch.bool else each * 1.5 for key, each in state.items()}
    save_file(spoilt, file, numbers)
    assert largest_difference(resume(made, name, checkpoint, tmp_path / "out"), made, name) > 1e-6
