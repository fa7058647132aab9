"""The encoder-decoder recipe as a user runs it, at toy size, and the pairs and scores it stands on."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import T5ForConditionalGeneration

from hf_sharp.recipes.report import KEY, REQUIRED
from hf_sharp.recipes.tasks import domains, pairs
from models import seeded

RECIPE = Path(__file__).parents[1] / "recipes" / "seq2seq_sam.py"
TOY = ["--max_steps", 4, "--max_eval_samples", 8, "--use_cpu", "--logging_steps", 1, "--disable_tqdm", "true"]
TOY += ["--per_device_train_batch_size", 4, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 3]


def main_of(monkeypatch, *arguments):
    """Run the recipe's main in this process."""
    spec = importlib.util.spec_from_file_location("seq2seq_sam_script", RECIPE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
    spec.loader.exec_module(module)
    module.main()


def rows_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_demo_writes_rows_table_and_plot_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    main_of(monkeypatch, *TOY, "--output_dir", tmp_path)
    rows = rows_in(tmp_path)
    assert [(row["method"], row["passes"]) for row in rows] == [("plain", 1), ("sam", 2)]
    for row in rows:
        assert set(REQUIRED) <= set(row) and {key for key in KEY if key != "label_noise"} <= set(row)
        assert 0 <= row["value"] <= row["metrics"]["test_f1"] <= 1 and row["steps"] == 4 and row["loss"] > 0
    assert rows[0]["gap"] is None and rows[1]["gap"] != 0
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "sam reaches" in capsys.readouterr().out
    (tmp_path / "results.json").write_text(json.dumps(rows[:1]))
    shutil.rmtree(tmp_path / "runs" / "sam_seed42" / "checkpoint-4")
    main_of(monkeypatch, *TOY, "--output_dir", tmp_path)
    again = rows_in(tmp_path)
    assert again[0] == rows[0] and again[1]["loss"] == rows[1]["loss"]
    with pytest.raises(SystemExit, match=r"other settings \(method sam: "):
        main_of(monkeypatch, *TOY, "--rho", "0.2", "--output_dir", tmp_path)


def test_pairs_and_a_model_of_ones_own(tmp_path, monkeypatch):
    rows = [{"long": f"the number {i} is written", "short": f"number {i}"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = domains.byte_tokenizer([row["long"] for row in rows], size=300, max_length=64)
    with seeded(0):
        T5ForConditionalGeneration(pairs.small_t5(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [*TOY, "--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "pairs.jsonl"]
    command += ["--source_column", "long", "--target_column", "short", "--source_prefix", "shorten: ", "--bf16"]
    command += ["--method", "asam", "--rho", "0.3", "--gradient_accumulation_steps", 2, "--generation_max_length", 6]
    main_of(monkeypatch, *command, "--output_dir", tmp_path / "out")
    found = rows_in(tmp_path / "out")
    assert [row["method"] for row in found] == ["plain", "asam"] and found[0]["loss"] != found[1]["loss"]
    assert found[0]["loss"] < 8  # a mean over tokens, not a sum over micro-batches


WRONG = {
    "unknown method": (["--method", "sharp"], "no method 'sharp'"),
    "option of another method": (["--method", "sam", "--keep", "0.1"], "'sam' has no option keep"),
    "no seeds": (["--seeds", "0"], "--seeds is a number of seeds, at least 1; got 0"),
    "pairs without a model": (["--train_file", "a.csv"], "--model_name_or_path goes with --train_file"),
    "no such file": (["--train_file", "a.csv", "--model_name_or_path", "m"], "There is no file or folder a.csv"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_refused_before_training(case, monkeypatch, tmp_path):
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as refusal:
        main_of(monkeypatch, *arguments, "--use_cpu", "--output_dir", tmp_path / "out")
    assert str(refusal.value).startswith("seq2seq_sam.py: ") and message in str(refusal.value)
    assert not (tmp_path / "out").exists()


# ---- pairs


@pytest.fixture(scope="module")
def tokenizer():
    return domains.byte_tokenizer(["to be or not to be"], size=280, max_length=64)


def test_pairs_are_cut_prefixed_ended_and_drawn_the_same(tokenizer):
    rows = [("to be", "or not"), ("be", "to be or not to be or not to be")]
    first, second = pairs.encode_pairs(rows, tokenizer, (20, 4), "not: ")
    end = tokenizer.eos_token_id
    assert tokenizer.decode(first["input_ids"]) == "not: to be" and first["attention_mask"] == [1] * len(
        first["input_ids"]
    )
    assert tokenizer.decode(first["labels"][:-1]) == "or not" and first["labels"][-1] == end == second["labels"][-1]
    assert len(second["labels"]) == 4 and all(len(row["input_ids"]) <= 20 for row in (first, second))
    many = [(str(i), str(i)) for i in range(50)]
    few = pairs.encode_pairs(many, tokenizer, (8, 8), limit=5)
    assert len(few) == 5 and few == pairs.encode_pairs(many, tokenizer, (8, 8), limit=5)
    assert few != pairs.encode_pairs(many[:5], tokenizer, (8, 8))


def test_scores_by_hand(tokenizer):
    """Exact: 1 of 3. F1: 1; 2 of "to be or" in "to be not to" shared (4 / 7); none."""
    end = tokenizer.eos_token_id

    def padded(texts, fill):
        ids = [[*tokenizer(text)["input_ids"], end] for text in texts]
        return torch.tensor([row + [fill] * (30 - len(row)) for row in ids]).numpy()

    written, wanted = padded(["or not", "to be or", "be"], end), padded(["or not", "to be not to", "or"], -100)
    scores = pairs.score_texts(SimpleNamespace(predictions=written, label_ids=wanted), tokenizer)
    assert scores == {"exact": pytest.approx(1 / 3), "f1": pytest.approx((1 + 4 / 7) / 3)}


def test_nothing_written_where_nothing_was_wanted_is_right(tokenizer):
    nothing = torch.full((1, 3), tokenizer.eos_token_id).numpy()
    assert pairs.score_texts(SimpleNamespace(predictions=nothing, label_ids=nothing), tokenizer) == {
        "exact": 1,
        "f1": 1,
    }


def test_the_embedded_pairs_are_docstrings_and_their_packages():
    domain = pairs.load_packages()
    assert domain.labels[:2] == ["asyncio", "email"] and len(domain.labels) == 10
    assert not {text for text, _ in domain.train} & {text for text, _ in domain.test}
