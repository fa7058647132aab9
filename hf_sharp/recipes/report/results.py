"""Rows in ``results.json``, one a finished run, and the settings that all rows of a folder share.

A row is a dict with at least the keys of ``REQUIRED``. Rows are only ever added: what a file holds is kept, and a run
that is there already under the same ``KEY`` is not written over.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

REQUIRED = ("method", "seed", "metric", "value", "majority", "seconds_per_step", "passes")
KEY = ("recipe", "task", "model", "method", "label_noise", "epochs", "seed")
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
    write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


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


def _finite(value: Any) -> Any:
    """Return the value with None in place of every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in its place.

    Args:
        path: the file; its folder is made.
        write: writes to the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
