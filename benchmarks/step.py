"""What does a sharpness-aware step cost here? Time and memory of every method against the plain Trainer, on your box.

    make bench
    python benchmarks/step.py --method sam fsam --model bert --hidden 768 --layers 12 --batch 32 --length 128 --bf16
    python benchmarks/step.py --method sam sam:interval=10 looksam:every=5 sam:fraction=0.25 tram:reference=noise

A method is a preset's name, with its options after a colon. Of methods that differ from step to step look at the ratio
of totals, over rounds that are a multiple of their period.

All contenders train the same model from the same start. They take turns, one optimizer step each, in an order that is
shuffled every round, so that slow spells of the machine hit all alike; ratios are taken within a round. The floor is a
plain step plus one bare forward and backward: what a two-pass method costs if all else is free. Peers (a textbook
loop, and packages that are installed: `benchmarks/peers.py`) run in the same race. Runs on a GPU if there is one.

Memory is a peak over three steps in copies of the trainables, activations of one short row included: of what torch
allocates on a GPU, of live tensors on a CPU. With --json the ratios of every round are kept.
"""

import argparse
import functools
import gc
import json
import math
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peers import installed
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_sharp import SharpConfig, SharpTrainer
from hf_sharp._presets.names import METHODS
from hf_sharp.recipes.report import LiveTensors

FLOOR = "plain + bare pass"
ADAPTERS = ("bar", "bi_lora", "flat_lora")  # benchmarks/adapters.py measures these


class Finished(BaseException):
    """Unwinds a training loop when the measurement is over."""


class Contender(TrainerCallback, threading.Thread):
    """A training held in a thread that makes one optimizer step each time it is told to.

    Args:
        train: trains, and calls `tick` after every optimizer step of what it is given; a Trainer does as a callback.
    """

    def __init__(self, train: Callable[["Contender"], None]):
        threading.Thread.__init__(self, daemon=True)
        self.train, self.error, self.closing = train, None, False
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self):
        self.go.acquire()
        try:
            self.train(self)
        except BaseException as error:
            self.error = error
        self.done.release()

    def on_step_end(self, args, state, control, **kwargs):
        self.tick()

    def tick(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.done.release()
        self.go.acquire()
        if self.closing:
            raise Finished

    def step(self) -> float:
        start = time.perf_counter()
        self.go.release()
        self.done.acquire()
        if self.error is not None and not self.closing:
            raise self.error
        return time.perf_counter() - start

    def close(self):
        self.closing = True
        self.step()


class BarePass(Trainer):
    """A plain step with one more forward and backward, whose gradient is thrown away."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        kept = [p.grad for p in model.parameters()]
        model.zero_grad()
        super().training_step(model, inputs, num_items_in_batch)
        for parameter, grad in zip(model.parameters(), kept, strict=True):
            parameter.grad = grad
        return loss


def build(options) -> Any:
    set_seed(0)
    size = {"hidden_size": options.hidden, "num_hidden_layers": options.layers}
    size["num_attention_heads"] = max(1, options.hidden // 64)
    if options.model == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=4000, intermediate_size=options.hidden * 8 // 3, **size))
    config = BertConfig(vocab_size=8000, intermediate_size=options.hidden * 4, **size)
    model: Any = BertForSequenceClassification(config)
    model.accepts_loss_kwargs = False  # transformers#47688: the head ignores num_items_in_batch
    return model


def data(options) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(5, 4000, (options.batch * options.accumulate * (options.rounds + 10), options.length))
    causal = options.model == "llama"
    return [
        {
            "input_ids": x,
            "attention_mask": torch.ones_like(x),
            "labels": x if causal else x[0] % 2,
            "sample_index": torch.tensor(i % 64),
        }
        for i, x in enumerate(rows)
    ]


def config_of(text: str) -> SharpConfig:
    """A preset's name with options, such as `looksam:every=5,alpha=0.5`."""
    name, _, options = text.partition(":")
    pairs = (pair.split("=", 1) for pair in options.split(",") if pair)
    return SharpConfig.from_dict({"method": name} | {key: yaml.safe_load(value) for key, value in pairs})


def training_of(name: str, options, rows, folder: str) -> Callable[[Contender], None]:
    """The named contender's training."""
    peer = installed().get(name)
    if peer is not None:
        if options.accumulate > 1:
            raise SystemExit("The peers' loops know no gradient accumulation: leave them out with --no-peers.")
        return functools.partial(_hand_loop, peer, options, rows)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=options.batch, gradient_accumulation_steps=options.accumulate,
        max_steps=options.rounds + 5, optim="adamw_torch_fused", lr_scheduler_type="constant", bf16=options.bf16,
        torch_compile=options.compile, use_cpu=not torch.cuda.is_available(), report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True)  # fmt: skip

    def train(callback: Contender) -> None:
        common: dict[str, Any] = {"args": arguments, "train_dataset": rows, "callbacks": [callback]}
        common["model"] = model = build(options)
        common["optimizers"] = (_optimizer(model, options.groups), None)
        if name == "Trainer":
            Trainer(**common).train()
        else:
            (BarePass(**common) if name == FLOOR else SharpTrainer(method=config_of(name), **common)).train()

    return train


def _optimizer(model, groups: int) -> torch.optim.Optimizer | None:
    """The Trainer's own, but with so many groups; None leaves it to the Trainer."""
    weights = list(model.parameters())
    split = [{"params": weights[start::groups]} for start in range(groups)]
    return torch.optim.AdamW(split, lr=5e-5, weight_decay=0.0, fused=True) if split else None


def _hand_loop(peer, options, rows, contender: Contender) -> None:
    model = build(options).to("cuda" if torch.cuda.is_available() else "cpu")
    model = torch.compile(model) if options.compile else model
    loader = DataLoader(rows, options.batch, shuffle=True, collate_fn=default_data_collator)
    adamw = {"lr": 5e-5, "weight_decay": 0.0, "fused": True}  # what the Trainer's arguments give
    peer(model, loader, adamw, torch.bfloat16 if options.bf16 else None, contender.tick)


def race(options, names: list[str]) -> dict[str, list[float]]:
    rows = data(options)
    with tempfile.TemporaryDirectory() as folder:
        held = {name: Contender(training_of(name, options, rows, folder)) for name in names}
        times = {name: [] for name in names}
        order = list(names)
        for _ in range(options.rounds + 3):
            random.shuffle(order)
            for name in order:
                times[name].append(held[name].step())
        for contender in held.values():
            contender.close()
    return {name: values[3:] for name, values in times.items()}


def peak_memory(name: str, options) -> float:
    """Peak memory of three steps alone after a first one, in copies of the trainables."""
    small = argparse.Namespace(**{**vars(options), "batch": 1, "length": 8, "rounds": 4})
    live, cuda = LiveTensors(), torch.cuda.is_available()
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        train = training_of(name, small, data(small), folder)

        def watched(contender: Contender) -> None:
            with nullcontext() if cuda else live:
                train(contender)

        contender = Contender(watched)
        contender.step()
        live.peak = live.now
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            contender.step()
        contender.close()
        contender.join()
    peak = torch.cuda.max_memory_allocated() if cuda else live.peak
    return peak / sum(4 * p.numel() for p in build(options).parameters())


def ratios_of(times: dict[str, list[float]], name: str) -> list[float]:
    """Step times over the plain Trainer's of the same round."""
    return [a / b for a, b in zip(times[name], times["Trainer"], strict=True)]


def median_interval(values: list[float]) -> tuple[float, float]:
    """An interval of at least 95 % for the median, from order statistics."""
    ranked, count = sorted(values), len(values)
    tail, below = 0.5**count, 0
    while tail <= 0.025 and below < count // 2:
        below += 1
        tail += math.comb(count, below) * 0.5**count
    return ranked[max(below - 1, 0)], ranked[count - max(below, 1)]


def report(times: dict[str, list[float]], options) -> None:
    memory = {name: "" if name == FLOOR else f"{peak_memory(name, options):.2f}" for name in times}
    print("\n| method | seconds a step | times plain: median [95 %] (min, max) | of totals | passes | peak memory |")
    print("|---|---|---|---|---|---|")
    for name, values in times.items():
        ratios = ratios_of(times, name)
        known = {"Trainer": "1", FLOOR: "2"} | dict.fromkeys(installed(), "2")
        passes = known.get(name) or f"{config_of(name).build().cost:.3g}"
        low, high = median_interval(ratios)
        spread = f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}] ({min(ratios):.3f}, {max(ratios):.3f})"
        total = sum(values) / sum(times["Trainer"])
        print(f"| {name} | {statistics.median(values):.4f} | {spread} | {total:.3f} | {passes} | {memory[name]} |")


def compare(times: dict[str, list[float]]) -> None:
    """Ours against each peer, round by round."""
    for peer in (name for name in installed() if name in times and "sam" in times):
        ratios = [a / b for a, b in zip(times["sam"], times[peer], strict=True)]
        low, high = median_interval(ratios)
        verdict = "faster" if high < 1 else "slower" if low > 1 else "no difference can be told"
        print(f"sam over {peer}: {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}], {verdict}.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=[n for n in METHODS if n not in ADAPTERS])
    parser.add_argument("--model", choices=("bert", "llama"), default="bert")
    for flag, default in (
        ("hidden", 128),
        ("layers", 4),
        ("batch", 16),
        ("length", 64),
        ("accumulate", 1),
        ("groups", 0),
        ("rounds", 20),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--json", type=Path, help="a file for the ratios of every round")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    for name in options.method:
        config_of(name).build()
    peers = list(installed()) if options.peers and options.accumulate == 1 and not options.groups else []
    times = race(options, ["Trainer", FLOOR, *options.method, *peers])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{device}; torch {torch.__version__}, transformers {transformers.__version__}; {vars(options)}")
    report(times, options)
    print()
    compare(times)
    if options.json:
        kept = {name: ratios_of(times, name) for name in times}
        options.json.write_text(json.dumps({"device": device, "options": str(vars(options)), "ratios": kept}))


if __name__ == "__main__":
    main()
