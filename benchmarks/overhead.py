"""What does a SAM step cost beside its two passes, when a model has many small tensors?

    python benchmarks/overhead.py
    python benchmarks/overhead.py --tensors 100 400 1600 --calls 7 100 800 --rounds 9
    PYTHONPATH=<sources of another version> python benchmarks/overhead.py    # only public names are used here

Time: a model of so many tensors of four entries each is trained by `SharpTrainer(method=sam(0.05))`, and by a Trainer
that makes every pass twice and throws the first gradient away: what a two-pass method must do, and nothing else. Each
round trains both for a few steps, one after the other, and takes the median of the process's CPU time from one step's
end to the next, the first steps left out. What SAM adds is the difference of the two. Printed are medians over the
rounds, and the quartiles of the differences. One thread, no metrics. CPU time, too, grows when other work runs beside
it: compare two versions in turns, and by their ratio.

Calls: how many Python functions of hf_sharp's files are called per micro-batch of the same training, in how many
files, and how often a call is in another file than the call before. A generator that goes on counts again; code that
has no file, such as a dataclass's `__init__`, does not. From Python 3.12 on a list comprehension is no call; so the
same Python is to be used for both versions.
"""

import argparse
import contextlib
import gc
import io
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_sharp
from hf_sharp import SharpTrainer, sam

PACKAGE = str(Path(hf_sharp.__file__).parent)
WARM_UP = 2  # steps: the first makes the optimizer's state, and what is made once


class ManyTensors(nn.Module):
    """A model of many small tensors, in which arithmetic costs next to nothing."""

    accepts_loss_kwargs = False

    def __init__(self, tensors: int):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.full((4,), 1 + i / tensors)) for i in range(tensors)])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": torch.cat(list(self.weights)).square().mean() * x.mean()}


class TwoPasses(Trainer):
    """A plain step with every pass made twice; the first gradient is thrown away."""

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        super().training_step(model, inputs, num_items_in_batch)
        for parameter in model.parameters():
            parameter.grad = None
        return super().training_step(model, inputs, num_items_in_batch)


class StepTimes(TrainerCallback):
    """CPU seconds from one step's end to the next."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.process_time())

    def median(self) -> float:
        ends = self.ends[WARM_UP - 1 :]
        return statistics.median(after - before for before, after in itertools.pairwise(ends))


class Calls(TrainerCallback):
    """The files of hf_sharp that functions were called in, call by call, over all steps but the first ones."""

    def __init__(self):
        self.files: list[str] = []
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            sys.setprofile(self._note)
        elif state.global_step > WARM_UP:
            self.steps += 1
        if state.global_step == state.max_steps:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.files.append(frame.f_code.co_filename)

    def numbers(self) -> tuple[float, int, float]:
        """Calls per step, distinct files, moves from one file to another per step."""
        moves = sum(here != before for before, here in itertools.pairwise(self.files))
        return len(self.files) / self.steps, len(set(self.files)), moves / self.steps


def train(cls: type[Trainer], tensors: int, steps: int, callback: TrainerCallback, **settings: Any) -> None:
    """Trains a new model; a step is one micro-batch of two rows."""
    rows: Any = [{"x": torch.ones(2), "labels": torch.zeros(())}] * (2 * steps)
    with tempfile.TemporaryDirectory() as folder, quiet():
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=2, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        common: dict[str, Any] = {"args": arguments, "train_dataset": rows, "callbacks": [callback]}
        cls(model=ManyTensors(tensors), **common, **settings).train()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what trainers print and say, and without a garbage collection in the middle of a step."""
    logging.disable(logging.WARNING)
    gc.collect()
    gc.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)


def added(tensors: int, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """CPU milliseconds of a step, round by round: of two bare passes, and of SAM."""
    floor, ours = [], []
    for _ in range(rounds):
        for cls, settings, found in ((TwoPasses, {}, floor), (SharpTrainer, {"method": sam(0.05)}, ours)):
            times = StepTimes()
            train(cls, tensors, steps + WARM_UP, times, **settings)
            found.append(1000 * times.median())
    return floor, ours


def count(tensors: int, steps: int = 3) -> tuple[float, int, float]:
    """Calls into hf_sharp per micro-batch of SAM, in how many files, and moves between files."""
    calls = Calls()
    train(SharpTrainer, tensors, steps + WARM_UP, calls, method=sam(0.05))
    return calls.numbers()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third; of one value three times itself."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", nargs="*", type=int, default=[100, 400, 1600], help="numbers of tensors to time")
    parser.add_argument("--calls", nargs="*", type=int, default=[7, 100, 800], help="numbers of tensors to count at")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of trainings for each number")
    parser.add_argument("--steps", type=int, default=8, help="steps of a training that are timed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"hf_sharp {hf_sharp.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| tensors | two passes, ms | SAM step, ms | added, ms | its quartiles | added per tensor, us |")
    print("|---|---|---|---|---|---|")
    for tensors in options.tensors:
        floor, ours = added(tensors, options.rounds, options.steps)
        low, middle, high = quartiles([b - a for a, b in zip(floor, ours, strict=True)])
        cells = (
            f"{statistics.median(floor):.2f} | {statistics.median(ours):.2f} | {middle:.2f} | {low:.2f} to {high:.2f}"
        )
        print(f"| {tensors} | {cells} | {1000 * middle / tensors:.1f} |", flush=True)
    print("\n| tensors | calls into hf_sharp per micro-batch | files | moves between files |")
    print("|---|---|---|---|")
    for tensors in options.calls:
        calls, files, moves = count(tensors)
        print(f"| {tensors} | {calls:,.0f} | {files} | {moves:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
