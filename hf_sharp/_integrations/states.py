"""What a checkpoint holds of a method: the same in every integration, and compared with the model when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_sharp._engine.landscape import Landscape
from hf_sharp._integrations.attachment import Attachment
from hf_sharp._methods.base import Method
from hf_sharp._perturbation.kept import UnfitState
from hf_sharp._tensors.shards import gathered


def state_of(method: Method, attachment: Attachment) -> dict[str, Any]:
    """All that a method keeps from step to step; of sharded tensors all, so that every rank must call this.

    Args:
        method: the method.
        attachment: what it has in the optimizer.

    Returns:
        A flat dict of numbers and tensors.
    """
    return gathered(method.state_dict()) | method.state_sizes() | attachment.state_dict()


def load_state(state: Mapping[str, Any], method: Method, attachment: Attachment, landscape: Landscape) -> None:
    """Go on from what `state_of` returned, after it was compared with the model.

    Nothing is taken of a state that does not fit, which is a ValueError that names what does not, and the way out.

    Args:
        state: the flat dict.
        method: the method.
        attachment: what it has in the optimizer.
        landscape: the model's landscape, without data.
    """
    attachment.check(state)
    method.load_state_dict(attachment.without(state), landscape)
    attachment.load_state_dict(state)
    if landscape.facts.sharded:
        method.spread_state(landscape)


def step_of(state: dict[str, Any]) -> int:
    """Take the number of the step out of a state.

    Args:
        state: the flat dict, which loses it.

    Returns:
        The number, 0 where there is none.

    Raises:
        UnfitState: if it is no number of a step.
    """
    step = state.pop("step", 0)
    if type(step) is not int or step < 0:
        raise UnfitState(f"'step' is {step!r:.80}, and no number of steps")
    return step


def read_state(path: Path, device: str) -> dict[str, Any]:
    """The state in a file of the Trainer's. Nothing in it is executed: it holds tensors, and numbers as JSON.

    Args:
        path: the file.
        device: where the tensors are to be.

    Returns:
        The flat dict.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            numbers = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if ":" in key}
            # Copied, since what `get_tensor` gives on the CPU is a window on the file: it would change with the file.
            return {**numbers, **{key: file.get_tensor(key).clone() for key in file.keys()}}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Resume from another checkpoint.") from error
