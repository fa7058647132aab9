"""The domain shift recipe as a user runs it, at toy size: offline, from files, again after an interruption, wrong."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_sharp.recipes.report import KEY, REQUIRED
from hf_sharp.recipes.tasks import domains, word_tokenizer

RECIPE = Path(__file__).parents[1] / "recipes" / "domain_shift_tram.py"
TOY = ["--max_steps", "2", "--pretrain_steps", "1", "--max_eval_samples", "8", "--block_size", "16", "--use_cpu"]
TOY += ["--logging_steps", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
METHODS = ["plain", "sam", "asam", "tram_noise", "tram_previous"]
PLACES = ["in-domain", "out-of-domain"]


def main_of(monkeypatch, *arguments):
    """Run the recipe's main in this process."""
    spec = importlib.util.spec_from_file_location("domain_shift_tram_script", RECIPE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
    spec.loader.exec_module(module)
    module.main()


def rows_in(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def stdlib():
    """The embedded domains, read once for all tests, and a part of them."""
    return tuple(domains.Domain(d.name, d.train[::10], d.test[::10]) for d in domains.load_domains())


@pytest.fixture(scope="module")
def demo(tmp_path_factory, stdlib):
    """The documented command, at toy size."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domains, "load_domains", lambda: stdlib)
        main_of(patch, *TOY, "--output_dir", folder)
    return folder


def test_demo_writes_two_rows_a_run_and_a_plot(demo):
    rows = rows_in(demo)
    assert [(row["method"], row["place"]) for row in rows] == [(m, p) for m in ["before", *METHODS] for p in PLACES]
    assert len({tuple(row[key] for key in KEY if key in row) for row in rows}) == len(rows)
    for row in rows:
        assert set(REQUIRED) <= set(row) and row["majority"] is None
        assert row["task"] == f"lm {row['place']}" and row["metric"] == f"perplexity {row['place']}"
        assert 1 < row["value"] < 2000 and row["value"] == pytest.approx(torch.tensor(row["loss"]).exp().item())
    passes = {row["method"]: row["passes"] for row in rows}
    assert passes == pytest.approx(
        {"before": 0, "plain": 1, "sam": 2, "asam": 2, "tram_noise": 7 / 3, "tram_previous": 7 / 3}
    )
    radius = {row["method"]: row["radius"] for row in rows}
    assert (radius["plain"], radius["sam"], radius["asam"]) == (None, 0.05, 0.5)
    assert radius["tram_noise"] > radius["tram_previous"] > 0  # of two steps the first one has no previous weights
    assert {row["steps"] for row in rows} == {0, 2} and rows[0]["seconds_per_step"] is None
    assert (demo / "results.png").read_bytes().startswith(b"\x89PNG")


def test_running_again_skips_resumes_and_prints_one_table(demo, stdlib, monkeypatch, capsys):
    monkeypatch.setattr(domains, "load_domains", lambda: stdlib)
    rows = rows_in(demo)
    (demo / "results.json").write_text(json.dumps(rows[:-2]))  # as if cut off before the last run was written
    start = (demo / "start" / "model.safetensors").stat().st_mtime_ns
    main_of(monkeypatch, *TOY, "--output_dir", demo)
    printed = capsys.readouterr().out
    assert printed.count("finished before, kept") == 5 and printed.count("resuming from") == 1
    assert (demo / "start" / "model.safetensors").stat().st_mtime_ns == start  # the same theta_0
    again = rows_in(demo)
    assert again[:-2] == rows[:-2]
    assert [row["value"] for row in again[-2:]] == [row["value"] for row in rows[-2:]]
    table = printed[printed.index("method  seeds") :].splitlines()
    heads = table[0].split("  ")
    assert [head.strip() for head in heads if head.strip()] == [
        "method", "seeds", *PLACES, *(f"{place} - plain" for place in PLACES), "ms/step", "ratio", "radius"
    ]  # fmt: skip
    assert [line.split()[0] for line in table[2:8]] == ["before", *METHODS]
    assert "Less is better" in table[8] and table[9].endswith("more than the interval: no method.")


def test_results_of_other_settings_are_refused(demo, stdlib, monkeypatch):
    before = (demo / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=r"other settings \(sigma: 0.1 there, 0.2 now\)"):
        main_of(monkeypatch, *TOY, "--sigma", "0.2", "--output_dir", demo)
    assert (demo / "results.json").read_bytes() == before


def test_files_of_running_text_and_intervals_over_seeds(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("".join(f"to be or not to be, {index}\n" for index in range(300)))
    (tmp_path / "out").mkdir()
    rows = [json.dumps({"words": f"def function_{index}(): pass"}) for index in range(300)]
    (tmp_path / "out" / "a.jsonl").write_text("\n".join(rows))
    command = [*TOY, "--train_file", tmp_path / "in.txt", "--ood_file", tmp_path / "out", "--text_column", "words"]
    command += ["--methods", "plain", "tram_pretrained", "--seeds", 2, "--output_dir", tmp_path / "results"]
    main_of(monkeypatch, *command)
    found = rows_in(tmp_path / "results")
    assert [(row["method"], row["seed"]) for row in found[::2]] == [
        ("before", 42), ("plain", 42), ("tram_pretrained", 42), ("plain", 43), ("tram_pretrained", 43)
    ]  # fmt: skip
    assert len({row["value"] for row in found}) == len(found)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.split()[:2] == ["tram_pretrained", "2"])
    assert line.count("+/-") == 2


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Two tables with classes, and an encoder to fine-tune."""
    folder = tmp_path_factory.mktemp("reviews")
    for name, words in {"in": ("good film", "bad film"), "out": ("fine food", "poor food")}.items():
        rows = [f"{words[index % 3 > 0]} number {index},{('up', 'down')[index % 3 > 0]}" for index in range(60)]
        (folder / f"{name}.csv").write_text("\n".join(["review,stars", *rows]))
    tokenizer = word_tokenizer(["good bad film number fine poor food"] * 2, max_length=32)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


CLASSES = ["--task", "classification", "--text_column", "review", "--label_column", "stars"]


def test_classification_with_a_model_of_ones_own(reviews, tmp_path, monkeypatch, capsys):
    command = [*TOY, *CLASSES, "--train_file", reviews / "in.csv", "--ood_file", reviews / "out.csv"]
    command += ["--model_name_or_path", reviews / "model", "--max_eval_samples", 1000, "--output_dir", tmp_path]
    main_of(monkeypatch, *command, "--methods", "plain", "tram_noise")
    rows = rows_in(tmp_path)
    assert [(row["method"], row["place"]) for row in rows] == [(m, p) for m in ("plain", "tram_noise") for p in PLACES]
    assert all(row["task"] == f"classification {row['place']}" for row in rows)
    assert all(0 <= row["value"] <= 1 and row["metric"] == f"accuracy {row['place']}" for row in rows)
    assert rows[1]["majority"] == pytest.approx(2 / 3)  # all rows of the other domain are there to test on
    assert not (tmp_path / "start").exists()
    assert "More is better" in capsys.readouterr().out


FILE, REVIEW = ["--train_file", "{in}"], ["--text_column", "review"]
WRONG = {
    "unknown task": (["--task", "translation"], "--task is lm or classification; got translation."),
    "unknown method": (["--methods", "plain", "fsam"], "no method 'fsam'. Known: plain, sam, asam, tram_noise"),
    "negative radius": (["--sam_rho", "-1"], "rho"),
    "negative noise": (["--sigma", "-1"], "sigma"),
    "no seeds": (["--seeds", "0"], "--seeds is at least 1; got 0."),
    "one domain": (FILE, "Give --train_file or --dataset_name, and --ood_file or --ood_dataset_name; or none"),
    "two training domains": ([*FILE, "--dataset_name", "plays", "--ood_file", "{in}"], "Give --train_file or"),
    "no file": ([*FILE, *REVIEW, "--ood_file", "nowhere.txt"], "There is no file or folder nowhere.txt."),
    "empty file": ([*FILE, *REVIEW, "--ood_file", "{empty}"], "empty.txt holds no text."),
    "no column": ([*FILE, "--ood_file", "{in}"], "row 1 has no column 'text'; there are review, stars."),
    "no class": (
        [*FILE, *REVIEW, "--ood_file", "{in}", "--task", "classification"],
        "row 1 has no column 'label'; there are review, stars.",
    ),
    "too little": (
        [*FILE, *REVIEW, "--ood_file", "{in}", "--block_size", "100000"],
        "in has too little text to train on for one example of 100000 tokens.",
    ),
    "other classes": (
        [*CLASSES, *FILE, "--ood_file", "{in}", "--validation_file", "{other}"],
        "in has a class 'sideways'",
    ),
    "no model": (
        [*FILE, *REVIEW, "--ood_file", "{in}", "--model_name_or_path", "nowhere"],
        "couldn't connect",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_refused_before_training(case, reviews, monkeypatch, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.csv").write_text("review,stars\nfilm,sideways\n")
    files = {"in": reviews / "in.csv", "empty": tmp_path / "empty.txt", "other": tmp_path / "other.csv"}
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as refusal:
        main_of(
            monkeypatch, *(each.format(**files) for each in arguments), "--use_cpu", "--output_dir", tmp_path / "o"
        )
    assert str(refusal.value).startswith("domain_shift_tram.py: ") and message in str(refusal.value)
    assert not (tmp_path / "o").exists()
