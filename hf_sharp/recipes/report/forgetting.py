"""What is lost on one domain for what is gained on another: at equal gain, as a table and as a picture.

Whoever learns less forgets less. So two runs are compared where they have learned as much: each is evaluated several
times on its way, and the one that learned more was once as good on the new domain as the other is at its end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_sharp.recipes.report._table import column, interval
from hf_sharp.recipes.report.results import Row, write_whole

Point = Sequence[float]  # perplexity on the new domain, and on the old one


def perplexities(history: Iterable[Mapping[str, Any]], places: Sequence[str]) -> list[list[float]]:
    """Where a run stood on its way.

    Args:
        history: ``trainer.state.log_history`` of a Trainer whose ``eval_dataset`` is a dict.
        places: its keys.

    Returns:
        For each step at which all places were evaluated, the perplexity of each.
    """
    stood: dict[int, dict[str, float]] = {}
    for line in history:
        losses = {place: line[f"eval_{place}_loss"] for place in places if f"eval_{place}_loss" in line}
        stood.setdefault(line["step"], {}).update(losses)
    whole = [stood[step] for step in sorted(stood) if len(stood[step]) == len(places)]
    return [[math.exp(losses[place]) for place in places] for losses in whole]


def excess(ours: Sequence[Point], theirs: Sequence[Point]) -> float | None:
    """How much more one run had forgotten than another when it had learned as much.

    Args:
        ours: where a run stood on its way, (new, old) in the order of time.
        theirs: the other run.

    Returns:
        Our value on the old domain minus theirs, each when the run first was as good on the new domain as the one that
        learned less is at its end; straight lines are drawn between the points. Less than zero where ours forgot less.
        None if a run did not get better on the new domain.

    Example:
        >>> excess([(100, 10), (40, 25)], [(100, 10), (50, 20), (30, 40)])
        -5.0
    """
    level = max(ours[-1][0], theirs[-1][0])
    old = [_old_at(path, level) for path in (ours, theirs)]
    return None if old[0] is None or old[1] is None else old[0] - old[1]


def _old_at(path: Sequence[Point], level: float) -> float | None:
    """The value on the old domain when a run first was as good as the level on the new one."""
    for (before, old), (after, new) in pairwise(path):
        if before >= level >= after and before > after:
            return old + (new - old) * (before - level) / (before - after)
    return None


def exchange(rows: Sequence[Row], places: Sequence[str], baseline: str) -> str:
    """Print what each method gained, forgot and took, paired with the baseline seed by seed, and what it means.

    Args:
        rows: runs with ``method``, ``seed``, ``path`` (see `perplexities`), ``seconds_per_step`` and ``memory``.
        places: what the numbers of a path are of: the new domain and, if there is one, the old one.
        baseline: the method that the others are compared with.

    Returns:
        A table, with where the runs began and 95 % intervals where there are several seeds, and a sentence for each
        method.
    """
    runs: dict[str, dict[int, Row]] = {}
    for row in rows:
        runs.setdefault(row["method"], {})[row["seed"]] = row
    base = runs.get(baseline, {})
    heads = [f"{place} - {baseline}" for place in places]
    lines = [["method", "seeds", *places, *heads, "at equal gain", "ms/step", "time", "MiB", "memory"]]
    if rows:
        starts = (statistics.fmean(row["path"][0][at] for row in rows) for at in range(len(places)))
        lines.append(["before", "-", *(f"{start:.2f}" for start in starts), *"-" * (len(places) + 5)])
    said = []
    for method, own in runs.items():
        pairs = [(row["path"], base[seed]["path"]) for seed, row in own.items() if seed in base and method != baseline]
        ends = [[row["path"][-1][at] for row in own.values()] for at in range(len(places))]
        gains = [[ours[-1][at] - theirs[-1][at] for ours, theirs in pairs] for at in range(len(places))]
        found = [excess(ours, theirs) for ours, theirs in pairs] if len(places) > 1 else []
        equal = [value for value in found if value is not None]
        cells = [method, str(len(own)), *(f"{statistics.fmean(end):.2f}" for end in ends), *map(_mean, gains)]
        for key, unit in (("seconds_per_step", 1000.0), ("memory", 2.0**-20)):
            ours, theirs = column(own.values(), key), column(base.values(), key)
            cost, usual = (statistics.median(each) if each else None for each in (ours, theirs))
            shown = [f"{cost * unit:.1f}" if cost else "-", f"{cost / usual:.2f}" if cost and usual else "-"]
            cells += shown if key == "memory" else [_mean(equal), *shown]
        lines.append(cells)
        if pairs and len(places) > 1:
            said.append(_sentence(method, baseline, equal, len(pairs)))
    widths = [max(map(len, each)) for each in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join((text[0], "-" * len(text[0]), *text[1:], "Perplexities: less is better.", *said))


def _sentence(method: str, baseline: str, equal: Sequence[float], pairs: int) -> str:
    """Say what the seeds show, and no more."""
    if len(equal) < pairs:
        return f"{method}: {pairs - len(equal)} of {pairs} pairs of runs did not get better in-domain."
    half, middle = interval(equal), statistics.fmean(equal)
    if half is None:
        return f"{method}: {middle:+.2f} out-of-domain at equal gain; one seed is a hint at most."
    if abs(middle) <= half:
        return f"{method}: no difference to {baseline} at equal gain that {pairs} seeds can show ({_mean(equal)})."
    return f"{method}: forgets {'less' if middle < 0 else 'more'} than {baseline} at equal gain ({_mean(equal)})."


def _mean(values: Sequence[float]) -> str:
    """Print a mean, with half the width of its 95 % interval where there are several."""
    half = interval(values)
    return (f"{statistics.fmean(values):+.2f}" if values else "-") + (f" +/- {half:.2f}" if half is not None else "")


def plot_paths(rows: Sequence[Row], path: str | Path, places: Sequence[str]) -> None:
    """Draw how the runs moved: the new domain to the right, the old one upwards, a line a run, a dot at its end.

    Args:
        rows: runs, each with a ``method`` and a ``path`` of (new, old).
        path: the PNG file.
        places: the labels of the two axes.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("The plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for row in rows:
        color, first = f"C{methods.index(row['method'])}", row["method"] not in axis.get_legend_handles_labels()[1]
        new, old = zip(*row["path"], strict=True)
        axis.plot(new, old, color=color, alpha=0.5, linewidth=1)
        axis.plot(new[-1], old[-1], "o", color=color, markersize=6, label=row["method"] if first else None)
    axis.set_xlabel(f"perplexity {places[0]}")
    axis.set_ylabel(f"perplexity {places[1]}")
    axis.set_xscale("log")
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which(lambda value, _: f"{value:g}")  # 30, where the default writes 3 x 10^1
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    write_whole(Path(path), lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
