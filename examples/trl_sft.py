"""Supervised fine-tuning with TRL and SAM. What differs from plain TRL is marked: two lines.

accelerate launch examples/trl_sft.py

The model and its tokenizer are made here, so that nothing is downloaded; with your own, give `model="Qwen/Qwen3-0.6B"`
and, for adapters, `peft_config=LoraConfig(...)`, both as `SFTTrainer` takes them.
"""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig

from hf_sharp import SharpSFTTrainer  # was: from trl import SFTTrainer

WORDS = ["<pad>", "<end>", *"0123456789", "+", "="]


def sums(count: int, seed: int) -> Dataset:
    """Sums of two digits as prompts and completions; the loss is that of the completions."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {(a + b) // 10} {(a + b) % 10} <end>"} for a, b in pairs]
    return Dataset.from_list(rows)


def main(steps: int = 300) -> float:
    set_seed(0)
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    size: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(WORDS), intermediate_size=128, pad_token_id=0, eos_token_id=1, **size)
    arguments: dict[str, Any] = {"max_steps": steps, "learning_rate": 3e-3, "per_device_train_batch_size": 32}
    arguments |= {"logging_steps": 50, "save_strategy": "no", "report_to": "none", "bf16": False}
    arguments |= {"dataloader_pin_memory": False}  # pinning warns where there is no accelerator
    trainer = SharpSFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig("outputs/trl_sft", **arguments),
        train_dataset=sums(3000, seed=0),
        eval_dataset=sums(500, seed=1),
        processing_class=tokenizer,
        method="sam",  # new
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_mean_token_accuracy"]
    print(f"accuracy of the answers' tokens {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
