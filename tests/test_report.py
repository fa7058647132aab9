"""Results of recipes: what is kept, what is refused, and whether table, sentence and plot say what the rows say."""

import json
import math
import struct

import pytest
from scipy import stats

from hf_sharp.recipes import report
from hf_sharp.recipes.report import results


def row(method="plain", seed=0, value=0.5, **more):
    common = {"metric": "accuracy", "majority": 0.25, "seconds_per_step": 0.1, "passes": 1, "task": "rte"}
    return {"method": method, "seed": seed, "value": value, **common, **more}


PAIRS = [
    *(row("plain", seed, value, loss=1.0) for seed, value in enumerate([0.50, 0.60, 0.70])),
    *(
        row("sam", seed, value, seconds_per_step=0.2, passes=2, gap=0.1 * seed, loss=0.5)
        for seed, value in enumerate([0.54, 0.62, 0.76])
    ),
]


# --- rows in a file --------------------------------------------------------------------------------------------------


def test_rows_are_added_one_by_one(tmp_path):
    path = tmp_path / "new" / "results.json"
    assert report.read_rows(path) == []
    for index, each in enumerate(PAIRS, start=1):
        assert report.add_row(path, each) == PAIRS[:index]
    assert json.loads(path.read_text()) == report.read_rows(path) == PAIRS
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_the_same_row_twice_is_one_row(tmp_path):
    path = tmp_path / "results.json"
    report.add_row(path, row())
    assert report.add_row(path, row()) == [row()]


def test_another_result_of_the_same_run_is_refused_and_the_file_kept(tmp_path):
    path = tmp_path / "results.json"
    report.add_row(path, row(value=0.5))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another result of the same run.*'plain'.*not written over"):
        report.add_row(path, row(value=0.6))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"label_noise": 0.4}, {"epochs": 6.0}, {"task": "cola"}, {"model": "m"}]
)
def test_what_tells_runs_apart(change):
    assert len(report.merge([row()], [row(value=0.6, **change)])) == 2


def test_merge_keeps_old_rows_of_any_shape_and_leaves_its_arguments_alone():
    old = [{"method": "somebody's", "note": "kept"}]
    merged = report.merge(old, [row()])
    assert merged == [{"method": "somebody's", "note": "kept"}, row()]
    assert len(old) == 1


def test_merge_refuses_two_new_rows_of_one_run():
    with pytest.raises(ValueError, match="another result"):
        report.merge([], [row(value=0.1), row(value=0.2)])


def test_a_row_lacks_something(tmp_path):
    with pytest.raises(ValueError, match="lacks majority, passes"):
        report.add_row(tmp_path / "results.json", {k: v for k, v in row().items() if k not in ("majority", "passes")})
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    path = tmp_path / "results.json"
    report.add_row(path, row(loss=math.nan, metrics={"test": {"loss": math.inf, "f1": 0.5}}))
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert report.read_rows(path)[0]["loss"] is None
    assert report.read_rows(path)[0]["metrics"] == {"test": {"loss": None, "f1": 0.5}}


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("{}", "not a list"), ("[1]", "not a list")])
def test_a_file_that_is_not_ours(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.add_row(path, row())
    assert path.read_text() == text


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    report.write_json(path, [1])
    with pytest.raises(TypeError):
        report.write_json(path, [object()])

    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.write_whole(path, interrupted)
    assert json.loads(path.read_text()) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_kept_and_compared(tmp_path):
    first = report.keep_settings(tmp_path, {"learning_rate": 1e-3, "method sam": {"rho": 0.05}, "seed": 1})
    assert first == {"learning_rate": 1e-3, "method sam": {"rho": 0.05}}
    report.write_json(tmp_path / "settings.json", first)
    more = {"learning_rate": 1e-3, "method asam": {}, "output_dir": "x", "seeds": 5, "logging_steps": 7}
    assert report.keep_settings(tmp_path, more) == {**first, "method asam": {}}
    with pytest.raises(ValueError, match=r"other settings \(learning_rate: 0.001 there, 0.01 now\).*--output_dir"):
        report.keep_settings(tmp_path, {"learning_rate": 1e-2})
    with pytest.raises(ValueError, match="method sam"):
        report.keep_settings(tmp_path, {"method sam": {"rho": 0.1}})


def test_names_that_only_begin_like_free_settings_count():
    settings = {"tokenizer_name": "a", "config_name": "b", "dataloader_drop_last": True, "label_smoothing_factor": 0.1}
    assert report.keep_settings("nowhere", settings) == settings


def test_results_of_unknown_settings_are_refused(tmp_path):
    report.add_row(tmp_path / "results.json", row())
    with pytest.raises(ValueError, match="results of unknown settings"):
        report.keep_settings(tmp_path, {})


# --- table, sentence, plot -------------------------------------------------------------------------------------------


def test_interval_is_that_of_a_paired_t_test():
    plain, sam = ([r["value"] for r in PAIRS if r["method"] == m] for m in ("plain", "sam"))
    low, high = stats.ttest_rel(sam, plain).confidence_interval(0.95)
    summary = report.summarise(PAIRS)[1]
    assert summary["difference"] == pytest.approx((low + high) / 2)
    assert summary["interval"] == pytest.approx((high - low) / 2)
    assert report.interval([0.1]) is None and report.interval([]) is None


def test_summary():
    plain, sam = report.summarise(iter(PAIRS))
    assert (plain["method"], plain["seeds"], plain["majority"], plain["passes"]) == ("plain", 3, 0.25, 1)
    assert plain["mean"] == pytest.approx(0.6) and plain["sd"] == pytest.approx(0.1)
    assert plain["difference"] is plain["interval"] is plain["gap"] is None
    assert (sam["ratio"], sam["loss"], sam["passes"]) == (pytest.approx(2.0), 0.5, 2)
    assert sam["gap"] == pytest.approx(0.1)


def test_only_seeds_that_both_have_are_paired():
    rows = [row("plain", 0, 0.5), row("plain", 1, 0.9), row("sam", 1, 0.8), row("sam", 2, 0.1)]
    assert report.summarise(rows)[1]["difference"] == pytest.approx(-0.1)
    assert report.summarise([row("sam")])[0]["difference"] is None


def test_missing_numbers_are_left_out():
    rows = [row("plain", 0, None), row("plain", 1, 0.5), row("sam", 0, 0.7, seconds_per_step=None), row("sam", 1, 0.6)]
    plain, sam = report.summarise(rows)
    assert plain["mean"] == 0.5 and sam["difference"] == pytest.approx(0.1)


def test_table():
    lines = report.table(PAIRS).splitlines()
    assert lines[0].split()[:4] == ["method", "seeds", "accuracy", "sd"]
    assert len({len(line) for line in lines[:4]}) == 1
    half = report.summarise(PAIRS)[1]["interval"]
    sam = lines[3].split()
    assert sam[:5] == ["sam", "3", "0.6400", "0.1114", "+0.0400"]
    assert sam[5:8] == [f"{0.04 - half:+.4f}", "..", f"{0.04 + half:+.4f}"]
    assert sam[8:] == ["0.5000", "0.1000", "200.0", "2.00", "2"]
    assert lines[4].split() == ["majority", "class", "0.2500"] and len(lines) == 5
    assert "majority" not in report.table([row(majority=None)])
    assert lines[2].split() == ["plain", "3", "0.6000", "0.1000", "-", "-", "1.0000", "-", "100.0", "1.00", "1"]


def sentence(differences):
    rows = [row("plain", seed, 0.5) for seed in range(len(differences))]
    return report.verdict(rows + [row("sam", s, 0.5 + d) for s, d in enumerate(differences)], "sam")


def test_sentence_claims_what_the_seeds_show():
    assert "a gain of 0.050" in sentence([0.05, 0.051, 0.049])
    assert "a loss of 0.050" in sentence([-0.05, -0.051, -0.049])
    assert "no difference that 3 seeds can show (+0.010" in sentence([0.05, -0.05, 0.03])
    assert "with one seed there is no interval" in sentence([0.05])
    assert "1.00 times the time per step" in sentence([0.05])
    assert "no pair of sam and plain" in report.verdict([row("sam")], "sam")


def test_all_methods_against_one_of_them():
    values = {"plain": (0.5, 0.6, 0.7), "sam": (0.61, 0.70, 0.82), "late": (0.45, 0.56, 0.65), "msam": (0.6, 0.5, 0.7)}
    rows = [row(name, seed, each) for name, seeds in values.items() for seed, each in enumerate(seeds)]
    said = report.against(rows)
    assert said.startswith("Against plain, 3 seeds, 95 % intervals")
    assert (
        "better: sam (+0.110); worse: late (-0.047); no difference that these seeds can show: msam (+0.000)." in said
    )
    other = report.against(rows, "sam")
    assert "better" not in other and "worse: plain (-0.110), late (-0.157)" in other
    one = report.against([each for each in rows if each["seed"] == 1])
    assert one == "Against plain, one seed: differences from -0.100 to +0.100 are hints at most."
    assert "no pair of plain" in report.against([row("sam")])


def test_plot(tmp_path):
    noisy = [{**each, "label_noise": 0.4, "majority": None} for each in PAIRS]
    path = tmp_path / "results.png"
    for rows in ([*PAIRS, *noisy], [row(value=None)], []):
        report.plot(rows, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert [file.name for file in tmp_path.iterdir()] == ["results.png"]
    assert report.panel_title(noisy[0]) == "rte, 40% noisy training labels"


# --- time ------------------------------------------------------------------------------------------------------------


def test_timer_leaves_out_warm_up_and_what_is_between_steps(monkeypatch):
    timer, clock = report.StepTimer(), iter([0, 9, 10, 19, 20, 29, 30, 31, 100, 103])
    assert timer.seconds_per_step is None
    monkeypatch.setattr(report.StepTimer, "_now", staticmethod(lambda: next(clock)))
    for step in range(5):
        timer.on_step_begin(None, None, None)
        timer.on_step_end(None, None, None)
        if step == 1:
            assert timer.seconds_per_step == 9
    assert timer.seconds_per_step == 2


def test_curves_stand_in_rows_of_three_or_four(tmp_path):
    def size(panels):
        lines = {"none": [[(0, 0.1), (5, 0.3)], [(0, 0.2), (5, 0.2)]], "sam": [[(0, 0.1), (5, 0.2)]]}
        report.curves({str(n): lines for n in range(panels)}, tmp_path / "curves.png", "steps", "probability")
        return struct.unpack(">II", (tmp_path / "curves.png").read_bytes()[16:24])

    (wide, low), (_, high), (wider, _) = size(3), size(5), size(4)
    assert high == 2 * low and wider > wide
