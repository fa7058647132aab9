"""Kills training with SIGKILL at random moments, resumes it, and compares it bit by bit with a run that nobody killed.

    python tests/soak/kill_and_resume.py --kills 50

Half of the kills fall anywhere between the start of a process and some steps later; the other half are
aimed at saves: the process says when one begins, and is killed a random time after, up to a little more than a save
takes. Which it hits is counted. Where training ends before the kills are used up, it begins again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    TESTS = Path(__file__).parents[1]
    sys.path[:0] = [str(TESTS / "helpers"), str(TESTS), str(TESTS.parent)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from cases import METHODS
from hf_sharp import SharpTrainer, last_complete_checkpoint
from models import text_rows, tiny_bert
from training import build

START, SAVE, SAVED = b"t", b"s", b"d"  # what a training process says through its pipe


def train(folder: Path, name: str, steps: int, say: int) -> None:
    """One life of a training: from the last complete checkpoint to the end, unless it is killed before."""

    class Telling(SharpTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            os.write(say, SAVE)
            super()._save_checkpoint(*args, **kwargs)
            os.write(say, SAVED)

    class Tell(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            os.write(say, START)

    set_seed(7)
    torch.use_deterministic_algorithms(True)
    model = tiny_bert(dropout=0.1)
    model.accepts_loss_kwargs = False
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": steps}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "warmup_steps": 3}
    settings |= {"train_sampling_strategy": "random", "learning_rate": 1e-3, "optim": "adamw_torch"}
    trainer: Any = build(
        Telling, model, text_rows(30), folder, method=METHODS[name].method(), callbacks=[Tell()], **settings
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))


def is_through(folder: Path, steps: int) -> bool:
    """Whether the last step is saved: the Trainer, asked to go on from there, may make a step more."""
    return last_complete_checkpoint(folder) == str(folder / f"checkpoint-{steps}")


def last_state(folder: Path, steps: int) -> dict[str, Any]:
    """All that the last checkpoint holds of the training: what a next step would start from, and the logs."""
    last = folder / f"checkpoint-{steps}"
    names = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "streams": "rng_state.pth"}
    state = {key: torch.load(last / name, weights_only=key != "streams") for key, name in names.items()}
    with safe_open(last / "sharp_state.safetensors", "pt") as file:
        state["method"] = {"numbers": file.metadata(), **{key: file.get_tensor(key) for key in file.keys()}}
    state["logs"] = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return state | {"weights": load_file(last / "model.safetensors")}


class Life:
    """A process that trains, and the pipe through which it says what it does.

    Args:
        folder: of the checkpoints.
        name: of the method.
        steps: how many there are from the first life to the end of the last.
    """

    def __init__(self, folder: Path, name: str, steps: int):
        self.listen, say = os.pipe()
        self.pid = os.fork()  # after all imports: a life begins in milliseconds
        if self.pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                train(folder, name, steps, say)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(say)

    def heard(self) -> Iterator[bytes]:
        """What it says, when it says it, until it ends."""
        while said := os.read(self.listen, 1):
            yield said

    def end(self, kill: bool) -> tuple[bool, bytes]:
        """Kill it or wait for it.

        Returns:
            Whether it was killed, and what it said since it was last listened to.
        """
        if kill:
            os.kill(self.pid, signal.SIGKILL)  # of a process that has ended and was not yet waited for: no effect
        last = b"".join(self.heard())
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.listen)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise SystemExit("A life of the training failed; what it says stands above.")
        return os.WIFSIGNALED(status), last


@dataclass
class Pace:
    """Seconds that the uninterrupted run took: to its first step, from save to save, and for a save."""

    start: float = 0.0
    between: float = 0.0
    saves: list[float] = field(default_factory=list)

    @property
    def save(self) -> float:
        return sorted(self.saves)[len(self.saves) // 2]


def uninterrupted(folder: Path, name: str, steps: int) -> Pace:
    pace, began, at = Pace(), time.perf_counter(), 0.0
    life = Life(folder, name, steps)
    for said in life.heard():
        now = time.perf_counter()
        if said == START:
            pace.start = now - began
        elif said == SAVED:
            pace.saves.append(now - at)
        at = now
    pace.between = (time.perf_counter() - began - pace.start) / len(pace.saves)
    life.end(kill=False)
    return pace


def killed_life(folder: Path, name: str, steps: int, pace: Pace, draw: random.Random) -> tuple[bool, bool]:
    """One life that ends by a kill, unless it is through before.

    Returns:
        Whether it was killed, and whether that was in the middle of a save.
    """
    life, said = Life(folder, name, steps), b""
    if draw.random() < 0.5:
        delay = draw.uniform(0, pace.start + 4 * pace.between)
    else:
        delay, saves = draw.uniform(0, 1.2 * pace.save), draw.choice((1, 2, 3))
        for said in life.heard():
            saves -= said == SAVE
            if not saves:
                break
    time.sleep(delay)
    killed, last = life.end(kill=True)
    return killed, killed and (said + last).endswith(SAVE)


def leaves(thing: Any, path: str = "") -> Iterator[tuple[str, bytes]]:
    """All numbers, strings and tensors in nested dicts and lists, each with its path and its bytes."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(thing, list | tuple):
        for index, value in enumerate(thing):
            yield from leaves(value, f"{path}/{index}")
    elif isinstance(thing, torch.Tensor | numpy.ndarray):
        thing = torch.as_tensor(thing)
        kind = f"{thing.dtype} {tuple(thing.shape)} ".encode()
        yield path, kind + thing.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield path, repr(thing).encode()  # of a float it names every bit


def differing_bits(mine: Any, other: Any) -> tuple[dict[str, int], int]:
    """How many bits differ in two nested structures, by the path of what holds them, and how many there are in all."""
    first, second = dict(leaves(mine)), dict(leaves(other))
    differing, total = {}, 0
    for path in sorted(first.keys() | second.keys()):
        a, b = first.get(path, b""), second.get(path, b"")
        size = 8 * max(len(a), len(b))
        total += size
        if a != b:
            apart = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
            differing[path] = apart.bit_count() if len(a) == len(b) else size
    return differing, total


COUNTED = ("runs", "kills", "resumes", "saves", "half", "bits", "of")


def soak(name: str, kills: int, steps: int, seed: int) -> dict[str, int]:
    """As many kills as asked for, in as many runs as they fit into.

    Returns:
        The numbers of runs, kills, lives that began from a checkpoint, kills inside a save, lives after which the
        newest directory was half-written, bits that differ, and bits compared.
    """
    draw, count = random.Random(f"{seed} {name}"), dict.fromkeys(COUNTED, 0)
    with tempfile.TemporaryDirectory() as temporary:
        pace = uninterrupted(Path(temporary), name, steps)
        whole = last_state(Path(temporary), steps)
    while count["kills"] < kills:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            while not is_through(folder, steps):
                count["resumes"] += last_complete_checkpoint(folder) is not None
                if count["kills"] == kills:
                    Life(folder, name, steps).end(kill=False)
                    break
                killed, saving = killed_life(folder, name, steps, pace, draw)
                count["kills"], count["saves"] = count["kills"] + killed, count["saves"] + saving
                count["half"] += get_last_checkpoint(temporary) != last_complete_checkpoint(temporary)
            differing, of = differing_bits(last_state(folder, steps), whole)
        if differing:
            print(f"{name}, run {count['runs']}, bits that differ: {differing}", flush=True)
        count["runs"], count["of"] = count["runs"] + 1, count["of"] + of
        count["bits"] += sum(differing.values())
    return count


def report(name: str, count: dict[str, int]) -> str:
    return (
        f"{name}: {count['kills']} kills in {count['runs']} runs, {count['saves']} of them in the middle of a save; "
        f"{count['resumes']} times resumed, {count['half']} times past a half-written checkpoint; "
        f"{count['bits']} of {count['of']} bits differ"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each method")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        default=["fsam", "looksam", "friendly_sam", "tram_previous", "mesa"],
        help="rows of tests/helpers/cases.py",
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    total: dict[str, int] = {}
    for name in args.methods:
        count = soak(name, args.kills, args.steps, args.seed)
        print(report(name, count), flush=True)
        total = {key: value + total.get(key, 0) for key, value in count.items()}
    print(report("all", total))
    raise SystemExit(1 if total["bits"] else 0)


if __name__ == "__main__":
    main()
