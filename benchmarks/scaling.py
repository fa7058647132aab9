"""How does the cost of a sharpness-aware step grow, with parameters, groups and accumulation, and what is it made of?

    python benchmarks/scaling.py --picture docs/results/scaling.png
    python benchmarks/scaling.py --sizes 10M 100M 300M 1B --batch 8 --length 512 --bf16 --json scaling.json

Small Llamas of 2 million to a billion parameters race as in `benchmarks/step.py`: plain Trainer, plain + bare pass (a
two-pass method with all else free) and the methods asked for, one optimizer step each in turn. Then what SAM does
beside its two passes is timed part by part, and set in relation to one forward and backward of the same model. Runs on
a GPU if there is one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from step import FLOOR, build, config_of, data, median_interval, race, ratios_of
from torch import nn

from hf_sharp import FisherMask
from hf_sharp._engine.landscape import Landscape
from hf_sharp._engine.rounding import move_rounded_
from hf_sharp._engine.undo import Undo
from hf_sharp._engine.weights import Pool, displaced
from hf_sharp._integrations.accelerate_loop import LoopHost
from hf_sharp._tensors.vector import ParamVector, move_
from hf_sharp.recipes import report

SIZES = {  # hidden size and layers
    "2M": (128, 4),
    "10M": (256, 10),
    "20M": (512, 5),
    "100M": (1024, 7),
    "300M": (1024, 24),
    "1B": (2048, 20),
}
PARAMETERS, GROUPS, ACCUMULATION = "million parameters", "parameter groups", "micro-batches a step"


def variants(options: argparse.Namespace) -> Iterator[tuple[str, float, argparse.Namespace]]:
    """What is raced: the panel's title, the place on its axis, and the sizes."""

    def sized(size: str, **changes: Any) -> argparse.Namespace:
        shape = dict(zip(("hidden", "layers"), SIZES[size], strict=True))
        return argparse.Namespace(
            **{**vars(options), **shape, "model": "llama", "groups": 0, "accumulate": 1, **changes}
        )

    for size in options.sizes:
        entries = sum(p.numel() for p in build(sized(size)).parameters())
        yield PARAMETERS, round(entries / 1e6, 1), sized(size)
    for groups in options.groups:
        yield GROUPS, groups, sized(options.sizes[0], groups=groups)
    for accumulate in options.accumulate:
        yield ACCUMULATION, accumulate, sized(options.sizes[0], accumulate=accumulate)


def races(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every variant's race, printed as it ends."""
    found = []
    print("\n| what grows | | plain, seconds a step | method | times plain: median [95 %] |\n|---|---|---|---|---|")
    for title, place, sizes in variants(options):
        times = race(sizes, ["Trainer", FLOOR, *options.method])
        seconds = statistics.median(times["Trainer"])
        for name in (FLOOR, *options.method):
            ratios = ratios_of(times, name)
            middle, (low, high) = statistics.median(ratios), median_interval(ratios)
            found.append({"panel": title, "place": place, "method": name, "ratio": middle, "interval": [low, high]})
            print(
                f"| {title} | {place:g} | {seconds:.4f} | {name} | {middle:.3f} [{low:.3f}, {high:.3f}] |", flush=True
            )
    return found


def timed(action: Callable[[], Any], repeats: int) -> float:
    """The median time in seconds, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def parts_of(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a forward and backward, and of what SAM, FSAM and 16-bit weights do beside."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if options.bf16 else "no")
    model, device = build(options).to(accelerator.device), accelerator.device
    row = {key: value.to(device) for key, value in data(options)[0].items() if key != "sample_index"}
    batch = {key: value.expand(options.batch, *value.shape) for key, value in row.items()}
    weights = list(model.parameters())

    def forward_backward() -> None:
        model.zero_grad()
        with accelerator.autocast():
            loss = model(**batch).loss
        loss.backward()

    def shift_back() -> None:
        with displaced(weights, pool, Undo(), lambda: None):
            pass

    found, pool = {"forward and backward": timed(forward_backward, options.repeats)}, Pool()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in weights]
    model.zero_grad()
    grad, step = ParamVector(grads), ParamVector(grads).scale(1e-3).present()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    landscape = Landscape(LoopHost(model, optimizer, accelerator, lambda model, batch: model(**batch).loss))
    mask, draw = FisherMask(keep=0.1), torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        found["norm"] = timed(grad.norm, options.repeats)
        found["copy and restore"] = timed(shift_back, options.repeats)
        found["shift"] = timed(lambda: move_(weights, step), options.repeats)
        found["mask refresh (FSAM)"] = timed(lambda: mask.draw(grad, landscape), options.repeats)
        halves = [nn.Parameter(weight.bfloat16()) for weight in weights]
        found["shift of bf16 weights, rounded at random"] = timed(
            lambda: [move_rounded_(w, s, torch.bfloat16, draw) for w, s in zip(halves, step, strict=True)],
            options.repeats,
        )
    return found


def parts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts for every size, printed as milliseconds and as shares of a forward and backward."""
    found = []
    for title, place, sizes in variants(options):
        if title == PARAMETERS:
            seconds = parts_of(sizes)
            found.append({"place": place, "seconds": seconds})
            if len(found) == 1:
                print(f"\n| {PARAMETERS} | {' | '.join(seconds)} |\n{'|---' * (1 + len(seconds))}|")
            whole = seconds["forward and backward"]
            cells = (f"{1000 * s:.2f} ms" + ("" if s == whole else f" ({s / whole:.1%})") for s in seconds.values())
            print(f"| {place:g} | {' | '.join(cells)} |", flush=True)
    return found


def draw(raced: list[dict[str, Any]], measured: list[dict[str, Any]], path: Path) -> None:
    """Two pictures: the races, and the parts as shares of a forward and backward (`_parts` after the name)."""
    panels: dict[str, dict[str, list]] = {}
    for row in raced:
        lines = panels.setdefault(row["panel"], {}).setdefault(row["method"], [[]])
        lines[0].append((row["place"], row["ratio"]))
    report.curves(panels, path, "", "times a plain step", limits=(1, 3))  # so that noise looks as small as it is
    shares: dict[str, list] = {}
    for row in measured:
        whole = row["seconds"].pop("forward and backward")
        for name, seconds in row["seconds"].items():
            shares.setdefault(name, [[]])[0].append((row["place"], 100 * seconds / whole))
    beside = path.with_stem(f"{path.stem}_parts")
    report.curves({"beside the passes": shares}, beside, PARAMETERS, "% of a forward and backward")
    print(f"\nWritten: {path} and {beside}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=["sam"])
    parser.add_argument("--sizes", nargs="+", default=["2M", "10M", "20M", "100M"], choices=SIZES)
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4, 16, 39])
    parser.add_argument("--accumulate", nargs="+", type=int, default=[1, 2, 4, 8])
    for flag, default in (("batch", 4), ("length", 128), ("rounds", 10), ("repeats", 7)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--picture", type=Path, help="a PNG file for the curves; another one, for the parts, beside it"
    )
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    for name in options.method:
        config_of(name).build()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; torch {torch.__version__}, transformers {transformers.__version__}; {vars(options)}")
    raced, measured = races(options), parts(options)
    if options.json:
        report.write_json(options.json, {"device": device, "races": raced, "parts": measured})
    if options.picture:
        draw(raced, measured, options.picture)


if __name__ == "__main__":
    main()
