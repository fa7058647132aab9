"""What does a sharpness-aware step cost here? Time and memory of every method against the plain Trainer, on your box.

    make bench
    python benchmarks/step.py --method sam fsam --model bert --hidden 768 --layers 12 --batch 32 --length 128 --bf16
    python benchmarks/step.py --method sam sam:interval=10 looksam:every=5 sam:fraction=0.25 tram:reference=noise

A method is a preset's name, with its options after a colon. Of methods that differ from step to step look at the ratio
of totals, over rounds that are a multiple of their period.

All contenders train the same model from the same start. They take turns, one optimizer step each, in an order that is
shuffled every round, so that slow spells of the machine hit all alike; ratios are taken within a round. The floor is a
plain step plus one bare forward and backward: what a two-pass method costs if all else is free. Runs on a GPU if there
is one. Memory is the peak of what torch allocates: exact on a GPU; on a CPU it is left out.
"""

import argparse
import random
import statistics
import tempfile
import threading
import time
from typing import Any

import torch
import transformers
import yaml
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_sharp import SharpConfig, SharpTrainer
from hf_sharp.config import METHODS

FLOOR = "plain + bare pass"


class Finished(BaseException):
    """Unwinds a training loop when the measurement is over."""


class Contender(TrainerCallback, threading.Thread):
    """A training held in a thread that makes one optimizer step each time it is told to."""

    def __init__(self, trainer_of):
        threading.Thread.__init__(self, daemon=True)
        self.trainer_of, self.error, self.closing = trainer_of, None, False
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self):
        self.go.acquire()
        try:
            self.trainer_of(self).train()
        except BaseException as error:
            self.error = error
        self.done.release()

    def on_step_end(self, args, state, control, **kwargs):
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


def trainer_for(name: str, options, rows, folder: str):
    """A function that makes the named contender's Trainer for a callback."""
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=options.batch, gradient_accumulation_steps=options.accumulate,
        max_steps=options.rounds + 5, optim="adamw_torch_fused", lr_scheduler_type="constant", bf16=options.bf16,
        torch_compile=options.compile, use_cpu=not torch.cuda.is_available(), report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True)  # fmt: skip

    def make(callback):
        common = {"model": build(options), "args": arguments, "train_dataset": rows, "callbacks": [callback]}
        if name == "Trainer":
            return Trainer(**common)
        return BarePass(**common) if name == FLOOR else SharpTrainer(method=config_of(name), **common)

    return make


def race(options) -> dict[str, list[float]]:
    rows, names = data(options), ["Trainer", FLOOR, *options.method]
    with tempfile.TemporaryDirectory() as folder:
        held = {name: Contender(trainer_for(name, options, rows, folder)) for name in names}
        times = {name: [] for name in names}
        order = list(names)
        for _ in range(options.rounds + 3):
            random.shuffle(order)
            for name in order:
                times[name].append(held[name].step())
        for contender in held.values():
            contender.close()
    return {name: values[3:] for name, values in times.items()}


def peak_memory(name: str, options) -> float | None:
    """Peak memory of three steps alone, in float32 copies of the trainables; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    with tempfile.TemporaryDirectory() as folder:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        contender = Contender(trainer_for(name, options, data(options), folder))
        for _ in range(3):
            contender.step()
        contender.close()
    return torch.cuda.max_memory_allocated() / sum(4 * p.numel() for p in build(options).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=list(METHODS))
    parser.add_argument("--model", choices=("bert", "llama"), default="bert")
    for flag, default in (
        ("hidden", 128),
        ("layers", 4),
        ("batch", 16),
        ("length", 64),
        ("accumulate", 1),
        ("rounds", 20),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for name in options.method:
        config_of(name).build()
    times = race(options)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{device}; torch {torch.__version__}, transformers {transformers.__version__}; {vars(options)}\n")
    print("| method | seconds a step | times plain: median (min, max) | of totals | passes | peak memory, copies |")
    print("|---|---|---|---|---|---|")
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["Trainer"], strict=True))
        passes = {"Trainer": "1", FLOOR: "2"}.get(name) or f"{config_of(name).build().cost:.3g}"
        total = sum(values) / sum(times["Trainer"])
        memory = peak_memory(name, options)
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}, {ratios[-1]:.3f})"
        shown = "not measured on a CPU" if memory is None else f"{memory:.2f}"
        print(f"| {name} | {statistics.median(values):.4f} | {spread} | {total:.3f} | {passes} | {shown} |")


if __name__ == "__main__":
    main()
