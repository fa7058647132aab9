"""The LLM recipe as a user runs it, at toy size: offline, from files, chats, again after an interruption, wrong."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_sharp.recipes import report
from hf_sharp.recipes.report import KEY, REQUIRED
from hf_sharp.recipes.tasks import chats, domains
from models import seeded

RECIPE = Path(__file__).parents[1] / "recipes" / "llm_lora_sam.py"
TOY = ["--max_steps", 4, "--pretrain_steps", 1, "--max_eval_samples", 8, "--block_size", 16, "--use_cpu", "--seeds", 1]
TOY += ["--logging_steps", 1, "--per_device_train_batch_size", 4, "--disable_tqdm", "true", "--evaluations", 2]
METHODS = ["lora", "lora_sam", "bi_lora", "nbar"]
PLACES = ["in-domain", "out-of-domain"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL and PEFT use names that transformers renamed


def main_of(monkeypatch, *arguments):
    """Run the recipe's main in this process."""
    spec = importlib.util.spec_from_file_location("llm_lora_sam_script", RECIPE)
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


def test_demo_writes_a_row_a_run_with_its_path_and_a_picture(demo):
    rows = rows_in(demo)
    assert [row["method"] for row in rows] == METHODS
    assert len({tuple(row.get(key) for key in KEY) for row in rows}) == len(rows)
    for row in rows:
        assert set(REQUIRED) <= set(row) and row["steps"] == 4 and row["memory"] > 0
        assert len(row["path"]) == 3 and row["value"] == row["path"][-1][0]
        assert all(1 < value < 2000 for point in row["path"] for value in point)
    assert [row["passes"] for row in rows] == [1, 2, 1, 1]
    assert len({tuple(row["path"][0]) for row in rows}) == 1  # they all begin at the same weights
    assert len({tuple(row["path"][-1]) for row in rows}) == 4
    assert (demo / "results.png").read_bytes().startswith(b"\x89PNG")
    start = load_file(demo / "start" / "model.safetensors")
    assert not any("lora_" in name for name in start)


def test_running_again_skips_what_is_finished_and_prints_one_table(demo, stdlib, monkeypatch, capsys):
    monkeypatch.setattr(domains, "load_domains", lambda: stdlib)
    rows = rows_in(demo)
    (demo / "results.json").write_text(json.dumps(rows[:-1]))  # as if cut off before the last run was written
    start = (demo / "start" / "model.safetensors").stat().st_mtime_ns
    main_of(monkeypatch, *TOY, "--output_dir", demo)
    printed = capsys.readouterr().out
    assert printed.count("finished before, kept") == 3
    assert (demo / "start" / "model.safetensors").stat().st_mtime_ns == start
    again = rows_in(demo)
    assert again[:-1] == rows[:-1] and again[-1]["path"] == rows[-1]["path"]
    assert report.exchange(again, PLACES, "lora") in printed


def test_results_of_other_settings_are_refused(demo, stdlib, monkeypatch):
    before = (demo / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=r"other settings \(sam_rho: 0.05 there, 0.2 now\)"):
        main_of(monkeypatch, *TOY, "--sam_rho", "0.2", "--output_dir", demo)
    assert (demo / "results.json").read_bytes() == before


# ---- a model and text of one's own

WORDS = "the cat saw a bird and the dog sat on a mat while rain fell over the old town".split()
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama and its tokenizer in a folder, as from the Hub."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = domains.byte_tokenizer([" ".join(WORDS)], size=300, max_length=64)
    tokenizer.chat_template = TEMPLATE
    with seeded(0):
        LlamaForCausalLM(domains.small_llama(tokenizer, 64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text, chats, and prompts with completions."""
    folder, draw = tmp_path_factory.mktemp("files"), torch.Generator().manual_seed(0)

    def said():
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (6,), generator=draw))

    def rows(make):
        return "\n".join(json.dumps(make()) for _ in range(60))

    roles = ("user", "assistant")
    (folder / "text.txt").write_text("".join(said() + "\n" for _ in range(200)))
    (folder / "other.txt").write_text("".join(said().upper() + "\n" for _ in range(100)))
    (folder / "chat.jsonl").write_text(rows(lambda: {"messages": [{"role": r, "content": said()} for r in roles]}))
    (folder / "prompt.jsonl").write_text(rows(lambda: {"prompt": said(), "completion": " " + said(), "id": 1}))
    (folder / "neither.jsonl").write_text(rows(lambda: {"question": said()}))
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion')
    return folder


CASES = {
    "blocks": ["text.txt", "--gradient_checkpointing", "true", "--methods", "lora", "bi_lora"],
    "blocks in bf16": ["text.txt", "--bf16", "--methods", "lora", "lora_sam", "flat_lora"],
    "chats": ["chat.jsonl", "--chat", "--methods", "lora", "lora_sam", "bi_lora", "nbar"],
    "prompts": ["prompt.jsonl", "--chat", "--methods", "lora", "lora_sam"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_and_text_of_ones_own(case, model, files, tmp_path, monkeypatch, capsys):
    if "--chat" in CASES[case]:
        pytest.importorskip("trl")
    file, *more = CASES[case]
    command = [*TOY, "--model_name_or_path", model, "--train_file", files / file, *more, "--block_size", 48]
    if case != "prompts":
        command += ["--ood_file", files / "other.txt"]
    main_of(monkeypatch, *command, "--save_strategy", "no", "--learning_rate", "1e-2", "--output_dir", tmp_path)
    rows = rows_in(tmp_path)
    assert [row["method"] for row in rows] == more[more.index("--methods") + 1 :]
    assert all(len(row["path"]) == 3 and row["path"][-1][0] < row["path"][0][0] for row in rows)
    assert {len(point) for row in rows for point in row["path"]} == {1 if case == "prompts" else 2}
    assert (tmp_path / "results.png").exists() == (case != "prompts") and not (tmp_path / "start").exists()
    assert ("at equal gain" in capsys.readouterr().out) and rows[0]["task"] == ("chat" if "--chat" in more else "text")


def test_a_run_that_was_cut_off_is_resumed(model, files, tmp_path, monkeypatch):
    command = [*TOY, "--model_name_or_path", model, "--train_file", files / "text.txt", "--methods", "lora", "bi_lora"]
    command += ["--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2, "--output_dir", tmp_path]
    main_of(monkeypatch, *command)
    rows = rows_in(tmp_path)
    saved = load_file(tmp_path / "runs" / "bi_lora_seed42" / "checkpoint-4" / "adapter_model.safetensors")
    assert saved and all("lora_A" in name or "lora_B" in name for name in saved)
    (tmp_path / "results.json").write_text(json.dumps(rows[:1]))
    shutil.rmtree(tmp_path / "runs" / "bi_lora_seed42" / "checkpoint-4")
    main_of(monkeypatch, *command)
    assert [row["path"] for row in rows_in(tmp_path)] == [row["path"] for row in rows]


WRONG = {
    "unknown method": (["--methods", "lorax"], "no method 'lorax'. Known: lora, lora_sam, bi_lora, nbar, flat_lora"),
    "negative radius": (["--sam_rho", "-1"], "rho"),
    "no seeds": (["--seeds", "0"], "--seeds is at least 1; got 0"),
    "one evaluation": (["--evaluations", "1"], "--evaluations is at least 2"),
    "text without a model": (["--train_file", "a.txt"], "--model_name_or_path goes with --train_file"),
    "a model without text": (["--model_name_or_path", "m"], "without both the demo runs"),
    "two sources": (["--train_file", "a", "--dataset_name", "b"], "Give a file or a data set of the Hub, not both"),
    "chats without a model": (["--chat"], "--chat is for a model of your own"),
    "no such model": (["--model_name_or_path", "nowhere/m", "--train_file", "a.txt"], "to load the files"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_refused_before_training(case, monkeypatch, tmp_path):
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as refusal:
        main_of(monkeypatch, *arguments, "--use_cpu", "--output_dir", tmp_path / "out")
    assert str(refusal.value).startswith("llm_lora_sam.py: ") and message in str(refusal.value)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "file, message",
    [
        ("neither.jsonl", "has no column messages, nor prompt and completion, in train; there are question"),
        ("broken.jsonl", "broken.jsonl cannot be read"),
        ("missing.jsonl", "missing.jsonl"),
    ],
)
def test_chats_that_are_none_are_refused(file, message, model, files, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    command = ["--model_name_or_path", model, "--train_file", files / file, "--chat", "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as refusal:
        main_of(monkeypatch, *command, "--use_cpu")
    assert message in str(refusal.value)


def test_what_is_not_installed_is_said_before_training(model, files, monkeypatch, tmp_path):
    command = ["--model_name_or_path", model, "--train_file", files / "text.txt", "--output_dir", tmp_path]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else found(name, *a))
    with pytest.raises(SystemExit, match=r"needs TRL, which is not installed: pip install trl"):
        main_of(monkeypatch, *command, "--chat", "--use_cpu")
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(SystemExit, match="--load_in_4bit needs bitsandbytes, which is not installed"):
        main_of(monkeypatch, *command, "--load_in_4bit", "--use_cpu")


# ---- chats


def test_rows_are_held_back_and_drawn_the_same_every_time(files):
    parts = chats.load_chats(files / "prompt.jsonl")
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 54, "test": 6}
    assert parts["train"].column_names == ["prompt", "completion"]
    again = chats.load_chats(files / "prompt.jsonl")
    assert again["test"][:] == parts["test"][:]
    given = chats.load_chats(files / "prompt.jsonl", test_file=files / "prompt.jsonl")
    assert len(given["train"]) == len(given["test"]) == 60
    few = chats.some(parts["train"], 5)
    assert len(few) == 5 and few[:] == chats.some(parts["train"], 5)[:] != parts["train"][:5]
    assert len(chats.some(parts["test"], 100)) == 6
