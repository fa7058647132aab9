"""The nine GLUE tasks: where their columns and labels are, and how to read them from the Hub or from a folder.

The folder has the official layout, one tab-separated file a split. Quoting is off in these files: a quotation mark is
a letter of the sentence, so they must not be read with a CSV reader's defaults.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sharp._extras import optional

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
# Official files hold a few rows that break off early (QQP). More than this share means that it is another format.
MOST_BROKEN = 0.01


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE: the Hub's names beside those of the official files.

    Args:
        name: its name on the Hub and on the command line.
        folder: its folder in the official download.
        texts: the one or two text columns, as they are called on the Hub.
        labels: names of the classes in the order of their ids; empty for a score to predict.
        metric: which official metric it has: ``accuracy``, ``accuracy_and_f1``, ``matthews`` or ``correlation``.
        main_metric: the number of that metric that stands for the task in one column.
        tsv_texts: heading of each text column in the official files.
        tsv_label: heading of the label column there.
        tsv_codes: how the classes are written there, in the order of their ids.
        tsv_header: the columns of a file without a heading, else empty.
        evaluation: names of the evaluation splits, by the name of their file.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    main_metric: str
    tsv_texts: tuple[str, ...]
    tsv_label: str
    tsv_codes: tuple[str, ...]
    tsv_header: tuple[str, ...] = ()
    evaluation: tuple[tuple[str, str], ...] = (("dev", "validation"),)

    @property
    def splits(self) -> dict[str, str]:
        """The splits with labels: name of the file without its ending, and name of the split."""
        return {"train": "train", **dict(self.evaluation)}


_PAIR = ("sentence1", "sentence2")
_YES_NO = ("entailment", "not_entailment")
_BITS = ("0", "1")
_NLI = ("entailment", "neutral", "contradiction")
_MNLI_SPLITS = (("dev_matched", "validation_matched"), ("dev_mismatched", "validation_mismatched"))
_TASKS = (
    GlueTask("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), "matthews", "matthews_correlation",
             ("sentence",), "label", _BITS, tsv_header=("source", "label", "star", "sentence")),
    GlueTask("mrpc", "MRPC", _PAIR, ("not_equivalent", "equivalent"), "accuracy_and_f1", "accuracy",
             ("#1 String", "#2 String"), "Quality", _BITS),
    GlueTask("rte", "RTE", _PAIR, _YES_NO, "accuracy", "accuracy", _PAIR, "label", _YES_NO),
    GlueTask("sst2", "SST-2", ("sentence",), ("negative", "positive"), "accuracy", "accuracy",
             ("sentence",), "label", _BITS),
    GlueTask("stsb", "STS-B", _PAIR, (), "correlation", "pearson", _PAIR, "score", ()),
    GlueTask("qnli", "QNLI", ("question", "sentence"), _YES_NO, "accuracy", "accuracy",
             ("question", "sentence"), "label", _YES_NO),
    GlueTask("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy_and_f1", "accuracy",
             ("question1", "question2"), "is_duplicate", _BITS),
    GlueTask("mnli", "MNLI", ("premise", "hypothesis"), _NLI, "accuracy", "accuracy",
             _PAIR, "gold_label", _NLI, evaluation=_MNLI_SPLITS),
    GlueTask("wnli", "WNLI", _PAIR, ("not_entailment", "entailment"), "accuracy", "accuracy", _PAIR, "label", _BITS),
)  # fmt: skip
GLUE: dict[str, GlueTask] = {task.name: task for task in _TASKS}


def load_glue(
    task: str,
    data_dir: str | Path | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> "DatasetDict":
    """Load the training and evaluation splits of one task, under the Hub's column names.

    Args:
        task: one of ``GLUE``.
        data_dir: folder in the official layout: either the task's own folder or the one that holds it; None loads
            ``nyu-mll/glue`` from the Hub.
        cache_dir: where the Hub's files are kept.
        token: for the Hub.

    Returns:
        The splits, with the task's text columns and ``label``: a class id, or a float for STS-B.

    Raises:
        ValueError: if there is no such task.
    """
    if task not in GLUE:
        raise ValueError(f"Unknown GLUE task {task!r}. Known: {', '.join(GLUE)}.")
    datasets, spec = optional("datasets"), GLUE[task]
    if data_dir is None:
        loaded = datasets.load_dataset(HUB_DATASET, task, cache_dir=cache_dir, token=token)
        return datasets.DatasetDict({split: loaded[split] for split in spec.splits.values()})
    folder = task_folder(spec, Path(data_dir))
    return datasets.DatasetDict(
        {split: _read_split(spec, folder / f"{file}.tsv") for file, split in spec.splits.items()}
    )


def tokenize(
    split: "Dataset",
    columns: tuple[str, ...],
    limit: int | None,
    tokenizer: Any,
    max_length: int,
    pad: bool = False,
    anew: bool = False,
) -> "Dataset":
    """Turn texts into tokens; padding waits for the batch, unless it is asked for.

    Args:
        split: rows with the columns and ``label``.
        columns: one text or a pair.
        limit: keep the first so many rows; None keeps all.
        tokenizer: of the model.
        max_length: in tokens; what is longer is cut off, as is what is longer than the model allows.
        pad: fill up to that length.
        anew: do it again though a cache has it.

    Returns:
        The rows with tokens in place of the texts.
    """
    split = split if limit is None else split.select(range(min(limit, len(split))))
    length, padding = min(max_length, tokenizer.model_max_length), "max_length" if pad else False
    return split.map(
        lambda rows: tokenizer(*map(rows.get, columns), padding=padding, truncation=True, max_length=length),
        batched=True,
        remove_columns=[name for name in split.column_names if name != "label"],
        load_from_cache_file=not anew,
        desc="Tokenizing",
    )


def task_folder(task: GlueTask, data_dir: Path) -> Path:
    """Find the folder of a task.

    Args:
        task: the task.
        data_dir: the task's folder or the one above it.

    Returns:
        The folder that holds ``train.tsv``.

    Raises:
        FileNotFoundError: if neither holds it.
    """
    for folder in (data_dir / task.folder, data_dir):
        if (folder / "train.tsv").is_file():
            return folder
    raise FileNotFoundError(
        f"No {task.folder} data: neither {data_dir / task.folder / 'train.tsv'} nor {data_dir / 'train.tsv'} exists. "
        f"Expected the official GLUE layout: {', '.join(f'{file}.tsv' for file in task.splits)}."
    )


def _read_split(task: GlueTask, file: Path) -> "Dataset":
    """Read one file into a data set with the Hub's column names and label types."""
    columns: dict[str, list[Any]] = {name: [] for name in (*task.texts, "label")}
    for line, row in _rows(task, file):
        for name, heading in zip(task.texts, task.tsv_texts, strict=True):
            columns[name].append(row[heading])
        columns["label"].append(_label(task, row[task.tsv_label], file, line))
    if not columns["label"]:
        raise ValueError(f"{file} holds no rows.")
    return optional("datasets").Dataset.from_dict(columns, features=_features(task))


def _rows(task: GlueTask, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number and the cells of each line, by heading; lines that break off early are dropped and counted."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing. {task.folder} needs {', '.join(f'{name}.tsv' for name in task.splits)}."
        )
    with file.open(encoding="utf-8-sig", newline="\n") as stream:  # only a line feed ends a row; MRPC opens with a BOM
        lines = [line.rstrip("\r\n").split("\t") for line in stream]
    header = list(task.tsv_header) or (lines[0] if lines else [])
    first = 0 if task.tsv_header else 1
    needed = [*task.tsv_texts, task.tsv_label]
    missing = [heading for heading in needed if heading not in header]
    if missing:
        raise ValueError(
            f"{file} has no column {', '.join(map(repr, missing))}. Expected a tab-separated file whose first line "
            f"names {', '.join(map(repr, needed))}; it names {', '.join(map(repr, header[:12]))}."
        )
    places = {heading: header.index(heading) for heading in needed}
    last, broken = max(places.values()), []
    for number, cells in enumerate(lines[first:], start=first + 1):
        if len(cells) > last:
            yield number, {heading: cells[place] for heading, place in places.items()}
        else:
            broken.append(number)
    if len(broken) > MOST_BROKEN * max(len(lines) - first, 1):
        expected = f"{len(header)} tab-separated columns ({', '.join(header)})"
        raise ValueError(f"{file}, line {broken[0]} and {len(broken) - 1} more: expected {expected}.")
    if broken:
        logger.warning("%s: %d lines break off early and are left out, the first is %d.", file, len(broken), broken[0])


def _label(task: GlueTask, cell: str, file: Path, line: int) -> int | float:
    """Turn a cell into a class id or a score."""
    if task.labels:
        if cell in task.tsv_codes:
            return task.tsv_codes.index(cell)
        expected = " or ".join(map(repr, task.tsv_codes))
    else:
        try:
            score = float(cell)
        except ValueError:
            score = float("nan")
        if 0 <= score <= 5:
            return score
        expected = "a number from 0 to 5"
    raise ValueError(f"{file}, line {line}: unknown label {cell!r} in column {task.tsv_label!r}; expected {expected}.")


def _features(task: GlueTask) -> "Features":
    """Give the columns the types that the Hub's data set has."""
    datasets = optional("datasets")
    label = datasets.ClassLabel(names=list(task.labels)) if task.labels else datasets.Value("float32")
    return datasets.Features({**{name: datasets.Value("string") for name in task.texts}, "label": label})
