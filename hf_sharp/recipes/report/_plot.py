"""A picture of the rows: a panel for each task and label noise, a dot a seed, a line at the mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sharp.recipes.report._table import BASELINE, column, summarise
from hf_sharp.recipes.report.results import Row, write_whole

COLORS = [f"C{number}" for number in range(10) if number != 7]  # the eighth of matplotlib's is the baseline's grey


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
        raise ImportError("The plot needs matplotlib: pip install matplotlib") from error
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(panel_title(row), []).append(row)
    most = max((len({row["method"] for row in group}) for group in panels.values()), default=0)
    width = max(3.6, 0.62 * most)  # so that no number runs into the next method
    figure = Figure(figsize=(1.2 + width * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (title, group) in zip(axes, panels.items(), strict=False):
        _draw(axis, title, group, baseline)
    write_whole(Path(path), lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def panel_title(row: Row) -> str:
    """Name the comparison that a row belongs to.

    Args:
        row: one run.

    Returns:
        Its task, and the label noise if there is any.
    """
    noise = row.get("label_noise") or 0.0
    return str(row.get("task", "results")) + (f", {noise:.0%} noisy training labels" if noise else "")


def _draw(axis: Any, title: str, group: Sequence[Row], baseline: str) -> None:
    """Draw one panel."""
    summaries = summarise(group, baseline)
    for place, summary in enumerate(summaries):
        values = column((row for row in group if row["method"] == summary["method"]), "value")
        color = "tab:gray" if summary["method"] == baseline else COLORS[place % len(COLORS)]
        axis.plot([place] * len(values), values, "o", color=color, alpha=0.6, markersize=5)
        if summary["mean"] is not None:
            axis.hlines(summary["mean"], place - 0.25, place + 0.25, color=color, linewidth=2.5)
            axis.annotate(f"{summary['mean']:.3f}", (place + 0.27, summary["mean"]), va="center", fontsize=8)
    if summaries[0]["majority"] is not None:
        axis.axhline(summaries[0]["majority"], color="black", linestyle="--", linewidth=0.8, label="majority class")
        axis.legend(fontsize=7, loc="best")
    names = [summary["method"] for summary in summaries]
    crowded = sum(map(len, names)) > 30
    axis.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axis.set_xlim(-0.6, len(summaries))
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(summaries[0]["metric"])
    axis.grid(axis="y", alpha=0.3)
