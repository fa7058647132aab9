"""What does it cost to record, for each micro-batch, the state that a forward pass may move? Times against the pass.

    python benchmarks/state.py
    python benchmarks/state.py --hidden 256 --rounds 50

BERT-like models of about 5 million parameters in the encoder, with about 100 and 500 modules, a batch of 8 rows of 64
tokens. With and without a second root like a Trainer's: attributes, lists of numbers, an optimizer. Passes and records
take turns; of each the fastest is given, because others on the machine slow down the long passes more than the short
records. Runs on a GPU if there is one.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_sharp._engine.state import ForwardState

SIZES = {6: 256, 30: 112}  # layers: hidden size, for about 5 million parameters in the encoder


def model_of(layers: int, hidden: int) -> Any:
    config = BertConfig(
        vocab_size=1000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
    )
    return BertForSequenceClassification(config).train()


def trainer_like(model: torch.nn.Module) -> Any:
    """An object with what a Trainer has on it, and TRL's records: ten lists of 1000 numbers."""
    metrics = {"train": defaultdict(list, {str(i): [0.5 + i] * 1000 for i in range(10)}), "eval": defaultdict(list)}
    settings = {f"setting_{i}": i for i in range(80)}
    optimizer = torch.optim.AdamW(model.parameters())
    return SimpleNamespace(model=model, optimizer=optimizer, _metrics=metrics, total_train_tokens=0, **settings)


def timed(work: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(model: torch.nn.Module, roots: dict[str, Any], rounds: int) -> tuple[float, float]:
    """The least seconds: of a forward and backward pass, and of recording around it."""
    device = next(model.parameters()).device
    batch = {
        "input_ids": torch.randint(1000, (8, 64), device=device),
        "labels": torch.zeros(8, dtype=torch.long, device=device),
    }
    state = ForwardState(roots, lambda: list(model.parameters()))
    clock = time.perf_counter if device.type == "cuda" else time.thread_time  # records run in this thread alone
    passes, records = [], []
    for turn in range(rounds + 2):
        held: list[Any] = []
        before = timed(lambda held=held: held.append(state.record()), device, clock)
        both = timed(lambda: model(**batch).loss.backward(), device)
        after = timed(lambda held=held: held.append(state.changes(held[0])), device, clock)
        model.zero_grad()
        if held[1]:
            raise RuntimeError(f"something moved: {held[1]}")
        if turn >= 2:
            passes.append(both)
            records.append(before + after)
    return min(passes), min(records)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, help="hidden size, instead of that of 5 million parameters")
    parser.add_argument("--layers", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of the CPU, for the passes")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| modules | million parameters | roots | pass, ms | record and changes, ms | share |")
    print("|---|---|---|---|---|---|")
    for layers in chosen.layers:
        model = model_of(layers, chosen.hidden or SIZES.get(layers, 256)).to(device)
        modules, size = len(list(model.modules())), sum(p.numel() for p in model.parameters()) / 1e6
        for name, more in (("model", {}), ("model, trainer", {"trainer": trainer_like(model)})):
            once, record = measure(model, {"model": model, **more}, chosen.rounds)
            cells = (modules, f"{size:.1f}", name, f"{once * 1e3:.1f}", f"{record * 1e3:.3f}", f"{record / once:.2%}")
            print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
