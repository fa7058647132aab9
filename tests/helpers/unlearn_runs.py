"""Unlearning runs on tiny models: rows of unequal length in two parts, and one call that trains on them."""

import warnings
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sharp import UnlearnTrainer
from models import seeded
from training import arguments

VOCABULARY = 24


def tiny_gpt2(dropout: float = 0.0, float64: bool = True, seed: int = 0, layers: int = 2) -> GPT2LMHeadModel:
    """GPT-2, hidden 16: in float64 all of it is, which Llama's norm and softmax are not."""
    settings = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": layers, "n_head": 2}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    with seeded(seed):
        model = GPT2LMHeadModel(GPT2Config(**settings, **drops, **ends, initializer_range=0.2))
    return model.double() if float64 else model


def lora(**settings: Any) -> Any:
    """The same with an adapter; what asks for it is skipped without PEFT."""
    peft = pytest.importorskip("peft")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    torch.manual_seed(7)
    return peft.get_peft_model(tiny_gpt2(**settings), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **targets))


def text(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Rows of 4 to 10 tokens, of which the first 1 to 3 are a prompt."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length, prompt = (int(torch.randint(*ends, (), generator=draw)) for ends in ((4, 11), (1, 4)))
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw)
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(length) < prompt, -100, ids)})
    return rows


def pairs(count: int = 40, alternative: bool = True) -> list[dict[str, Any]]:
    """Rows of a part to forget, with other answers, and a part to retain."""
    forget, retain, others = text(count, 1), text(count, 2), text(count, 3)
    if alternative:
        forget = [{**row, "alternative": other} for row, other in zip(forget, others, strict=True)]
    return [{"forget": one, "retain": other} for one, other in zip(forget, retain, strict=True)]


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }
    if "alternative" in rows[0]:
        batch["alternative"] = padded([row["alternative"] for row in rows])
    return batch


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {part: padded([row[part] for row in rows]) for part in rows[0]}


OWN = ("objective", "method", "reference", "optimizers", "callbacks", "eval_dataset", "rounding")


def build(model: Any, folder: Any, rows: list | None = None, **settings: Any) -> UnlearnTrainer:
    own = {name: settings.pop(name) for name in OWN if name in settings}
    rows = pairs() if rows is None else rows
    own.setdefault("check_repeats", False)  # one pass more, which tests that count passes do not want
    return UnlearnTrainer(model, arguments(folder, **settings), collate, rows, **own)


def unlearn(model: Any, folder: Any, rows: list | None = None, **settings: Any) -> UnlearnTrainer:
    trainer = build(model, folder, rows, **settings)
    trainer.train()
    return trainer
