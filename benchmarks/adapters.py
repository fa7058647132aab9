"""What do the methods for adapters cost here? Time and memory of a step against plain LoRA, on your box.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --hidden 2048 --layers 16 --batch 8 --length 512 --bf16 --rounds 30
    python benchmarks/adapters.py --method bi_lora:rank=16 bar:kind=o sam:rho=0.01 --lora_rank 16

A Llama with LoRA on all linear layers, adapters in float32. All contenders train the same model from the same start
and take turns, one optimizer step each, in an order that is shuffled every round, so that slow spells of the machine
hit all alike; ratios are taken within a round. A second plain LoRA shows how far apart two equal contenders come. On a
CPU that others use too, `--clock cpu` counts the seconds that this process had.

Memory is a peak over three steps beyond plain LoRA, in copies of the adapters: of what torch allocates on a GPU, of
live tensors on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from step import Contender, config_of, median_interval
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_sharp import SharpTrainer
from hf_sharp.recipes.report import LiveTensors

PLAIN, AGAIN = "LoRA", "LoRA, again"
SIZES = {"hidden": 256, "layers": 4, "batch": 8, "length": 128, "accumulate": 1, "rounds": 30, "lora_rank": 8}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def build(options: Any) -> Any:
    set_seed(0)
    heads = max(1, options.hidden // 64)
    size = {"hidden_size": options.hidden, "num_hidden_layers": options.layers, "num_attention_heads": heads}
    config: dict[str, Any] = {"vocab_size": 4000, "intermediate_size": options.hidden * 8 // 3, **size}
    lora = LoraConfig(r=options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers renamed
        return get_peft_model(LlamaForCausalLM(LlamaConfig(**config)), lora)


def data(options: Any) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(5, 4000, (options.batch * options.accumulate * (options.rounds + 10), options.length))
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in rows]


def training_of(name: str, options: Any, rows: Any, folder: str) -> Callable[[Contender], None]:
    """The named contender's training."""
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=options.batch, gradient_accumulation_steps=options.accumulate,
        max_steps=options.rounds + 5, optim="adamw_torch_fused", lr_scheduler_type="constant", learning_rate=2e-4,
        bf16=options.bf16, torch_compile=options.compile, use_cpu=not torch.cuda.is_available(), report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True)  # fmt: skip

    def train(callback: Contender) -> None:
        common: dict[str, Any] = {"args": arguments, "train_dataset": rows, "callbacks": [callback]}
        if name in (PLAIN, AGAIN):
            Trainer(model=build(options), **common).train()
        else:
            SharpTrainer(model=build(options), method=config_of(name), **common).train()

    return train


def race(options: Any) -> dict[str, list[float]]:
    """Seconds of every step of every contender, round by round."""
    rows, names, clock = data(options), [PLAIN, AGAIN, *options.method], CLOCKS[options.clock]
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        held = {name: Contender(training_of(name, options, rows, folder)) for name in names}
        for _ in range(options.rounds + 3):
            random.shuffle(names)
            for name in names:
                start = clock()
                held[name].step()
                times[name].append(clock() - start)
        for contender in held.values():
            contender.close()
    return {name: values[3:] for name, values in times.items()}


def peak_memory(name: str, options: Any) -> float:
    """Peak bytes of three steps alone after a first one."""
    few = argparse.Namespace(**{**vars(options), "rounds": 4})
    live, cuda = LiveTensors(), torch.cuda.is_available()
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        train = training_of(name, few, data(few), folder)

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
    return torch.cuda.max_memory_allocated() if cuda else live.peak


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=["sam:rho=0.01", "bi_lora", "bar", "flat_lora"])
    for flag, default in SIZES.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    times = race(options)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{device}; torch {torch.__version__}, transformers {transformers.__version__}; {vars(options)}\n")
    copy = sum(4 * p.numel() for p in build(options).parameters() if p.requires_grad)
    memory = {name: peak_memory(name, options) / copy for name in times}
    print(
        "\n| method | seconds a step | times plain LoRA: median [95 %] | of totals | memory beyond, adapter copies |"
    )
    print("|---|---|---|---|---|")
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[PLAIN], strict=True)]
        low, high = median_interval(ratios)
        spread = f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
        beyond = memory[name] - memory[PLAIN]
        total = sum(values) / sum(times[PLAIN])
        print(f"| {name} | {statistics.median(values):.4f} | {spread} | {total:.3f} | {beyond:.2f} |")


if __name__ == "__main__":
    main()
