r"""Fine-tune an encoder-decoder (T5, BART) with SAM beside plain training, and score what it generates.

The demo (no network: a small T5, from scratch, writes the name of the package that a docstring comes from):

    accelerate launch recipes/seq2seq_sam.py

Expected there (one seed, so a hint at most; 113 s of processor time): exactly right plain 0.618, sam 0.649.

Your own pairs, a row each in a .csv, .tsv, .json or .jsonl file, or from the Hub:

    accelerate launch recipes/seq2seq_sam.py --model_name_or_path google-t5/t5-small --train_file news.jsonl \
        --source_column article --target_column highlights --source_prefix "summarize: " --method sam --rho 0.05 \
        --compare plain --seeds 3 --bf16 --num_train_epochs 3 --learning_rate 1e-4 --generation_max_length 64

Scores: the share of answers that are exactly right, and the mean F1 of their words (as in SQuAD). The same command
again goes on where it stopped.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_sharp import SharpConfig, SharpSeq2SeqTrainer, last_complete_checkpoint
from hf_sharp.recipes import beforehand, report
from hf_sharp.recipes.settings import options_of
from hf_sharp.recipes.tasks import domains, pairs

DEFAULTS = {"output_dir": "outputs/seq2seq_sam", "report_to": "none", "save_total_limit": 1, "method": "sam"}
DEFAULTS |= {"predict_with_generate": True, "save_strategy": "epoch", "logging_steps": 50}
DEFAULTS |= {"dataloader_pin_memory": torch.accelerator.is_available()}
SMALL = {"num_train_epochs": 8.0, "learning_rate": 2e-3, "per_device_train_batch_size": 32, "max_source_length": 48}
SMALL |= {"per_device_eval_batch_size": 128, "generation_max_length": 8, "max_eval_samples": 500}


@dataclass
class Arguments:
    """Which pairs, which model, and what is compared."""

    compare: list[str] = field(
        default_factory=lambda: ["plain"],
        metadata={"help": "Methods to run beside --method, with the same --rho."},
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds, from --seed upwards."})
    model_name_or_path: str = field(default="", metadata={"help": "Hub id or folder, with safetensors."})
    train_file: str = field(default="", metadata={"help": ".csv, .tsv, .json, .jsonl or a folder of them."})
    validation_file: str = field(default="", metadata={"help": "What is scored. Default: a tenth held back."})
    dataset_name: str = field(default="", metadata={"help": "The same from the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    source_column: str = field(default="source", metadata={"help": "Column of what is read."})
    target_column: str = field(default="target", metadata={"help": "Column of what is to be written."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source; T5 wants its task's name."})
    max_source_length: int = field(default=512, metadata={"help": "Longer sources are cut off."})
    max_target_length: int = field(default=128, metadata={"help": "Longer targets are cut off."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many, drawn once."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Score so many, drawn once."})


def parse() -> tuple[Arguments, dict[str, SharpConfig], Seq2SeqTrainingArguments]:
    """Read the command line over the defaults, and make the methods; --method must take all its options."""
    parser = HfArgumentParser([Arguments, SharpConfig, Seq2SeqTrainingArguments])  # pyright: ignore[reportArgumentType]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model_name_or_path")
    parser.set_defaults(**DEFAULTS | ({} if first.parse_known_args()[0].model_name_or_path else SMALL))
    args, sharp, training = parser.parse_args_into_dataclasses(look_for_args_file=False)
    if bool(args.model_name_or_path) != bool(args.train_file or args.dataset_name):
        raise ValueError("--model_name_or_path goes with --train_file or --dataset_name; without both the demo runs.")
    if args.seeds < 1:
        raise ValueError(f"--seeds is a number of seeds, at least 1; got {args.seeds}.")
    configs = {}
    for label in dict.fromkeys([*args.compare, sharp.method]):
        own = {key: value for key, value in sharp.to_dict().items() if key in options_of(label)}
        configs[label] = sharp if label == sharp.method else SharpConfig.from_dict({**own, "method": label})
        configs[label].build()
    return args, configs, training


def run(trainer: SharpSeq2SeqTrainer) -> dict[str, Any]:
    """Make one run, from its last checkpoint if it has one, and return its scores."""
    trainer.add_callback(timer := report.StepTimer())
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(trainer.args.output_dir)))
    scores = trainer.evaluate(metric_key_prefix="test")
    gaps = [line["sharp_gap"] for line in trainer.state.log_history if "sharp_gap" in line]
    row = {"value": scores["test_exact"], "loss": scores["test_loss"], "seconds_per_step": timer.seconds_per_step}
    return row | {
        "gap": sum(gaps) / len(gaps) if gaps else None,
        "metrics": scores,
        "steps": trainer.state.global_step,
    }


def main() -> None:
    try:  # whatever is wrong with the command or the data is found before any training
        args, configs, training = parse()
        output, first = Path(str(training.output_dir)), training.process_index == 0
        settings = {f"method {label}": config.to_dict() for label, config in configs.items()} | asdict(args)
        settings = report.keep_settings(output, {**training.to_dict(), **settings, "processes": training.world_size})
        if args.model_name_or_path:
            source = args.train_file, args.dataset_name, args.dataset_config_name
            data = domains.pick_domain(*source, args.source_column, args.target_column, args.validation_file)
            tokenizer: Any = AutoTokenizer.from_pretrained(args.model_name_or_path)
            # Weights in float32, under autocast with --bf16: a short ascent step would be lost in 16-bit weights.
            make_model = partial(AutoModelForSeq2SeqLM.from_pretrained, args.model_name_or_path, dtype="float32")
        else:
            data = pairs.load_packages()
            tokenizer = domains.byte_tokenizer((text for row in data.train for text in row), max_length=512)
            make_model = partial(AutoModelForSeq2SeqLM.from_config, pairs.small_t5(tokenizer))
        beforehand.need("matplotlib")
        if any(config.method == "saf" for config in configs.values()):
            raise ValueError("saf: a vocabulary's logits cannot be kept. Use mesa, which keeps none.")
        longest = (args.max_source_length, args.max_target_length)
        options = tokenizer, longest, args.source_prefix
        train = pairs.encode_pairs(data.train, *options, args.max_train_samples)
        test = pairs.encode_pairs(data.test, *options, args.max_eval_samples)
        beforehand.try_methods(configs, make_model, beforehand.bare(SharpSeq2SeqTrainer, training))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"seq2seq_sam.py: {error}") from error

    results = output / "results.json"
    if first:
        report.write_json(results.with_name("settings.json"), settings)
    shared = {"recipe": "seq2seq_sam", "task": data.name, "model": args.model_name_or_path, "metric": "exact"}
    shared |= {"majority": None, "epochs": training.num_train_epochs}
    for seed, label in product(range(training.seed, training.seed + args.seeds), configs):
        row = {**shared, "method": label, "seed": seed, "passes": configs[label].build().cost}
        if report.identity(row) in map(report.identity, report.read_rows(results)):
            continue
        set_seed(seed)
        model: Any = make_model()
        model.accepts_loss_kwargs = False  # transformers#47688: T5's loss ignores num_items_in_batch
        trainer = SharpSeq2SeqTrainer(
            model=model,
            args=replace(training, seed=seed, output_dir=str(output / "runs" / f"{label}_seed{seed}")),
            method=configs[label],
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model),
            compute_metrics=partial(pairs.score_texts, tokenizer=tokenizer),
        )
        row |= run(trainer)
        if first:
            report.plot(report.add_row(results, row), results.with_suffix(".png"))
    if first:
        rows = report.read_rows(results)
        print(
            "", report.table(rows), *(report.verdict(rows, label) for label in configs if label != "plain"), sep="\n"
        )


if __name__ == "__main__":
    main()
