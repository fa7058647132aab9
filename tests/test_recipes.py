"""Recipes as a user runs them: the documented commands at toy size, again after an interruption, and wrong ones."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from hf_sharp.recipes.report import KEY, REQUIRED
from hf_sharp.recipes.tasks import word_tokenizer

ROOT = Path(__file__).parents[1]
GLUE_FSAM = ROOT / "recipes" / "glue_fsam.py"
TOY = ["--max_steps", "2", "--max_train_samples", "32", "--max_eval_samples", "32", "--use_cpu"]
SENTENCES = ["a cat sat on the mat", "the dog sat on a cat", "a bird flew over the mat", "the cat saw a bird"]


def launch(*command, fails=False):
    """Run a command as a user would, with one thread a process, and return all that it printed."""
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, text=True, capture_output=True, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stdout[-5000:] + done.stderr[-15000:]
    return done.stdout + done.stderr


def rows_in(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The first documented command, at toy size: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    script = ["-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", GLUE_FSAM]
    return folder, launch(*script, *TOY, "--output_dir", folder)


def test_demo_writes_rows_table_and_plot(demo):
    folder, printed = demo
    rows = rows_in(folder)
    assert [(r["method"], r["label_noise"], r["passes"]) for r in rows] == [
        ("plain", 0.0, 1), ("fsam", 0.0, 2), ("plain", 0.4, 1), ("fsam", 0.4, 2)
    ]  # fmt: skip
    for each in rows:
        assert set(REQUIRED) | set(KEY) <= set(each)
        assert 0 <= each["value"] <= 1 and 0 < each["majority"] < 1
        assert each["seconds_per_step"] > 0 and each["steps"] == 2 and each["loss"] > 0
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert printed.count("minus plain") == 2 and printed.count("with one seed there is no interval") == 2
    assert "[4/4] docstrings, 40% noisy training labels: fsam, seed 42" in printed
    assert "2/2" in printed  # a progress bar


def test_running_again_skips_what_is_finished_and_resumes_what_is_not(demo):
    folder, _ = demo
    rows = rows_in(folder)
    (folder / "results.json").write_text(json.dumps(rows[:3]))  # as if the last run had been cut off before its row
    (folder / "runs" / "fsam_noise0.4_seed42" / "checkpoint-9").mkdir()  # cut off while saving: must not be taken
    printed = launch(GLUE_FSAM, *TOY, "--output_dir", folder)
    assert printed.count("finished before, kept as it is") == 3
    assert printed.count("resuming from") == 1 and "checkpoint-2\n" in printed
    again = rows_in(folder)
    assert again[:3] == rows[:3]
    assert {**again[3], "metrics": None} == {**rows[3], "metrics": None, "seconds_per_step": None}


def test_results_of_other_settings_are_refused(demo, monkeypatch):
    folder, _ = demo
    before = (folder / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=r"other settings \(learning_rate: 0.0005 there, 0.001 now\)"):
        main_of(monkeypatch, *TOY, "--learning_rate", "1e-3", "--output_dir", folder)
    with pytest.raises(SystemExit, match=r"method fsam: .*Use another --output_dir"):
        main_of(monkeypatch, *TOY, "--rho", "0.2", "--output_dir", folder)
    assert (folder / "results.json").read_bytes() == before


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """A folder with STS-B in the official layout and a model to fine-tune, both tiny."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "STS-B").mkdir()
    for split in ("train", "dev"):
        lines = [f"{a}\t{b}\t{i}.5" for i, a in enumerate(SENTENCES) for b in SENTENCES]
        (folder / "STS-B" / f"{split}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n")
    tokenizer = word_tokenizer(SENTENCES, max_length=32)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.mark.distributed
def test_glue_from_a_folder_on_two_processes(glue, tmp_path):
    settings = {"task_name": "stsb", "data_dir": str(glue), "model_name_or_path": str(glue / "model"), "seeds": 2}
    settings |= {"compare": ["plain", "plain_2x", "asam"], "method": "sam", "rho": 0.02, "learning_rate": "1e-3"}
    settings |= {"output_dir": str(tmp_path / "out"), "max_seq_length": 16, "per_device_train_batch_size": 2}
    (tmp_path / "stsb.yaml").write_text(json.dumps(settings))  # JSON is YAML
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--use_cpu", "--max_steps", "2", "--seeds", "1", "--max_eval_samples", "13", "--eval_strategy", "epoch"]
    printed = launch(*torchrun, GLUE_FSAM, "--config", tmp_path / "stsb.yaml", *options)
    rows = rows_in(tmp_path / "out")
    assert [(r["method"], r["steps"], r["epochs"]) for r in rows] == [
        ("plain", 2, 3), ("plain_2x", 4, 6), ("asam", 2, 3), ("sam", 2, 3)
    ]  # fmt: skip
    assert {(r["metric"], r["majority"], r["task"]) for r in rows} == {("pearson", None, "stsb")}
    assert set(rows[0]["metrics"]["validation"]) >= {"validation_spearman", "validation_pearson_spearman"}
    assert printed.count("[2/4] stsb: plain_2x, seed 42") == 1  # only one process speaks and writes
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert kept["learning_rate"] == 1e-3 and kept["processes"] == 2
    assert kept["method asam"] == {"method": "asam", "rho": 0.02} and kept["method plain_2x"] == {"method": "plain"}
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pkl")]
    assert files == ["training_args.bin"] * len(files)  # the Trainer's own; no pickle of ours


def main_of(monkeypatch, *arguments):
    """Run a recipe's main in this process, for commands that fail before training."""
    spec = importlib.util.spec_from_file_location("glue_fsam_script", GLUE_FSAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(sys, "argv", [str(GLUE_FSAM), *map(str, arguments)])
    spec.loader.exec_module(module)
    module.main()


MODEL = ["--model_name_or_path", "model"]
WRONG = {
    "unknown method": (["--method", "sharp"], "no method 'sharp'. Known: asam, bar"),
    "unknown method to compare": (["--compare", "plain", "sharp_2x"], "no method 'sharp'"),
    "option of another method": (["--method", "sam", "--keep", "0.1"], "'sam' has no option keep. It takes rho"),
    "negative rho": (["--rho", "-1"], "rho"),
    "keep is no share": (["--keep", "0"], "keep"),
    "a task without a model": (["--task_name", "rte"], "needs --model_name_or_path"),
    "a model without a task": (MODEL, "--task_name is one of cola, mrpc"),
    "unknown task": (["--task_name", "rt", *MODEL], "wnli; got rt."),
    "no data": (["--task_name", "rte", "--data_dir", "nowhere", *MODEL], "No RTE data: neither nowhere"),
    "no seeds": (["--seeds", "0"], "--seeds is a number of seeds"),
    "noise is no share": (["--label_noise", "1.5"], "between 0 and 1"),
    "a method for adapters": (["--compare", "plain", "bi_lora"], "bi_lora: Bi-LoRA is for LoRA adapters"),
    "another for adapters": (["--method", "bar", "--compare", "plain"], "bar: BAR balances the two halves"),
    "a third for adapters": (
        ["--method", "flat_lora", "--compare", "plain"],
        "flat_lora: Flat-LoRA is for LoRA adapters",
    ),
    "an optimizer that the method cannot use": (["--method", "msam", "--optim", "adafactor"], "msam: The optimizer"),
    "noise in a score": (["--task_name", "stsb", "--label_noise", "0.1", *MODEL], "predicts a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_refused_before_training(case, monkeypatch, tmp_path):
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as refusal:
        main_of(monkeypatch, *arguments, "--use_cpu", "--output_dir", tmp_path / "out")
    assert str(refusal.value).startswith("glue_fsam.py: ") and message in str(refusal.value)
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_head_of_another_size_is_found_before_training_and_replaced_on_request(glue, monkeypatch, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(glue / "model")
    config = BertConfig.from_pretrained(glue / "model", num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    command = ["--task_name", "stsb", "--data_dir", glue, "--model_name_or_path", tmp_path / "three", *TOY]
    command += ["--method", "plain", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"its head does not fit. Add --ignore_mismatched_sizes"):
        main_of(monkeypatch, *command)
    assert not (tmp_path / "out" / "settings.json").exists()
    main_of(monkeypatch, *command, "--ignore_mismatched_sizes")
    assert [row["steps"] for row in rows_in(tmp_path / "out")] == [2]


def test_saf_gets_the_numbers_of_the_rows(monkeypatch, tmp_path):
    main_of(monkeypatch, *TOY, "--method", "saf", "--compare", "plain", "--label_noise", "0", "--output_dir", tmp_path)
    assert [(row["method"], row["steps"]) for row in rows_in(tmp_path)] == [("plain", 2), ("saf", 2)]


def test_a_package_that_is_used_after_training_is_missed_before(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", missing("scipy", importlib.util.find_spec))
    with pytest.raises(SystemExit, match="needs scipy, which is not installed: pip install scipy"):
        main_of(monkeypatch, *TOY, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "settings.json").exists()


def missing(package, find):
    """As `find`, for a machine without the package."""
    return lambda name, *rest: None if name == package else find(name, *rest)


def test_a_config_file_with_an_unknown_flag(monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rat: 1e-3\n")
    with pytest.raises(SystemExit, match=r"a.yaml sets learning_rat, which is no flag"):
        main_of(monkeypatch, "--config", tmp_path / "a.yaml")


def test_recipes_cannot_be_imported():
    with pytest.raises(ImportError, match="Recipes are not importable"):
        importlib.import_module("recipes.glue_fsam")


@pytest.mark.parametrize("path", sorted(GLUE_FSAM.parent.glob("[!_]*.py")), ids=lambda path: path.name)
def test_recipes_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 250
