"""What two ranks run for test_unlearning_data.py: each writes down which retained rows its model was fed."""

import json
import os
import sys
from pathlib import Path

from transformers import TrainingArguments

from hf_sharp import Plain, SharpTrainer, Sum
from hf_sharp.unlearning import EpochCallback, ForgetRetainCollator, ForgetRetainDataset
from models import tiny_llama
from questions import examples, word_tokenizer


def main(folder: Path) -> None:
    seen, collate = [], ForgetRetainCollator(word_tokenizer())

    def watch(pairs):
        seen.append([pair["retain"]["input_ids"][-1] for pair in pairs])
        return collate(pairs)

    arguments = {"per_device_train_batch_size": 2, "max_steps": 4, "report_to": "none", "use_cpu": True}
    arguments |= {"remove_unused_columns": False, "disable_tqdm": True, "save_strategy": "no"}
    trainer = SharpTrainer(
        tiny_llama(dropout=0.0, vocab_size=64),
        TrainingArguments(str(folder), **arguments),
        method=Sum(forget=Plain(), retain=Plain()),
        train_dataset=ForgetRetainDataset(examples(8), examples(50), seed=1),
        data_collator=watch,
        callbacks=[EpochCallback()],
    )
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # at interpreter exit gloo's threads can abort the process after all is done (seen with torch 2.13)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
