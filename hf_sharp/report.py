"""What recipes report: rows in ``results.json``, a table and a sentence over seeds, a plot, and the time of a step.

A row is one finished run, a dict with at least the keys of ``REQUIRED``. Rows are only ever added: what a file holds
is kept, and a run that is there already under the same ``KEY`` is not written over. ``settings.json`` beside it holds
the settings that all its runs share, so that results of different settings are never mixed.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

Row = dict[str, Any]

REQUIRED = ("method", "seed", "metric", "value", "majority", "seconds_per_step", "passes")
KEY = ("recipe", "task", "model", "method", "label_noise", "epochs", "seed")
BASELINE = "plain"
# Settings that change no result or stand in its row, by how they begin, and exceptions.
FREE = (
    *("output_dir", "overwrite_", "log", "save_", "eval_", "per_device_eval", "hub_", "push_to_hub", "resume", "do_"),
    *("report_to", "run_name", "project", "trackio", "disable_tqdm", "dataloader_", "local_rank", "ddp_", "debug"),
    *("seed", "skip_memory", "enable_jit", "config", "compare", "label_noise", "cache_dir", "token"),
)
NOT_FREE = ("dataloader_drop_last", "config_name", "tokenizer_name")


def clean(row: Row) -> Row:
    """Check a row, and turn numbers that are not finite into None, which JSON can hold.

    Args:
        row: one run.

    Returns:
        A copy to be written.

    Raises:
        ValueError: if a required key is missing.
    """
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        raise ValueError(f"A row of results needs {', '.join(REQUIRED)}; this one lacks {', '.join(missing)}: {row}")
    return _finite(row)


def identity(row: Row) -> tuple[Any, ...]:
    """Say which run a row is of.

    Args:
        row: one run.

    Returns:
        Its values under ``KEY``; a key that it lacks counts as None.
    """
    return tuple(row.get(key) for key in KEY)


def merge(old: Sequence[Row], new: Iterable[Row]) -> list[Row]:
    """Add rows to others.

    Args:
        old: rows that are kept as they are.
        new: rows to add; those that are among the old ones word for word are left out.

    Returns:
        All rows.

    Raises:
        ValueError: if a new row has the key of another one and differs from it.
    """
    merged = list(old)
    known = {identity(row): row for row in merged}
    for row in map(clean, new):
        there = known.setdefault(identity(row), row)
        if there is row:
            merged.append(row)
        elif there != row:
            run = {key: row[key] for key in KEY if key in row}
            raise ValueError(f"There is another result of the same run {run}; it is not written over.")
    return merged


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a file.

    Args:
        path: a ``results.json``.

    Returns:
        Its rows; none if there is no such file.

    Raises:
        ValueError: if the file is not a list of rows.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Move it away or use another folder.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of results. Move it away or use another folder.")
    return rows


def write_json(path: str | Path, content: Any) -> None:
    """Write a file as a whole or not at all: an interrupted run leaves the old one.

    Args:
        path: where to; its folder is made.
        content: what JSON can hold.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    _replace(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def add_row(path: str | Path, row: Row) -> list[Row]:
    """Add a finished run to a file at once.

    Args:
        path: a ``results.json``, made if there is none.
        row: the run.

    Returns:
        All rows of the file.
    """
    rows = merge(read_rows(path), [row])
    write_json(path, rows)
    return rows


def keep_settings(folder: str | Path, settings: Row) -> Row:
    """Compare the settings of a run with those of the results that a folder holds.

    Args:
        folder: where results are written.
        settings: all settings; those under ``FREE`` may differ, and one that the folder's runs have not got, such as a
            further method's, is no difference.

    Returns:
        The settings to write to ``settings.json``: those of the folder and ours.

    Raises:
        ValueError: if the folder holds results of other settings, or of settings that nobody knows.
    """
    ours = {key: value for key, value in settings.items() if key in NOT_FREE or not key.startswith(FREE)}
    ours = json.loads(json.dumps(ours, default=str))
    path = Path(folder, "settings.json")
    if not path.exists():
        if read_rows(path.with_name("results.json")):
            raise ValueError(f"{folder} holds results of unknown settings. Use another --output_dir.")
        return ours
    theirs = json.loads(path.read_text(encoding="utf-8"))
    other = [f"{key}: {theirs[key]} there, {ours[key]} now" for key in ours if theirs.get(key, ours[key]) != ours[key]]
    if other:
        raise ValueError(f"{folder} holds results of other settings ({'; '.join(other)}). Use another --output_dir.")
    return theirs | ours


def interval(differences: Sequence[float]) -> float | None:
    """Half the width of the 95 % t-interval of a mean.

    Args:
        differences: one number a seed.

    Returns:
        The half width, or None for fewer than two numbers.
    """
    if len(differences) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))


def summarise(rows: Iterable[Row], baseline: str = BASELINE) -> list[Row]:
    """Put the seeds of each method together.

    Args:
        rows: runs of one task under one label noise.
        baseline: the method that the others are compared with, seed by seed.

    Returns:
        One dict a method, in the order of the rows: ``method``, ``metric``, ``majority``, ``seeds``, ``mean``, ``sd``,
        ``difference``, ``interval`` (half width), ``loss``, ``gap``, ``seconds_per_step``, ``ratio``, ``passes``; None
        where there is nothing to say.
    """
    groups: dict[str, dict[int, Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], {})[row["seed"]] = row
    base = groups.get(baseline, {})
    plain_seconds = _mean(base.values(), "seconds_per_step")
    summaries = []
    for method, runs in groups.items():
        paired = (
            []
            if method == baseline
            else [(row["value"], base[seed]["value"]) for seed, row in runs.items() if seed in base]
        )
        differences = [ours - theirs for ours, theirs in paired if None not in (ours, theirs)]
        values, seconds = _column(runs.values(), "value"), _mean(runs.values(), "seconds_per_step")
        summary = {key: next(iter(runs.values()))[key] for key in ("method", "metric", "majority", "passes")}
        summary |= {key: _mean(runs.values(), key) for key in ("loss", "gap")}
        summary |= {"seeds": len(runs), "mean": _mean(runs.values(), "value"), "seconds_per_step": seconds}
        summary["sd"] = statistics.stdev(values) if len(values) > 1 else None
        summary["difference"] = statistics.fmean(differences) if differences else None
        summary["interval"] = interval(differences)
        summary["ratio"] = seconds / plain_seconds if seconds and plain_seconds else None
        summaries.append(summary)
    return summaries


def table(rows: Iterable[Row], baseline: str = BASELINE) -> str:
    """Print runs as a table.

    Args:
        rows: runs of one task under one label noise.
        baseline: the method that the others are compared with.

    Returns:
        Text, one line a method and one for the majority class; "-" stands where there is nothing to say.
    """
    summaries = summarise(rows, baseline)
    metric = summaries[0]["metric"] if summaries else "value"
    compared = (f"minus {baseline}", "95 % interval")
    lines: list[tuple[str, ...]] = [
        ("method", "seeds", metric, "sd", *compared, "loss", "gap", "ms/step", "ratio", "passes")
    ]
    for s in summaries:
        milliseconds = None if s["seconds_per_step"] is None else 1000 * s["seconds_per_step"]
        span = None if s["interval"] is None else (s["difference"] - s["interval"], s["difference"] + s["interval"])
        lines.append((
            s["method"], str(s["seeds"]), _show(s["mean"], ".4f"), _show(s["sd"], ".4f"),
            _show(s["difference"], "+.4f"), "-" if span is None else f"{span[0]:+.4f} .. {span[1]:+.4f}",
            _show(s["loss"], ".4f"), _show(s["gap"], ".4f"), _show(milliseconds, ".1f"), _show(s["ratio"], ".2f"),
            _show(s["passes"], "g"),
        ))  # fmt: skip
    if summaries and summaries[0]["majority"] is not None:
        lines.append(("majority class", "", _show(summaries[0]["majority"], ".4f"), *[""] * (len(lines[0]) - 3)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["  ".join((c.ljust if i == 0 else c.rjust)(widths[i]) for i, c in enumerate(line)) for line in lines]
    return "\n".join(line.rstrip() for line in (shown[0], "-" * len(shown[0]), *shown[1:]))


def verdict(rows: Iterable[Row], method: str, baseline: str = BASELINE) -> str:
    """Say in one sentence what the comparison of two methods means, whatever came out.

    Args:
        rows: runs of one task under one label noise.
        method: the method in question.
        baseline: the one it is compared with.

    Returns:
        A sentence that claims no more than the seeds show.
    """
    found = {s["method"]: s for s in summarise(rows, baseline)}
    if method not in found or baseline not in found or found[method]["difference"] is None:
        return f"There is no pair of {method} and {baseline} runs under one seed to compare."
    ours, difference, half = found[method], found[method]["difference"], found[method]["interval"]
    sizes = f"{method} reaches {ours['mean']:.3f} and {baseline} {found[baseline]['mean']:.3f} {ours['metric']}"
    cost = f"at {ours['ratio']:.2f} times the time per step" if ours["ratio"] else "at a step time that is not known"
    if half is None:
        return f"{sizes} ({difference:+.3f}) {cost}; with one seed there is no interval, so this is a hint at most."
    if abs(difference) <= half:
        meaning = f"no difference that {ours['seeds']} seeds can show ({difference:+.3f} +/- {half:.3f})"
    else:
        meaning = f"a {'gain' if difference > 0 else 'loss'} of {abs(difference):.3f} +/- {half:.3f}"
    return f"{sizes} {cost}: {meaning}."


def plot(rows: Sequence[Row], path: str | Path, baseline: str = BASELINE) -> None:
    """Draw the rows: a panel for each task and label noise, a dot a seed, a line at the mean, the majority dashed.

    The picture is made from the rows alone, so it is drawn anew each time.

    Args:
        rows: runs.
        path: the PNG file.
        baseline: drawn in grey.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("The plot needs matplotlib: pip install hf_sharp[recipes]") from error
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(panel_title(row), []).append(row)
    figure = Figure(figsize=(1.2 + 3.6 * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (title, group) in zip(axes, panels.items(), strict=False):
        _draw(axis, title, group, baseline)
    _replace(Path(path), lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def panel_title(row: Row) -> str:
    """Name the comparison that a row belongs to.

    Args:
        row: one run.

    Returns:
        Its task, and the label noise if there is any.
    """
    noise = row.get("label_noise") or 0.0
    return str(row.get("task", "results")) + (f", {noise:.0%} noisy training labels" if noise else "")


class StepTimer(TrainerCallback):
    """Measures the time of a training step, without evaluation, saving, logging and data loading.

    The device is waited for at both ends of a step. Of a longer run the first steps, which warm up, do not count.
    """

    warm_up = 3

    def __init__(self) -> None:
        self.durations: list[float] = []
        self.started: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        if self.started is not None:
            self.durations.append(self._now() - self.started)
            self.started = None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean duration of a step, or None before the first one."""
        counted = self.durations[self.warm_up :] or self.durations
        return statistics.fmean(counted) if counted else None

    @staticmethod
    def _now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()


def _draw(axis: Any, title: str, group: Sequence[Row], baseline: str) -> None:
    """Draw one panel."""
    summaries = summarise(group, baseline)
    for place, summary in enumerate(summaries):
        values = _column((row for row in group if row["method"] == summary["method"]), "value")
        color = "tab:gray" if summary["method"] == baseline else f"C{place}"
        axis.plot([place] * len(values), values, "o", color=color, alpha=0.6, markersize=5)
        if summary["mean"] is not None:
            axis.hlines(summary["mean"], place - 0.25, place + 0.25, color=color, linewidth=2.5)
            axis.annotate(f"{summary['mean']:.3f}", (place + 0.27, summary["mean"]), va="center", fontsize=8)
    if summaries[0]["majority"] is not None:
        axis.axhline(summaries[0]["majority"], color="black", linestyle="--", linewidth=0.8, label="majority class")
        axis.legend(fontsize=7, loc="best")
    axis.set_xticks(range(len(summaries)), [summary["method"] for summary in summaries])
    axis.set_xlim(-0.6, len(summaries) - 0.2)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(summaries[0]["metric"])
    axis.grid(axis="y", alpha=0.3)


def _finite(value: Any) -> Any:
    """Return the value with None in place of every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _column(rows: Iterable[Row], key: str) -> list[float]:
    """Return the numbers of a column, without those that are missing."""
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: Iterable[Row], key: str) -> float | None:
    """Return the mean of a column, or None of nothing."""
    values = _column(rows, key)
    return statistics.fmean(values) if values else None


def _show(value: float | None, form: str) -> str:
    """Return the number as text, or a dash."""
    return "-" if value is None else format(value, form)
