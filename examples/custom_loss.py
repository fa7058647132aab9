"""SAM with a loss of one's own: the focal loss, given to the Trainer as `compute_loss_func`.

python examples/custom_loss.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from hf_sharp import SharpTrainer, sam


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Numbers to read; the label says whether more than half of them are in the upper half."""
    ids = torch.randint(100, (count, 16), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": (row >= 50).sum().gt(8).long()} for row in ids]


def focal_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
    """Lin et al. (ICCV 2017): rows that are right already count less, by (1 - p)^2.

    The Trainer says how many labels the whole accumulation window has; divided by that, the sums of its micro-batches
    add up to the mean, whatever their sizes. Every pass of a method calls this again.
    """
    surprise = functional.cross_entropy(outputs["logits"], labels, reduction="none")
    loss = (1 - torch.exp(-surprise)) ** 2 * surprise
    return loss.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def main(steps: int = 200) -> float:
    set_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config: dict[str, Any] = {"vocab_size": 100, "num_labels": 2, **size}
    settings: dict[str, Any] = {"learning_rate": 3e-3, "report_to": "none", "dataloader_pin_memory": False}
    settings |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SharpTrainer(
            model=BertForSequenceClassification(BertConfig(**config)),
            args=TrainingArguments(folder, max_steps=steps, save_strategy="no", **settings),
            method=sam(rho=0.05),
            train_dataset=rows(2000, seed=0),
            compute_loss_func=focal_loss,
            compute_metrics=lambda test: {"accuracy": float((test.predictions.argmax(-1) == test.label_ids).mean())},  # pyright: ignore
        )
        trainer.train()
        accuracy = trainer.evaluate(rows(512, seed=1))["eval_accuracy"]  # pyright: ignore[reportArgumentType]
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
