"""Tables and pictures of the grid that `benchmarks/unlearning.py` has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_sharp.recipes import report

Line = Mapping[str, Any]
BEFORE, GOLD, NONE, LONGER = "before", "never knew", "none", "none, 1.5 x steps"
SAME_COMPUTE = ("sam", "gp")  # three passes of half batches a step, as LONGER has
PICKS = {
    "forget": ("forget", "probability"),
    "NLL": ("forget", "nll"),
    "accuracy": ("forget", "token_accuracy"),
    "ROUGE": ("rouge",),
    "8 bits": ("8 bits", "probability"),
    "4 bits": ("4 bits", "probability"),
    "retain": ("retain", "probability"),
}


def show(
    lines: Sequence[Line], objectives: Mapping[str, Any], order: Sequence[str], attacks: Sequence[str], work: Path
) -> None:
    """Print the tables and draw the curves of every objective.

    Args:
        lines: the numbers, a line a cell and attack.
        objectives: their settings by name.
        order: of the smoothings.
        attacks: in the order of the columns; those without a line are left out.
        work: where the pictures go.
    """
    attacks = [attack for attack in attacks if any(line["attack"] == attack for line in lines)]
    for objective in dict.fromkeys(line["objective"] for line in lines if line["objective"]):
        rows = [line for line in lines if line["objective"] in (objective, "")]
        rows = sorted(rows, key=lambda row: order.index(row["smoothing"]))
        smoothings = list(dict.fromkeys(row["smoothing"] for row in rows))
        print(f"\n{objective}: {objectives[objective]!r}\n\nAfter unlearning:\n")
        _print("smoothing", ["seeds", *PICKS], {name: _state(rows, name) for name in smoothings})
        for which in ("untouched", "same person"):
            print(f"\nThe most that came back of the {which} rows, (minus {NONE}, 95 % interval over seeds):\n")
            _print("smoothing", attacks, {n: _gains(rows, n, attacks, which, NONE) for n in smoothings})
        equal = [name for name in SAME_COMPUTE if name in smoothings and LONGER in smoothings]
        if equal:
            print(f"\nThe same of the untouched rows (minus {LONGER}, which is of the same compute):\n")
            _print("smoothing", attacks, {n: _gains(rows, n, attacks, "untouched", LONGER) for n in equal})
        print("\nProbability of the relearned rows at the end:\n")
        _print("smoothing", attacks, {n: [_ends(rows, n, attack) for attack in attacks] for n in smoothings})
        panels: dict[str, dict[str, list]] = {attack: {} for attack in attacks}
        for row in (row for row in rows if row["attack"] and row["smoothing"] != BEFORE):  # far above all others
            start = row["curve"][0]["untouched_probability"]
            curve = [(record["step"], record["untouched_probability"] - start) for record in row["curve"]]
            panels[row["attack"]].setdefault(row["smoothing"], []).append(curve)
        path = work / f"{objective}.png"
        report.curves(panels, path, "steps of relearning", "gain in probability, untouched rows")
        print(f"\nWritten: {path}")


def _print(first: str, heads: Sequence[str], lines: Mapping[str, Sequence[str]]) -> None:
    print(f"| {' | '.join([first, *heads])} |\n{'|---' * (1 + len(heads))}|")
    for name, cells in lines.items():
        print(f"| {' | '.join([name, *cells])} |")


def _state(rows: Sequence[Line], smoothing: str) -> list[str]:
    own = [row for row in rows if row["smoothing"] == smoothing and not row["attack"]]
    cells = [str(len(own))]
    for path in PICKS.values():
        values: list[Any] = list(own)
        for step in path:
            values = [value[step] for value in values]
        cells.append(f"{fmean(values):.3f}" if values else "-")
    return cells


def _attacked(rows: Sequence[Line], smoothing: str, attack: str, which: str) -> dict[int, list[float]]:
    """The probabilities on the way of an attack, by seed."""
    chosen = [row for row in rows if (row["smoothing"], row["attack"]) == (smoothing, attack)]
    key = f"{which}_probability"
    return {row["seed"]: [record[key] for record in row["curve"]] for row in chosen if key in row["curve"][0]}


def _gains(rows: Sequence[Line], smoothing: str, attacks: Sequence[str], which: str, base: str) -> list[str]:
    """By attack: the highest probability on the way minus that at its start, and the paired difference to a base."""
    cells = []
    for attack in attacks:
        ours, theirs = (
            {seed: max(values) - values[0] for seed, values in _attacked(rows, name, attack, which).items()}
            for name in (smoothing, base)
        )
        paired = [gain - theirs[seed] for seed, gain in ours.items() if seed in theirs]
        half = report.interval(paired)
        compared = half is not None and smoothing not in (base, BEFORE, GOLD)
        shown = f"{fmean(ours.values()):.3f}" if ours else "-"
        cells.append(shown + (f" ({fmean(paired):+.3f} +/- {half:.3f})" if compared else ""))
    return cells


def _ends(rows: Sequence[Line], smoothing: str, attack: str) -> str:
    ends = [values[-1] for values in _attacked(rows, smoothing, attack, "relearned").values()]
    return f"{fmean(ends):.3f}" if ends else "-"
