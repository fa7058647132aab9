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
from hf_sharp._presets.config import read_method, settings_of
from hf_sharp._presets.fields import SCHEDULE_OPTIONS
from hf_sharp._presets.names import METHODS, options_of
from hf_sharp._presets.texts import options_told

pytestmark = pytest.mark.fast


def test_the_configs_fields_are_the_presets_keywords():
    keywords = {key for preset in METHODS.values() for key in inspect.signature(preset).parameters}
    assert {f.name for f in fields(SharpConfig)} == {"method", *keywords, *SCHEDULE_OPTIONS}
    assert all(f.metadata.get("help") for f in fields(SharpConfig))


SHARED = ("interval", "start", "fraction", "per_rank")


@pytest.mark.parametrize("name", METHODS)
def test_a_docstring_says_every_option_and_shared_ones_in_the_same_words(name):
    told = options_told(METHODS[name])
    assert list(told) == list(inspect.signature(METHODS[name]).parameters) and all(told.values())
    for option in set(SHARED) & set(told):
        assert told[option].startswith(options_told(sam)[option].split(";")[0].rstrip(".")), option


@pytest.mark.parametrize("name", METHODS)
def test_a_class_and_its_preset_have_the_same_defaults(name):
    method, given = METHODS[name](), inspect.signature(METHODS[name]).parameters
    for setting in fields(method):
        if setting.name in given and setting.name != "rho" and name not in ("tram", "flat_lora"):
            assert setting.default == given[setting.name].default, setting.name


def test_the_help_says_each_methods_default():
    helps = {f.name: f.metadata["help"] for f in fields(SharpConfig)}
    assert "fsam (100): how many steps a mask is used" in helps["every"] and "looksam (5)" in helps["every"]
    assert helps["rho"].startswith("The radius (0.05 by default, asam 0.5")
    assert "fsam (0.1): the share" in HfArgumentParser(SharpConfig).format_help().replace("\n" + " " * 24, " ")


def test_options_in_python_are_checked_as_on_the_command_line():
    for wrong, message in (
        (lambda: sam(rho="0.1"), "rho is a number; got '0.1'"),
        (lambda: fsam(renormalise="False"), "renormalise is true or false; got 'False'"),
        (lambda: sam(rho=Linear), "rho is a number; got <class"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(TypeError, match=r"sam\(\) got an unexpected keyword argument 'rhoo'"):
        sam(rhoo=0.1)


def test_what_is_not_set_is_not_shown():
    assert repr(SharpConfig(method="fsam", rho=0.1)) == "SharpConfig(method='fsam', rho=0.1)"


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
        ({"name": "sam"}, "option name"),
        ("SAM", "no method 'SAM'. Did you mean 'sam'"),
        ("gsam(rho=0.1)", r"no method 'gsam\(rho=0.1\)'. Did you mean 'gsam'"),
        ({"methd": "sam"}, "option methd. Did you mean 'method'"),
        (yaml.safe_load("rho: 1e-2"), "rho is a number; got '1e-2'. That is text: .* YAML takes 1e-2 for text"),
        (yaml.safe_load("rho: 1e-2\nrho_schedule: linear"), "rho is a number; got '1e-2'. That is text"),
        ({"rho": 0.1, "rho_schedule": 3}, "rho_schedule is a text; got 3"),
        ({"rho": True}, "rho is a number; got True"),
        ({"rho": [0.1]}, r"rho is a number; got \[0.1\]"),
        ({"interval": 2.0}, "interval is a whole number; got 2.0"),
        ({"interval": "2"}, "interval is a whole number; got '2'. That is text: leave out the quotation marks"),
        ({"start": {"share": 0.5}}, "start is a number; got {'share'"),
        ({"method": "fsam", "renormalise": "yes"}, "renormalise is true or false; got 'yes'"),
        ({"method": "fsam", "renormalise": 1}, "renormalise is true or false; got 1"),
        ({"method": "fsam", "scope": 3}, "scope is a text; got 3"),
        ({"method": "gsam", "rho_min": "0"}, "rho_min is a number or None; got '0'"),
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
    assert read_method(sam_on(0.3))[1] == SharpConfig.from_dict(settings_of(sam_on(0.3)))
    with pytest.raises(ValueError, match="method is a Method"):
        read_method(0.05)
    for called in (sam, SAM):
        with pytest.raises(ValueError, match=r"when it is called: sam\(\)"):
            read_method(called)
    with pytest.raises(ValueError, match="no method"):
        options_of("nothing")
