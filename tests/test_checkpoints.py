"""A save that was cut off anywhere is passed over, and training goes on from the one before as if nothing had been."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from hf_sharp import SharpTrainer, fsam, last_complete_checkpoint
from models import mean_bert, text_rows
from training import build, weights

ORDER = ["config.json", "model.safetensors", "training_args.bin", "sharp_config.json", "optimizer.pt", "scheduler.pt"]
ORDER += ["sharp_state.safetensors", "rng_state.pth", "trainer_state.json"]


def trainer_in(folder):
    settings = {"max_steps": 6, "save_steps": 2, "save_strategy": "steps", "train_sampling_strategy": "random"}
    return build(SharpTrainer, mean_bert(), text_rows(24), folder, method=fsam(0.1, every=3), **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.use_deterministic_algorithms(True)
    trainer = trainer_in(folder)
    trainer.train()
    return folder, weights(trainer)


def cut_off(whole, folder, last, share):
    """The folder as a kill leaves it: `last` of checkpoint-4 is written up to a share, and what comes after it not."""
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    (folder / "checkpoint-4").mkdir()
    for name in ORDER[: ORDER.index(last)]:
        shutil.copy(whole / "checkpoint-4" / name, folder / "checkpoint-4")
    data = (whole / "checkpoint-4" / last).read_bytes()
    (folder / "checkpoint-4" / last).write_bytes(data[: int(share * len(data))])


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("last", ORDER)
def test_a_save_that_was_cut_off_is_passed_over(last, share, whole, tmp_path):
    cut_off(whole[0], tmp_path, last, share)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_training_goes_on_over_the_half_written_directory_bitwise(whole, tmp_path):
    cut_off(whole[0], tmp_path, "trainer_state.json", 0.5)
    with pytest.raises(ValueError):  # the reason for all this: Transformers takes the half-written one
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    trainer = trainer_in(tmp_path)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path))
    assert torch.equal(weights(trainer), whole[1])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert last_complete_checkpoint(os.fspath(whole[0])) == str(whole[0] / "checkpoint-6")


def test_everything_else_is_whole_before_the_trainers_state_is_written(tmp_path, monkeypatch):
    """What the function stands on: a promise of the Trainer's order, which a new version might change."""
    seen, write = {}, TrainerState.save_to_json

    def look(state, path):
        seen.update({file: file.read_bytes() for file in Path(path).parent.iterdir()})
        write(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", look)
    trainer_in(tmp_path).train()
    written = {file: file.read_bytes() for file in tmp_path.glob("checkpoint-*/*") if file.name != ORDER[-1]}
    assert seen == written and {file.name for file in seen} == set(ORDER[:-1])


def test_another_ranks_random_state_is_looked_at(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    state = tmp_path / "checkpoint-6" / "rng_state.pth"
    data = state.read_bytes()
    state.unlink()
    (state.parent / "rng_state_0.pth").write_bytes(data)
    (state.parent / "rng_state_1.pth").write_bytes(data)
    assert last_complete_checkpoint(tmp_path) == str(state.parent)
    (state.parent / "rng_state_1.pth").write_bytes(data[:1000])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_the_methods_state_does_not_change_with_the_file_it_came_from(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    trainer = trainer_in(tmp_path)
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # nothing is left to train
    before = {key: torch.as_tensor(value).clone() for key, value in trainer.method.state_dict().items()}
    file = tmp_path / "checkpoint-4" / "sharp_state.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(b"\1" * size)
    after = trainer.method.state_dict()
    assert len(before) > 1 and all(torch.equal(torch.as_tensor(after[key]), value) for key, value in before.items())


def test_numbers_count_and_other_names_do_not(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "other-11", "checkpoint-12-copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-13").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    for nothing in (tmp_path / "nothing", Path(os.devnull)):
        assert last_complete_checkpoint(nothing) is None


def test_the_record_is_written_where_the_trainer_leaves_the_weights_to_later(tmp_path, monkeypatch):
    """FSDP2 with SHARDED_STATE_DICT: `save_model` of the Trainer writes nothing; shards come with the optimizer."""
    trainer = trainer_in(tmp_path)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    plugin = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    trainer.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    assert os.listdir(tmp_path / "checkpoint-1") == ["sharp_config.json"]
    assert json.loads((tmp_path / "checkpoint-1" / "sharp_config.json").read_text())["repr"] == repr(trainer.method)
