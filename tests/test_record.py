"""What is written of a method is the same in every form it is given: for trackers, the model card, checkpoints."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import yaml
from transformers import HfArgumentParser, TrainerCallback

import hf_sharp
from hf_sharp import (
    SAM,
    FisherMask,
    Linear,
    Perturbation,
    Plain,
    SharpConfig,
    SharpTrainer,
    Sum,
    fsam,
    gsam,
    preset,
    sam,
)
from hf_sharp._integrations.record import PLAIN_VALUES, columns_of, differences, record_of
from hf_sharp._integrations.search import searched
from hf_sharp._presets.config import read_method, settings_of
from hf_sharp._presets.names import METHODS
from models import mlp_rows, text_rows, tiny_bert, tiny_mlp
from training import build, train
from unlearn_runs import build as build_unlearning
from unlearn_runs import tiny_gpt2

SAM_COLUMNS = {
    "sharp_method": "sam",
    "sharp_rho": 0.01,
    "sharp_fraction": 1.0,
    "sharp_interval": 1,
    "sharp_start": 0.0,
    "sharp_per_rank": False,
}
FORMS = {
    "a call": sam(rho=0.01),
    "a call by place": sam(0.01),
    "a dict": {"method": "sam", "rho": 0.01},
    "a config": SharpConfig(method="sam", rho=0.01),
    "YAML": yaml.safe_load("{method: sam, rho: 0.01}"),
    "a copy": copy.deepcopy(sam(0.01)),
    "from a pickle": pickle.loads(pickle.dumps(sam(0.01))),
}


class Tracker(TrainerCallback):
    """As integrations do: notes the arguments when training begins; and what others see at other times."""

    def __init__(self):
        self.told, self.later = {}, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.told = {name: value for name, value in args.to_dict().items() if name.startswith(("sharp", "unlearn"))}
        assert self.told.items() <= json.loads(args.to_json_string()).items()

    def on_step_end(self, args, state, control, **kwargs):
        self.later = {name: value for name, value in args.to_dict().items() if name.startswith("sharp")}
        pickle.dumps(args)


@pytest.mark.parametrize("form", FORMS)
def test_trackers_card_and_checkpoint_hold_the_same_columns_in_every_form(form, tmp_path):
    tracker = Tracker()
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "callbacks": [tracker]}
    trainer = train(SharpTrainer, tiny_bert(), text_rows(8), tmp_path, method=FORMS[form], **settings)
    assert tracker.told == SAM_COLUMNS and tracker.later == {}
    record = json.loads((tmp_path / "checkpoint-1" / "sharp_config.json").read_text())
    assert {f"sharp_{name}": value for name, value in record["settings"].items()} == SAM_COLUMNS
    assert record["hf_sharp"] == hf_sharp.__version__ and record["rounding"] == "stochastic"
    assert SharpConfig.from_json_file(tmp_path / "checkpoint-1" / "sharp_config.json").build() == sam(0.01)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert all(f"| {name} | {json.dumps(value)} |" in card for name, value in SAM_COLUMNS.items())


def test_a_bare_name_says_the_defaults():
    assert columns_of(read_method("sam")[0]) == {**SAM_COLUMNS, "sharp_rho": 0.05}


def test_the_list_of_callbacks_and_the_arguments_are_the_trainers(tmp_path):
    trainers = [build(SharpTrainer, tiny_mlp(), mlp_rows(8), tmp_path, method=method) for method in ("sam", None)]
    ours, plain = ([type(callback) for callback in each.callback_handler.callbacks] for each in trainers)
    assert ours == plain
    trainers[0].train()
    assert "on_train_begin" not in vars(trainers[0].callback_handler) and "to_dict" not in vars(trainers[0].args)


def test_trackers_are_told_anew_at_every_training_and_after_one_that_failed(tmp_path):
    class Failing(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            raise RuntimeError("the tracker is down")

    tracker, failing = Tracker(), Failing()
    trainer = build(SharpTrainer, tiny_mlp(), mlp_rows(8), tmp_path, method=sam(0.01), callbacks=[failing])
    with pytest.raises(RuntimeError, match="down"):
        trainer.train()
    assert "to_dict" not in vars(trainer.args)
    trainer.remove_callback(failing)
    trainer.add_callback(tracker)
    for _ in range(2):
        tracker.told = {}
        trainer.train()
        assert tracker.told == SAM_COLUMNS


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_remembers_its_call_and_can_be_made_again(name):
    method = METHODS[name]()
    settings = settings_of(method)
    assert settings is not None and settings["method"] == name
    assert json.loads(json.dumps(settings)) == settings
    assert SharpConfig.from_dict(settings).build() == method
    assert all(isinstance(value, PLAIN_VALUES) for value in columns_of(method).values())


def test_a_method_put_together_from_classes_says_its_parts():
    columns = columns_of(SAM(Perturbation(0.1, mask=FisherMask(keep=0.2))))
    assert columns["sharp_method"] == "SAM" and columns["sharp_perturbation.rho"] == 0.1
    assert columns["sharp_perturbation.mask"] == "FisherMask" and columns["sharp_perturbation.mask.keep"] == 0.2
    terms = columns_of(Sum(forget=sam(0.1), retain=Plain(), weights={"retain": 2.0}))
    assert terms["sharp_forget.method"] == "sam" and terms["sharp_forget.rho"] == 0.1
    assert terms["sharp_retain.method"] == "Plain" and terms["sharp_retain.weight"] == 2.0
    assert settings_of(SAM(Perturbation(0.1))) is None and columns_of(None) == {}


def test_the_call_is_no_part_of_equality_and_none_of_a_changed_method():
    assert sam(0.1) == SAM(Perturbation(0.1)) and hash(sam(0.1)) == hash(SAM(Perturbation(0.1)))
    assert settings_of(replace(sam(0.1), fraction=0.5)) is None


def test_schedules_are_said_by_name_where_they_have_one():
    settings = settings_of(sam(Linear(0.2, 0.1)))
    assert settings["rho"] == 0.2 and settings["rho_schedule"] == "linear" and settings["rho_end"] == 0.1
    for named in ("constant", "linear", "cosine", "follows_lr", "zero_during_warmup"):
        method = SharpConfig(method="gsam", rho=0.2, rho_schedule=named).build()
        assert SharpConfig.from_dict(settings_of(method)).build() == method
    unnamed = sam(lambda landscape: 0.1)
    assert record_of(unnamed, "nearest")["settings"] is None and "lambda" in columns_of(unnamed)["sharp_rho"]
    json.dumps(columns_of(gsam(Linear(0.2, 0.1, steps=3))))


def test_records_of_earlier_releases_are_read(tmp_path):
    old = {"repr": repr(fsam(every=3)), "settings": {"method": "fsam", "every": 3}, "rounding": "stochastic"}
    path = tmp_path / "sharp_config.json"
    path.write_text(json.dumps(old))
    assert SharpConfig.from_json_file(path) == SharpConfig(method="fsam", every=3)
    assert differences(old, fsam(every=3), "stochastic") == []
    assert differences({}, None, "stochastic") == []
    (said,) = differences(old, fsam(every=4), "stochastic")
    assert "every=3" in said and "every=4" in said
    del old["rounding"]
    assert differences(old, fsam(every=3), "nearest") == []


def test_a_method_of_a_users_own_is_known_by_name(tmp_path):
    @preset
    def every_other_sam(rho: float = 0.05, zeta: int = 2) -> hf_sharp.Method:
        """SAM at some steps.

        Args:
            rho: the radius.
            zeta: at every so many steps.
        """
        return hf_sharp.Every(zeta, SAM(Perturbation(rho)))

    config = SharpConfig.from_dict({"method": "every_other_sam", "zeta": 3})
    assert config.build() == every_other_sam(zeta=3) and config.build().interval == 3
    (parsed,) = HfArgumentParser(SharpConfig).parse_args_into_dataclasses(["--method=every_other_sam", "--zeta=3"])
    assert parsed == config and searched(("sam", None), {"method": "every_other_sam"})[0] == every_other_sam()
    tracker = Tracker()
    train(SharpTrainer, tiny_mlp(), mlp_rows(8), tmp_path, method="every_other_sam", callbacks=[tracker])
    assert tracker.told == {"sharp_method": "every_other_sam", "sharp_rho": 0.05, "sharp_zeta": 2}
    assert SharpConfig(rho=0.1) == SharpConfig.from_dict({"method": "sam", "rho": 0.1})


def test_a_name_or_an_option_that_is_taken_is_refused():
    def sam(rho: float = 0.05):
        return SAM(Perturbation(rho))

    with pytest.raises(ValueError, match="a method 'sam' already"):
        preset(sam)

    def other(keep: int = 3):
        return Plain()

    with pytest.raises(ValueError, match="option keep has different types: float in fsam, int in other"):
        preset(other)
    assert "other" not in METHODS and SharpConfig(method="fsam", keep=0.5).build() == fsam(keep=0.5)
    preset(also := _mine)
    assert preset(also)(0.1) == SAM(Perturbation(0.1))  # a notebook's cell run again


def _mine(rho: float = 0.05):
    return SAM(Perturbation(rho))


def no_default(rho: float):
    return SAM(Perturbation(rho))


def no_type(rho=0.05):
    return SAM(Perturbation(rho))


def a_list(layers: list | None = None):
    return Plain()


def many(*rho: float):
    return Plain()


@pytest.mark.parametrize("function", [no_default, no_type, a_list, many], ids=lambda function: function.__name__)
def test_what_no_command_line_can_give_is_refused(function):
    with pytest.raises(TypeError, match=f"{function.__name__} cannot be a preset: its parameter"):
        preset(function)


def test_a_preset_that_makes_no_method_is_told_so():
    @preset
    def nothing(rho: float = 0.05):
        return rho

    with pytest.raises(TypeError, match=r"nothing\(\) is a preset and returns a Method"):
        nothing()


def test_an_unlearning_says_its_smoothing_and_its_objective(tmp_path):
    tracker = Tracker()
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    given = {"objective": {"objective": "npo", "beta": 0.5}, "method": sam(0.01)}
    first = build_unlearning(tiny_gpt2(), tmp_path, **given, **settings)
    first.add_callback(tracker)
    first.train()
    objective = {"objective": "npo", "beta": 0.5, "retain": "nll", "retain_weight": 1.0}
    assert tracker.told == SAM_COLUMNS | {f"unlearn_{name}": value for name, value in objective.items()}
    record = json.loads((tmp_path / "checkpoint-1" / "sharp_config.json").read_text())
    assert record["settings"]["rho"] == 0.01 and record["objective"] == objective
    for other in ("gradient_difference", {"objective": "npo", "beta": 0.6}):
        late = build_unlearning(tiny_gpt2(), tmp_path, **given | {"objective": other}, **settings)
        with pytest.warns(UserWarning, match="trained with NPO.*beta=0.5.*goes on with"):
            late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
