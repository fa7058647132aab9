"""How much of a penalty's gradient is signal, by precision and by the length r of its differences.

    python benchmarks/penalties.py [--device cuda]

For a small BERT, a few steps into training, prints for `gradient_penalty` and `curvature_regularization` (lam 1,
mu 0.01): the truncation error (against r = 1e-6 in float64), and the length of the penalty's gradient over that of the
rounding error (against float64 at the same r), in float32 and under bf16 autocast.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments, set_seed

from hf_sharp import CurvatureRegularization, GradientPenalty, Method, Plain, SharpTrainer

LENGTHS = (0.05, 0.02, 0.01, 0.001)


class Keep(TrainerCallback):
    """Keeps the gradient that the optimizer is about to see."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.grad = torch.cat([p.grad.reshape(-1).double().cpu() for p in model.parameters() if p.grad is not None])


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 500, (count, 32), generator=draw)
    labels = torch.randint(3, (count,), generator=draw)
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def train(model: Any, method: Method | None, data: list, device: str, **settings: Any) -> Keep:
    keep = Keep()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            max_grad_norm=0.0,
            **settings,
        )
        SharpTrainer(model, args, method=method, train_dataset=data, callbacks=[keep]).train()
    return keep


def term(state: dict[str, Tensor], method: Method, data: list, device: str, precision: str) -> Tensor:
    """The method's gradient less the plain one, at the given weights."""
    grads = []
    for each in (method, Plain()):
        model = small_bert()
        model.load_state_dict(state)
        model = model.double() if precision == "float64" else model
        settings = {"max_steps": 1, "learning_rate": 0.0, "bf16": precision == "bf16"}
        grads.append(train(model, each, data, device, **settings).grad)
    return grads[0] - grads[1]


def small_bert() -> BertForSequenceClassification:
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings: dict[str, Any] = {"vocab_size": 500, "num_labels": 3, **shape, **dropout}
    return BertForSequenceClassification(BertConfig(**settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    set_seed(0)
    model, data = small_bert(), rows(16, seed=0)
    train(model, None, data, device, max_steps=12, learning_rate=5e-4)
    state = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    print(f"{'penalty':10s} {'r':>6s} {'truncation':>11s} {'float32':>12s} {'bf16':>8s}   (signal / rounding noise)")
    penalties = {
        "gradient": lambda r: GradientPenalty(1.0, r),
        "curvature": lambda r: CurvatureRegularization(1.0, 0.01, r),
    }
    for name, make in penalties.items():
        exact = term(state, make(1e-6), data, device, "float64")
        for r in LENGTHS:
            right = term(state, make(r), data, device, "float64")
            signals = {"float32": "-", "bf16": "refused"}
            for precision in ("float32", "bf16") if name == "gradient" else ("float32",):
                noise = (term(state, make(r), data, device, precision) - right).norm()
                signals[precision] = f"{float(right.norm() / noise):.1f}"
            error = float((right - exact).norm() / exact.norm())
            print(f"{name:10s} {r:6g} {error:11.3f} {signals['float32']:>12s} {signals['bf16']:>8s}")


if __name__ == "__main__":
    main()
