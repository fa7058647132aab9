"""What recipes without a model of the user's fine-tune: a small Llama that has read some text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_sharp.recipes.tasks.domains import small_llama


def pretrain(
    folder: Path, examples: Any, tokenizer: Any, args: TrainingArguments, length: int, **changes: Any
) -> None:
    """Train it, unless its folder is there, which appears as a whole or not at all.

    Args:
        folder: where it is saved; what it writes on its way goes to ``runs`` beside it.
        examples: blocks of tokens with labels.
        tokenizer: of the model.
        args: what the recipe was given, for its seed, batch size and device.
        length: tokens of a block.
        **changes: of these arguments, such as ``max_steps``.
    """
    if folder.exists():
        return
    own = {"learning_rate": 3e-3, "save_strategy": "no", "eval_strategy": "no"}
    own |= {"output_dir": str(folder.parent / "runs" / folder.name)}
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(small_llama(tokenizer, length))
    options: Any = replace(args, **own | changes)
    trainer = Trainer(model, options, default_data_collator, examples, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(f"{folder}.new")
    if args.process_index == 0:
        Path(f"{folder}.new").replace(folder)
    trainer.accelerator.wait_for_everyone()
