"""A picture of curves: a panel for each thing that was followed, a colour for each run, a thin line for each seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from hf_sharp.recipes.report.results import write_whole

Curve = Sequence[tuple[float, float]]


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    path: str | Path,
    x_label: str,
    y_label: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw curves, thin for each seed and thick for their mean where there are several.

    Args:
        panels: by the panel's title and the label of the line: a curve a seed, each of (x, y), all with the same x.
        path: the PNG file.
        x_label: below each panel.
        y_label: beside the first of each row; all share one scale.
        limits: from where to where it goes; None: as the curves need.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("The plot needs matplotlib: pip install matplotlib") from error
    columns = min(max(len(panels), 1), 4 if len(panels) % 4 == 0 else 3)
    rows = max(-(-len(panels) // columns), 1)
    figure = Figure(figsize=(1.5 + 3.6 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    axes = grid.ravel()
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for label, seeds in lines.items():
            color = f"C{labels.index(label)}"
            for curve in seeds:
                axis.plot(*zip(*curve, strict=True), color=color, linewidth=0.8, alpha=0.4 if len(seeds) > 1 else 0.0)
            mean = [(points[0][0], fmean(y for _, y in points)) for points in zip(*seeds, strict=True)]
            axis.plot(*zip(*mean, strict=True), color=color, linewidth=2, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x_label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    for first in grid[:, 0]:
        first.set_ylabel(y_label)
    if limits is not None:
        axes[0].set_ylim(*limits)
    axes[max(len(panels), 1) - 1].legend(fontsize=7, loc="best")
    write_whole(Path(path), lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
