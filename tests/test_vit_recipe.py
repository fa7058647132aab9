"""The ViT recipe as a user runs it, at toy size: offline, from a folder, again after an interruption, wrong."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_sharp.recipes.report import KEY, REQUIRED
from hf_sharp.recipes.tasks.image_models import small_vit

RECIPE = Path(__file__).parents[1] / "recipes" / "vit_sam.py"
TOY = ["--max_steps", "2", "--max_train_samples", "16", "--max_eval_samples", "20", "--corrupted_samples", "2"]
TOY += ["--logging_steps", "1", "--per_device_train_batch_size", "8", "--disable_tqdm", "true", "--use_cpu"]
METHODS = ["plain", "plain_2x", "sam", "gsam", "msam", "sam_on", "fsam"]
KINDS = ["noise", "blur", "contrast", "brightness", "jpeg", "pixelate"]


def main_of(monkeypatch, *arguments):
    """Run the recipe's main in this process."""
    spec = importlib.util.spec_from_file_location("vit_sam_script", RECIPE)
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


def test_demo_writes_a_row_a_run_and_a_plot(demo):
    rows = rows_in(demo)
    expected = [(method, noise) for noise in (0.0, 0.2) for method in ["linear", *METHODS]]
    assert [(row["method"], row["label_noise"]) for row in rows] == expected
    assert len({tuple(row[key] for key in KEY) for row in rows}) == len(rows)
    for row in rows:
        assert set(REQUIRED) <= set(row) and (row["task"], row["metric"]) == ("digits", "accuracy")
        assert 0 <= row["value"] <= 1 and 0.05 < row["majority"] < 0.5
        assert list(row["corruptions"]) == KINDS and all(len(each) == 5 for each in row["corruptions"].values())
        assert row["corrupted"] == pytest.approx(np.mean(list(row["corruptions"].values())))
    networks = [row for row in rows if row["method"] != "linear"]
    assert [row["steps"] for row in networks] == [2, 4, 2, 2, 2, 2, 2] * 2
    assert [row["passes"] for row in networks][:7] == [1, 1, 2, 2, 1, 2, 2]
    assert len({row["loss"] for row in networks}) > 8  # methods and noise make a difference, plain's second step too
    assert (demo / "results.png").read_bytes().startswith(b"\x89PNG")


def test_running_again_skips_resumes_and_prints_tables(demo, monkeypatch, capsys):
    rows = rows_in(demo)
    (demo / "results.json").write_text(json.dumps(rows[:-1]))  # as if cut off before the last run was written
    main_of(monkeypatch, *TOY, "--output_dir", demo)
    printed = capsys.readouterr().out
    assert printed.count("finished before, kept") == 15 and printed.count("resuming from") == 1
    again = rows_in(demo)
    assert again[:-1] == rows[:-1]
    assert {**again[-1], "seconds_per_step": None} == {**rows[-1], "seconds_per_step": None}
    for title in ("digits, clean test images", "digits, 20% noisy training labels, corrupted test images"):
        table = printed[printed.index(f"\n{title}\n") :].splitlines()
        assert [line.split()[0] for line in table[4:12]] == ["linear", *METHODS] and table[12].startswith("majority")
        assert table[13].startswith("Against plain, one seed") and table[14].startswith("Against plain_2x, one seed")
    table = printed[printed.index("Mean over severities") :].splitlines()
    assert table[1].split() == KINDS
    sam = next(row for row in rows if row["method"] == "sam")
    numbers = next(line for line in table if line.startswith("sam ")).split()[1:]
    assert list(map(float, numbers)) == pytest.approx([np.mean(sam["corruptions"][kind]) for kind in KINDS], abs=6e-4)


def test_results_of_other_settings_are_refused(demo, monkeypatch):
    before = (demo / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=r"other settings \(sam_rho: 0.1 there, 0.2 now\)"):
        main_of(monkeypatch, *TOY, "--sam_rho", "0.2", "--output_dir", demo)
    assert (demo / "results.json").read_bytes() == before


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of small colour images and a model to fine-tune."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("val", 6)):
        for index in range(count):
            for name, colour in {"red": (200, index, 0), "blue": (0, index, 200)}.items():
                (folder / "data" / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 16), colour).save(folder / "data" / split / name / f"{index}.png")
    network = small_vit(["a", "b", "c"], 8, 3, hidden=16, layers=1).make()
    network.save_pretrained(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]}'
    )
    return folder


def test_a_checkpoint_on_a_folder_over_seeds(pictures, tmp_path, monkeypatch, capsys):
    command = [*TOY, "--data_dir", pictures / "data", "--model_name_or_path", pictures / "model", "--seeds", "2"]
    command += ["--methods", "plain", "sam", "--sam_rho", "0.01", "--max_steps", "10", "--bf16"]
    command += ["--learning_rate", "1e-2"]
    main_of(monkeypatch, *command, "--output_dir", tmp_path)
    rows = rows_in(tmp_path)
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for seed in (42, 43) for method in ("linear", "plain", "sam")
    ]  # fmt: skip
    assert {row["task"] for row in rows} == {"data"} and {row["label_noise"] for row in rows} == {0.0}
    assert rows[0]["value"] == 1 and min(row["value"] for row in rows) > 0.9  # red and blue are easy to tell apart
    printed = capsys.readouterr().out
    assert "Against plain, 2 seeds, 95 % intervals" in printed and "plain_2x" not in printed


def test_an_architecture_from_scratch(pictures, tmp_path, monkeypatch):
    command = [*TOY, "--data_dir", pictures / "data", "--model_name_or_path", pictures / "model", "--from_scratch"]
    main_of(monkeypatch, *command, "--image_size", "12", "--methods", "msam", "--output_dir", tmp_path)
    assert [row["method"] for row in rows_in(tmp_path)] == ["linear", "msam"]


WRONG = {
    "unknown method": (["--methods", "plain", "asam"], "no method 'asam'. Known: plain, plain_2x, sam, gsam"),
    "negative radius": (["--sam_rho", "-1"], "rho"),
    "no seeds": (["--seeds", "0"], "--seeds is at least 1; got 0."),
    "nothing to corrupt": (["--corrupted_samples", "0"], "--corrupted_samples is at least 1; got 0."),
    "noise is no share": (["--label_noise", "1.5"], "between 0 and 1"),
    "two data sets": (["--data_dir", "a", "--dataset_name", "b"], "Give --data_dir or --dataset_name, not both."),
    "no data": (["--data_dir", "nowhere"], "There is no folder of images and no archive"),
    "scratch of what": (["--from_scratch"], "--from_scratch needs --model_name_or_path"),
    "crops of nothing": (["--area", "0"], "area is the smallest share"),
    "no patches": (["--image_size", "9"], "images with sides that 4 divides"),
    "another size": (["--data_dir", "{data}", "--model_name_or_path", "{model}", "--image_size", "12"], "not 12"),
    "no model": (["--data_dir", "{data}", "--model_name_or_path", "nowhere"], "couldn't connect"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_refused_before_training(case, pictures, monkeypatch, tmp_path):
    arguments, message = WRONG[case]
    places = {"data": pictures / "data", "model": pictures / "model"}
    with pytest.raises(SystemExit) as refusal:
        main_of(
            monkeypatch, *(each.format(**places) for each in arguments), "--use_cpu", "--output_dir", tmp_path / "o"
        )
    assert str(refusal.value).startswith("vit_sam.py: ") and message in str(refusal.value)
    assert not (tmp_path / "o").exists()
