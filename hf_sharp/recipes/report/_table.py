"""A table and a sentence over seeds, paired with a baseline seed by seed."""

import math
import statistics
from collections.abc import Iterable, Sequence

from hf_sharp.recipes.report.results import Row

BASELINE = "plain"


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
        values, seconds = column(runs.values(), "value"), _mean(runs.values(), "seconds_per_step")
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
    return grid(lines)


def grid(lines: Sequence[Sequence[str]]) -> str:
    """Set cells in columns.

    Args:
        lines: the head, and one or more lines of as many cells.

    Returns:
        Text: the first column on the left, the others on the right, a rule below the head.
    """
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


def against(rows: Iterable[Row], baseline: str = BASELINE) -> str:
    """Say in a sentence or two how all methods stand against one of them, whatever came out.

    Args:
        rows: runs of one task under one label noise, whose values are better the larger they are.
        baseline: the method that the others are compared with, seed by seed.

    Returns:
        Sentences that claim no more than the seeds show.
    """
    found = [s for s in summarise(rows, baseline) if s["difference"] is not None]
    if not found:
        return f"There is no pair of {baseline} and another method under one seed to compare."
    if any(s["interval"] is None for s in found):
        least, most = min(s["difference"] for s in found), max(s["difference"] for s in found)
        return f"Against {baseline}, one seed: differences from {least:+.3f} to {most:+.3f} are hints at most."
    groups: dict[str, list[str]] = {"better": [], "worse": [], "no difference that these seeds can show": []}
    for s in found:
        beyond = abs(s["difference"]) > s["interval"]
        name = list(groups)[2] if not beyond else "better" if s["difference"] > 0 else "worse"
        groups[name].append(f"{s['method']} ({s['difference']:+.3f})")
    said = "; ".join(f"{name}: {', '.join(methods)}" for name, methods in groups.items() if methods)
    seeds = min(s["seeds"] for s in found)
    return f"Against {baseline}, {seeds} seeds, 95 % intervals (one in twenty errs by chance): {said}."


def column(rows: Iterable[Row], key: str) -> list[float]:
    """Take the numbers of a column, without those that are missing.

    Args:
        rows: runs.
        key: the column.

    Returns:
        The numbers.
    """
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: Iterable[Row], key: str) -> float | None:
    """Return the mean of a column, or None of nothing."""
    values = column(rows, key)
    return statistics.fmean(values) if values else None


def _show(value: float | None, form: str) -> str:
    """Return the number as text, or a dash."""
    return "-" if value is None else format(value, form)
