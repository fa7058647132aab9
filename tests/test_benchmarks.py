"""The benchmarks run, at toy size, and their peers make the step that we make."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_sharp import SharpTrainer, sam
from models import mlp_rows, tiny_mlp, windows_of
from references import flat
from training import build

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A benchmark as a module; it may import the ones beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def module(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return module


def test_a_textbook_loop_makes_our_step(load, tmp_path):
    ours, theirs, rows = tiny_mlp(), tiny_mlp(), mlp_rows(20)
    settings = {"optim": "adamw_torch_fused", "lr_scheduler_type": "constant"}
    build(SharpTrainer, ours, rows, tmp_path, method=sam(0.05), **settings).train()
    batches = [batch for (batch,) in windows_of(rows, micro=4, accumulate=1)]
    ticks = []
    adamw = {"lr": 0.05, "weight_decay": 0.0, "fused": True}
    load("peers").textbook(theirs, batches, adamw, None, lambda: ticks.append(1))
    assert len(ticks) == 5
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-9)


def test_the_race_prints_every_contender_with_its_passes_and_memory(load, tmp_path, capsys):
    step = load("step")
    sizes = "--hidden 32 --layers 1 --batch 2 --length 8 --rounds 2".split()
    step.main(["--method", "sam", "looksam:every=2", *sizes, "--json", str(tmp_path / "ratios.json")])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = {line[0].strip("| "): [cell.strip("| ") for cell in line[1:]] for line in lines}
    assert {"Trainer", "plain + bare pass", "sam", "looksam:every=2", "a textbook SAM loop"} <= set(cells)
    assert cells["sam"][3] == "2" and cells["looksam:every=2"][3] == "1.5"
    memory = {name: float(row[4]) for name, row in cells.items() if row[4].replace(".", "").isdigit()}
    assert 0.9 < memory["sam"] - memory["Trainer"] < 1.1
    assert (tmp_path / "ratios.json").is_file()


def test_the_interval_of_a_median_covers_it(load):
    step = load("step")
    low, high = step.median_interval([float(v) for v in range(40)])
    assert (low, high) == (13.0, 26.0)  # ranks 14 and 27 of 40: 96.2 % by the binomial distribution


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
def test_the_race_of_adapters_prints_times_and_memory(load, capsys):
    load("step")
    sizes = "--hidden 32 --layers 1 --batch 2 --length 8 --rounds 2 --lora_rank 4".split()
    load("adapters").main(["--method", "sam:rho=0.01", "bi_lora:rank=4", "bar", "flat_lora", *sizes, "--clock", "cpu"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    memory = {line[0].strip("| "): float(line[4].strip("| ")) for line in lines[1:]}
    assert list(memory)[:2] == ["LoRA", "LoRA, again"] and abs(memory["LoRA, again"]) < 0.1
    assert memory["sam:rho=0.01"] == pytest.approx(1, abs=0.1) and abs(memory["bar"]) < 0.1
    assert 2.9 < memory["bi_lora:rank=4"] < 4.3


def test_growth_is_raced_timed_part_by_part_and_drawn(load, tmp_path, capsys, monkeypatch):
    load("step")
    scaling = load("scaling")
    monkeypatch.setattr(scaling, "SIZES", {"2M": (16, 1), "10M": (32, 2)})
    sizes = "--sizes 2M 10M --groups 3 --accumulate 2 --batch 2 --length 8 --rounds 2 --repeats 1".split()
    scaling.main([*sizes, "--json", str(tmp_path / "scaling.json"), "--picture", str(tmp_path / "scaling.png")])
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [(row["panel"], row["place"]) for row in found["races"] if row["method"] == "sam"] == [
        ("million parameters", 0.1),
        ("million parameters", 0.3),
        ("parameter groups", 3),
        ("micro-batches a step", 2),
    ]
    assert all(row["ratio"] > 0 for row in found["races"])
    assert [row["place"] for row in found["parts"]] == [0.1, 0.3]
    assert len(found["parts"][0]["seconds"]) == 6 and all(s > 0 for s in found["parts"][0]["seconds"].values())
    assert "| sam |" in capsys.readouterr().out
    assert (tmp_path / "scaling.png").is_file() and (tmp_path / "scaling_parts.png").is_file()


def test_the_overhead_of_a_step_is_timed_and_its_calls_are_counted(load, capsys):
    load("overhead").main("--tensors 3 30 --calls 2 9 --rounds 2 --steps 2".split())
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    times, calls = rows[1:3], rows[4:]
    assert [row[0] for row in times + calls] == ["3", "30", "2", "9"]
    assert all(float(value) > 0 for row in times for value in row[1:3])
    counted = [[int(cell.replace(",", "")) for cell in row[1:]] for row in calls]
    assert all(0 < files < moves < count for count, files, moves in counted)


def test_calls_are_counted_by_the_file_they_are_in(load):
    overhead = load("overhead")
    calls = overhead.Calls()
    calls.files, calls.steps = ["a", "a", "b", "a"] * 3, 3
    assert calls.numbers() == (4, 2, 2)  # a a b a, three times: to b and back


def test_two_passes_leave_the_gradient_of_one(load, tmp_path):
    rows = mlp_rows(12)
    settings = {"lr_scheduler_type": "constant", "max_steps": 3}
    once, twice = (tiny_mlp(), tiny_mlp())
    build(Trainer, once, rows, tmp_path, **settings).train()
    build(load("overhead").TwoPasses, twice, rows, tmp_path, **settings).train()
    torch.testing.assert_close(flat(once), flat(twice), rtol=0, atol=0)


def test_the_cost_of_recording_state_is_printed(load, capsys):
    load("state").main("--layers 1 --hidden 32 --rounds 1".split())
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[2] for line in lines] == ["model", "model, trainer"]
    assert all(float(line[4]) > 0 and line[5].endswith("% |") for line in lines)
