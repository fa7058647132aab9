"""A plain Accelerate loop with SAM. What differs from the loop without it is marked: three lines.

accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup, set_seed

from hf_sharp import SharpStep, sam  # new


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Numbers to read; the label says whether more than half of them are in the upper half."""
    ids = torch.randint(100, (count, 16), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": (row >= 50).sum() > 8} for row in ids]


def loss_fn(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["labels"].long()).loss


def main(steps: int = 200) -> float:
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config: dict[str, Any] = {"vocab_size": 100, "num_labels": 2, **size}
    model = BertForSequenceClassification(BertConfig(**config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 10, steps)
    loader = DataLoader(rows(2 * 16 * steps, seed=0), batch_size=16)  # pyright: ignore[reportArgumentType]
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    sharp = SharpStep(sam(rho=0.05), model, optimizer, accelerator, loss_fn)  # new
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            sharp.backward(batch)  # was: accelerator.backward(loss_fn(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.eval()
    test = torch.utils.data.default_collate(rows(512, seed=1))
    with torch.no_grad():
        guess = model(input_ids=test["input_ids"].to(accelerator.device)).logits.argmax(-1)
    accuracy = float((guess.cpu() == test["labels"].long()).float().mean())
    accelerator.print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
