"""The checkpoint to resume from after a training was killed, which may have been in the middle of a save."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

PREFIX, STATE, RANDOM = "checkpoint-", "trainer_state.json", "rng_state*.pth"


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a Trainer that was written to its end.

    `get_last_checkpoint` of Transformers, and with it `resume_from_checkpoint=True`, takes the directory with the
    highest number. A process that is killed while it saves leaves that one half-written, and resuming from it ends in
    an error about a missing or broken file. The Trainer writes `trainer_state.json` last: where it is whole, so are
    the files of the process that wrote it. With several processes the others write their random state at the same
    time; such a file is looked at too, if it is there.

    Half-written directories stay where they are; the Trainer writes over them when it comes to that step again.

    Args:
        folder: the `output_dir` of the arguments; it need not exist.

    Returns:
        The path, to give to `Trainer.train(resume_from_checkpoint=...)`; None if there is nothing to resume from,
        which for `train` means to start afresh.

    Example:
        >>> last_complete_checkpoint("a folder that is not there") is None
        True
    """
    steps = {}
    for path in Path(folder).glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if number.isdecimal() and _is_complete(path):
            steps[int(number)] = path
    return str(steps[max(steps)]) if steps else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # JSON and text that break off are ValueErrors
        return False
    return all(zipfile.is_zipfile(file) for file in checkpoint.glob(RANDOM))  # their directory stands at the end
