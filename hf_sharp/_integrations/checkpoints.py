"""The checkpoint to resume from after a training was killed, which may have been in the middle of a save."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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


def read_state(path: Path, device: str) -> dict[str, Any]:
    """A method's state as a checkpoint has it.

    Args:
        path: the file.
        device: where to put the tensors.

    Returns:
        Tensors and numbers by name.

    Raises:
        ValueError: if the file is broken.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            numbers = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if ":" in key}
            # Copied, since what `get_tensor` gives on the CPU is a window on the file: it would change with the file.
            return {**numbers, **{key: file.get_tensor(key).clone() for key in file.keys()}}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Resume from another checkpoint.") from error
