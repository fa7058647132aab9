"""The unlearning recipe as a user runs it, at toy size: offline, from files, with adapters, again, wrong."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest

from hf_sharp.recipes.report import KEY, REQUIRED
from hf_sharp.recipes.tasks.fictions import made_up_facts

RECIPE = Path(__file__).parents[1] / "recipes" / "llm_unlearn_smooth.py"
TOY = ["--max_steps", "2", "--teach_epochs", "1", "--relearn_steps", "2", "--relearn_samples", "4", "--use_cpu"]
TOY += ["--forget_people", "2", "--retain_people", "3", "--max_length", "64", "--per_device_train_batch_size", "4"]


def main_of(monkeypatch, *arguments):
    """Run the recipe's main in this process."""
    spec = importlib.util.spec_from_file_location("llm_unlearn_smooth_script", RECIPE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
    spec.loader.exec_module(module)
    module.main()


def rows_in(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The documented command, at toy size."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        main_of(patch, *TOY, "--output_dir", folder)
    return folder


def test_demo_attacks_every_model_and_draws_the_curves(demo):
    rows = rows_in(demo)
    assert [row["method"] for row in rows] == ["before", "never knew", "none", "none, 1.5 x steps", "sam"]
    assert [row["steps"] for row in rows] == [0, 0, 2, 3, 2]
    assert [row["passes"] for row in rows] == [0, 0, 2, 2, 3]
    assert len({tuple(row[key] for key in KEY if key in row) for row in rows}) == len(rows)
    for row in rows:
        assert set(REQUIRED) <= set(row) and "NPO" in row["task"] and "retain_weight=20.0" in row["task"]
        assert [record["step"] for record in row["curve"]] == [0, 1, 2]
        places = [key for key in row["curve"][0] if key.endswith("_probability")]
        assert places == ["relearned_probability", "same person_probability", "untouched_probability"]
        assert all(0 < row[name]["probability"] < 1 for name in ("forget", "retain"))
    assert rows[1]["retain"] != rows[0]["retain"]  # another model
    assert len({row["forget"]["nll"] for row in rows}) == 5
    assert (demo / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("package, name", [("rouge_score", "rouge-score"), ("matplotlib", "matplotlib")])
def test_a_package_that_is_used_after_training_is_missed_before(package, name, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda sought, *rest: None if sought == package else find(sought))
    with pytest.raises(SystemExit, match=f"needs {name}, which is not installed: pip install {name}"):
        main_of(monkeypatch, *TOY, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_running_again_skips_what_is_there(demo, monkeypatch, capsys):
    rows = rows_in(demo)
    (demo / "results.json").write_text(json.dumps(rows[:-1]))  # as if cut off before the last run was written
    main_of(monkeypatch, *TOY, "--output_dir", demo)
    printed = capsys.readouterr().out
    assert printed.count("finished before, kept") == 4
    again = rows_in(demo)
    assert again[:-1] == rows[:-1] and again[-1]["curve"] == rows[-1]["curve"]
    lines = printed[printed.index("smoothing  ") :].splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["before", "never", "none", "none,", "sam"]
    before = (demo / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=r"other settings \(rho: 0.1 there, 0.2 now\)"):
        main_of(monkeypatch, *TOY, "--rho", "0.2", "--output_dir", demo)
    assert (demo / "results.json").read_bytes() == before


def test_files_a_model_of_ones_own_and_adapters(demo, tmp_path, monkeypatch, capsys):
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
    rows = made_up_facts(people=6)
    rows = [row for place in range(0, 60, 20) for row in rows[place : place + 20]]
    (tmp_path / "forget50.json").write_text("\n".join(map(json.dumps, rows[:40])))
    (tmp_path / "retain50.json").write_text("\n".join(map(json.dumps, rows[40:])))
    command = ["--data_dir", tmp_path, "--split", "forget50", "--model_name_or_path", demo / "knows", "--use_cpu"]
    command += ["--max_steps", 5, "--relearn_steps", 1, "--relearn_samples", 20, "--per_device_train_batch_size", 4]
    command += ["--lora", "--lora_r", 2, "--objective", "simnpo", "--seeds", 2, "--max_length", 64]
    command += ["--smoothing", "rs", "wa", "--output_dir", tmp_path / "out"]
    main_of(monkeypatch, *command)
    found = rows_in(tmp_path / "out")
    labels = ["none", "none, 2 x steps", "rs", "wa"]
    assert [(row["method"], row["seed"]) for row in found] == [("before", 42)] + [
        (label, seed) for seed in (42, 43) for label in labels
    ]
    assert found[0]["model"] == str(demo / "knows") and "SimNPO" in found[0]["task"]
    assert {row["steps"] for row in found} == {0, 5, 10}
    places = [key for key in found[0]["curve"][0] if key.endswith("_probability")]
    assert places == ["relearned_probability", "untouched_probability"]
    printed = capsys.readouterr().out
    assert "It never knew: probability" in printed and printed.count(" +/- ") == 3
    assert not (tmp_path / "out" / "knows").exists()


OTHERS = {
    "idk": (["--smoothing", "asam"], "none, 1.5 x steps", "asam"),
    "gradient_difference": (["--smoothing", "gp"], "none, 1.5 x steps", "gp"),
    "rmu": (["--smoothing", "tram", "--layer", "1"], "none, 1.66667 x steps", "tram"),
    "npo": (["--smoothing", "cr", "--beta", "1"], "none, 2.5 x steps", "cr"),
}


@pytest.mark.parametrize("objective", OTHERS)
def test_other_objectives_and_smoothings(objective, demo, tmp_path, monkeypatch):
    extra, control, label = OTHERS[objective]
    command = [*TOY, "--output_dir", tmp_path, "--objective", objective, *extra, "--teach_epochs", 0]
    main_of(monkeypatch, *command, "--model_name_or_path", demo / "knows")
    rows = rows_in(tmp_path)
    assert [row["method"] for row in rows] == ["before", "none", control, label]
    assert len({row["forget"]["nll"] for row in rows}) == 4


WRONG = {
    "unknown objective": (["--objective", "forget"], "gradient_ascent, gradient_difference, npo"),
    "unknown smoothing": (["--smoothing", "fog"], "There is no smoothing 'fog'. Known: sam, asam"),
    "negative radius": (["--rho", "-1"], "rho"),
    "no seeds": (["--seeds", "0"], "--seeds is at least 1; got 0."),
    "nothing taught": (["--teach_epochs", "0"], "--teach_epochs is at least 1; got 0."),
    "too few rows": (["--relearn_samples", "1000"], "1000 rows to relearn from cannot be had"),
    "too few people": (["--forget_people", "100"], "100 people of 10 rows each cannot be had"),
    "no folder": (["--data_dir", "nowhere"], "No such file"),
    "no room for an answer": (["--max_length", "12"], "nothing is left to be predicted"),
    "no model": (["--model_name_or_path", "nowhere"], "couldn't connect"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_refused_before_training(case, monkeypatch, tmp_path):
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as refusal:
        main_of(monkeypatch, *TOY, *arguments, "--output_dir", tmp_path / "o")
    assert str(refusal.value).startswith("llm_unlearn_smooth.py: ") and message in str(refusal.value)
    assert not (tmp_path / "o").exists()
