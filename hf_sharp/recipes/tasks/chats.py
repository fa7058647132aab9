"""Chats and instructions for supervised fine-tuning, from JSON files or the Hub."""

from pathlib import Path
from typing import Any

from hf_sharp._extras import optional
from hf_sharp.recipes.tasks.domains import HUB_TESTS, TEST_SHARE

KINDS = (("messages",), ("prompt", "completion"))


def load_chats(
    file: str | Path = "", name: str = "", config: str | None = None, test_file: str | Path = ""
) -> dict[str, Any]:
    """Read rows of ``messages``, or of ``prompt`` and ``completion``, as TRL's ``SFTTrainer`` takes them.

    Args:
        file: .json (a list of objects) or .jsonl (an object a line); if it is not given, the Hub's
        name: data set is read, whose split test or validation is the test.
        config: which of its configurations.
        test_file: what to evaluate on beside a ``file``.

    Returns:
        The ``datasets.Dataset`` of "train" and of "test"; where nothing is there to evaluate on, a tenth of the
        training rows, the same every time.

    Raises:
        ValueError: if a file cannot be read, or a row has other columns. A missing file is a ``FileNotFoundError``.
    """
    datasets = optional("datasets")
    files = {"train": str(file)} | ({"test": str(test_file)} if test_file else {})
    try:
        splits = datasets.load_dataset("json", data_files=files) if file else datasets.load_dataset(name, config)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{file or name} cannot be read: {error.__cause__ or error}") from error
    if "train" not in splits:
        raise ValueError(f"{name} has no split train; it has {', '.join(splits)}.")
    train, test = splits["train"], next((splits[key] for key in HUB_TESTS if key in splits), None)
    if test is None:
        parts = train.train_test_split(test_size=TEST_SHARE, seed=0)
        train, test = parts["train"], parts["test"]
    chosen = {"train": train, "test": test}
    for part, rows in chosen.items():
        columns = next((kind for kind in KINDS if set(kind) <= set(rows.column_names)), None)
        if columns is None:
            raise ValueError(
                f"{file or name} has no column messages, nor prompt and completion, in {part}; there are "
                f"{', '.join(rows.column_names)}."
            )
        chosen[part] = rows.select_columns(list(columns))
    return chosen


def some(rows: Any, limit: int | None) -> Any:
    """Take some rows, drawn at random but the same every time.

    Args:
        rows: a ``datasets.Dataset``.
        limit: how many at most; None for all.

    Returns:
        The rows.
    """
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=0).select(range(limit))
