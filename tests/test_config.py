"""`SharpConfig`, presets and what `method=` takes."""

import inspect
import json
from dataclasses import fields

import pytest
import yaml
from transformers import HfArgumentParser

from hf_sharp import (
    SAM,
    Cosine,
    FollowsLearningRate,
    Linear,
    Perturbation,
    SharpConfig,
    ZeroDuringWarmup,
    fsam,
    sam,
    sam_on,
)
from hf_sharp._presets.config import METHODS, SCHEDULE_OPTIONS, options_of, read_method

pytestmark = pytest.mark.fast


def test_the_configs_fields_are_the_presets_keywords():
    keywords = {key for preset in METHODS.values() for key in inspect.signature(preset).parameters}
    assert {f.name for f in fields(SharpConfig)} == {"method", *keywords, *SCHEDULE_OPTIONS}
    assert all(f.metadata.get("help") for f in fields(SharpConfig))


@pytest.mark.parametrize("name", METHODS)
def test_a_bare_name_is_the_preset_with_its_defaults(name):
    assert SharpConfig(method=name).build() == METHODS[name]()


def test_the_command_line_yaml_and_json_agree(tmp_path):
    parser = HfArgumentParser(SharpConfig)
    line = ["--method", "fsam", "--rho", "0.01", "--keep", "0.2", "--every", "7", "--renormalise", "true"]
    (config,) = parser.parse_args_into_dataclasses(line)
    assert config.build() == fsam(0.01, keep=0.2, every=7, renormalise=True)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert parser.parse_yaml_file(tmp_path / "a.yaml")[0] == config
    (tmp_path / "a.json").write_text(json.dumps(config.to_dict()))
    assert SharpConfig.from_json_file(tmp_path / "a.json") == config


def test_schedules_have_names():
    schedules = {
        "constant": 0.2,
        "linear": Linear(0.2, 0.1),
        "cosine": Cosine(0.2, 0.1),
        "follows_lr": FollowsLearningRate(0.2, 0.1),
        "zero_during_warmup": ZeroDuringWarmup(0.2),
    }
    for name, schedule in schedules.items():
        end = None if name in ("constant", "zero_during_warmup") else 0.1
        config = SharpConfig(method="sam", rho=0.2, rho_schedule=name, rho_end=end)
        assert config.build() == SAM(Perturbation(schedule))
    assert SharpConfig(rho_schedule="linear").build() == SAM(Perturbation(Linear(0.05, 0.0)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "sma"}, "no method 'sma'. Did you mean 'sam'.? Known: asam, bar, bi"),
        ({"method": "sam", "keep": 0.1}, "'sam' has no option keep. It takes rho"),
        ({"method": "plain", "rho": 0.1}, "'plain' has no option rho. It takes no options"),
        ({"method": "asam", "every": 3, "ball": "l2"}, "no option every, ball. It takes rho, eta, on"),
        ({"method": "sam", "radius": 0.1}, "option radius.*'sam' takes rho"),
        ({"method": "sam", "fractoin": 0.1}, "option fractoin. Did you mean 'fraction'"),
        ({"method": "nothing like it"}, "no method 'nothing like it'. Known: asam"),
        ({"method": "sam", "rho": -1.0}, "rho is a radius"),
        ({"method": "sam", "rho": float("nan")}, "rho is a radius"),
        ({"method": "fsam", "keep": 0.0}, r"\(0, 1\]"),
        ({"method": "sam", "rho_schedule": "square"}, "rho_schedule is one of"),
        ({"method": "sam", "rho_end": 0.1}, "belongs to a rho_schedule"),
        ({"method": "sam", "rho_schedule": "constant", "rho_end": 0.1}, "has no end"),
        ({"method": ["sam"]}, "There is no method"),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message):
        read_method(settings)


def test_a_file_that_is_no_record_is_named(tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "sharp_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"sharp_config.json is not"):
            SharpConfig.from_json_file(tmp_path / "sharp_config.json")


def test_a_door_takes_a_method_in_every_form():
    forms = [sam_on(0.3), SharpConfig(method="sam_on", rho=0.3), {"method": "sam_on", "rho": 0.3}]
    assert all(read_method(form)[0] == sam_on(0.3) for form in forms)
    assert read_method("sam")[0] == sam() and read_method(None) == (None, None)
    with pytest.raises(ValueError, match="method is a Method"):
        read_method(0.05)
    for called in (sam, SAM):
        with pytest.raises(ValueError, match=r"when it is called: sam\(\)"):
            read_method(called)
    with pytest.raises(ValueError, match="no method"):
        options_of("nothing")
