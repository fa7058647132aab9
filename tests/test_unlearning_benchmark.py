"""The grid of unlearning, at toy size: prepared, cut off, taken up in other parts, reported."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "unlearning.py"
TOY = ["--forget_people", "4", "--retain_people", "2", "--teach_epochs", "1", "--steps", "2", "--seeds", "2"]
GRID = ["--objectives", "npo", "--smoothings", "none", "sam", "wa", "--attacks", "4 rows", "20 unrelated rows"]


def main_of(monkeypatch, *arguments):
    """Run the benchmark's main in this process."""
    spec = importlib.util.spec_from_file_location("unlearning_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    spec.loader.exec_module(module)
    module.main()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_grid_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    with pytest.raises(OSError, match="knows"):
        main_of(monkeypatch, "run", "--work", tmp_path / "empty", *TOY)
    main_of(monkeypatch, "prepare", "--work", tmp_path, *TOY)
    assert capsys.readouterr().out.count("forget {'probability'") == 2
    main_of(monkeypatch, "run", "--work", tmp_path, *TOY, *GRID, "--seeds", 1)
    first = lines_of(tmp_path / "0-1.jsonl")
    labels = ["before", "never knew", "none", "sam", "wa"]
    assert [(line["smoothing"], line["attack"]) for line in first] == [
        (label, attack) for label in labels for attack in ("", "4 rows", "20 unrelated rows")
    ]
    assert all([record["step"] for record in line["curve"]] == [0, 5, 10, 20] for line in first[1::3])
    text = (tmp_path / "0-1.jsonl").read_text()
    (tmp_path / "0-1.jsonl").write_text(text[: text.rindex("{") + 40])  # cut off in the middle of the last line
    for part in ("0/2", "1/2"):
        main_of(monkeypatch, "run", "--work", tmp_path, *TOY, *GRID, "--part", part)
    again = lines_of(tmp_path / "0-2.jsonl") + lines_of(tmp_path / "1-2.jsonl")
    done = [(line["smoothing"], line["seed"], line["attack"]) for line in again]
    missing = [("wa", 0, "20 unrelated rows")]
    missing += [(label, 1, attack) for label in labels[2:] for attack in ("", "4 rows", "20 unrelated rows")]
    assert sorted(done) == sorted(missing)
    same = next(line for line in again if line["seed"] == 0)
    assert same["curve"] == first[-1]["curve"]  # the kept model, attacked again
    capsys.readouterr()
    main_of(monkeypatch, "report", "--work", tmp_path)
    printed = capsys.readouterr().out.splitlines()
    parts = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed if line.startswith("|")]
    starts = [place for place, row in enumerate(parts) if row[0] == "smoothing"]
    state, untouched, _, relearned = (parts[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True))
    assert state[0][:3] == ["smoothing", "seeds", "forget"] and [row[0] for row in state[2:]] == labels
    assert [row[1] for row in state[2:]] == ["1", "1", "2", "2", "2"]
    assert untouched[0][1:] == relearned[0][1:] == ["4 rows", "20 unrelated rows"]
    assert all("+/-" in row[-1] for row in untouched[5:]) and not any("+/-" in row[-1] for row in untouched[2:5])
    sam = [line["curve"] for line in (*first, *again) if line["attack"] == "4 rows" and line["smoothing"] == "sam"]
    values = [[record["untouched_probability"] for record in curve] for curve in sam]
    gain = sum(max(way) - way[0] for way in values) / 2
    assert len(sam) == 2 and untouched[5][1].startswith(f"{gain:.3f} (")
    ends = [curve[-1]["relearned_probability"] for curve in sam]
    assert relearned[5][1] == f"{sum(ends) / 2:.3f}"
    assert (tmp_path / "npo.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"other settings \(lr: 0.001 there, 0.01 now\)"):
        main_of(monkeypatch, "run", "--work", tmp_path, *TOY, "--lr", "0.01")
