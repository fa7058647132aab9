r"""Fine-tune an encoder on GLUE with SAM, ASAM or FSAM, beside plain training on the same seeds and batches.

The demo (no network: a two-layer BERT, from scratch, tells which standard-library package a docstring comes from):

    accelerate launch recipes/glue_fsam.py

Expected there (one run; other machines and Pythons differ by some hundredths): accuracy on clean labels plain 0.81,
fsam 0.80; with 40 % of the training labels drawn at random plain 0.48, fsam 0.53; majority class 0.17; a step of fsam
takes twice the time; 132 s of processor time. One seed is a hint at most: --seeds 5 prints an interval.

Real GLUE, from the Hub or a folder in the official TSV layout; five seeds, and plain training of the same compute:

    accelerate launch recipes/glue_fsam.py --task_name rte --model_name_or_path google-bert/bert-base-uncased \
        --method fsam --rho 0.01 --compare plain plain_2x sam --seeds 5 --bf16 --output_dir outputs/rte
    accelerate launch recipes/glue_fsam.py --task_name cola --model_name_or_path ./minilm --data_dir ./glue
    accelerate launch recipes/glue_fsam.py --config rte.yaml      # any flag as `name: value`; the command line wins

Finished runs are in <output_dir>/results.json: the same command again skips them, and resumes a run that was cut off.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_sharp import SharpConfig, SharpTrainer, last_complete_checkpoint
from hf_sharp.recipes import beforehand, report
from hf_sharp.recipes.settings import options_of
from hf_sharp.recipes.tasks import (
    GLUE,
    PACKAGES,
    load_docstrings,
    load_glue,
    redraw_labels,
    small_bert,
    word_tokenizer,
)
from hf_sharp.recipes.tasks.glue import tokenize
from hf_sharp.recipes.tasks.metrics import load_metric, majority_value

DEFAULTS = {"method": "fsam", "compare": ["plain"], "label_noise": [0.0], "logging_steps": 50, "save_total_limit": 1}
DEFAULTS |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "report_to": "none"}
DEFAULTS |= {"dataloader_pin_memory": torch.accelerator.is_available()}  # without one, pinning only brings a warning
REAL = {"num_train_epochs": 3.0, "learning_rate": 2e-5, "save_strategy": "epoch"}
DEMO = {"output_dir": "outputs/glue_fsam", "label_noise": [0.0, 0.4], "num_train_epochs": 12.0, "learning_rate": 5e-4}
DEMO |= {"max_seq_length": 32, "train_sampling_strategy": "group_by_length", "save_steps": 250}
DOCSTRINGS = replace(GLUE["sst2"], name="docstrings", texts=("text",), labels=PACKAGES)


@dataclass
class Arguments:
    """What run_glue.py calls model and data arguments, and the comparison."""

    config: str | None = field(default=None, metadata={"help": "YAML file with any of these flags."})
    task_name: str = field(default="", metadata={"help": f"One of {', '.join(GLUE)}. Default: the demo."})
    data_dir: str | None = field(default=None, metadata={"help": "Official GLUE TSV files. Default: the Hub."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut off."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to max_seq_length, not to the batch."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows."})
    label_noise: list[float] = field(default_factory=list, metadata={"help": "Shares of random training labels."})
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Run too, with the same --rho; plain_2x: twice the epochs."},
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds, from --seed upwards."})
    model_name_or_path: str = field(default="", metadata={"help": "Hub id or folder, with safetensors."})
    config_name: str | None = field(default=None, metadata={"help": "If not that of the model."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "If not that of the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where files of the Hub are kept."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a tokenizer of the tokenizers library."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "For the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Replace a head of another size."})


def parse() -> tuple[Arguments, SharpConfig, TrainingArguments]:
    """Read the command line over the YAML file over the defaults of the demo or of real GLUE."""
    parser = HfArgumentParser([Arguments, SharpConfig, TrainingArguments])  # pyright: ignore[reportArgumentType]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--task_name")
    early = first.parse_known_args()[0]
    given = (yaml.safe_load(Path(early.config).read_text(encoding="utf-8")) or {}) if early.config else {}
    unknown = set(given) - {action.dest for action in parser._actions}
    if unknown:
        raise ValueError(f"{early.config} sets {', '.join(sorted(unknown))}, which is no flag of this recipe.")
    real = early.task_name or given.get("task_name")
    parser.set_defaults(**{**DEFAULTS, **(REAL | {"output_dir": f"outputs/{real}"} if real else DEMO), **given})
    args, sharp, training = parser.parse_args_into_dataclasses(look_for_args_file=False)
    if args.task_name and not args.model_name_or_path:
        raise ValueError("--task_name needs --model_name_or_path; without a task the demo runs.")
    if args.task_name not in GLUE and (args.task_name or args.model_name_or_path or args.data_dir):
        raise ValueError(f"--task_name is one of {', '.join(GLUE)}; got {args.task_name}.")
    if args.seeds < 1:
        raise ValueError(f"--seeds is a number of seeds, at least 1; got {args.seeds}.")
    return args, sharp, training


def methods_of(args: Arguments, sharp: SharpConfig) -> dict[str, SharpConfig]:
    """Give each compared method those of the options that it takes; --method itself must take them all."""
    configs = {}
    for label in dict.fromkeys([*args.compare, sharp.method]):
        name = label.removesuffix("_2x")
        own = {key: value for key, value in sharp.to_dict().items() if key in options_of(name)}
        configs[label] = sharp if label == sharp.method else SharpConfig.from_dict({**own, "method": name})
        configs[label].build()
    return configs


def load_demo(args: Arguments) -> tuple[dict[Any, Dataset], Any, Any]:
    """Return the splits of the embedded task, a tokenizer built on its training texts, and what makes a model."""
    task = load_docstrings()
    tokenizer = word_tokenizer(task.train_texts, max_length=args.max_seq_length)
    config = small_bert(len(tokenizer), task.labels, args.max_seq_length)
    splits = {
        "train": Dataset.from_dict({"text": task.train_texts, "label": task.train_labels}),
        "test": Dataset.from_dict({"text": task.test_texts, "label": task.test_labels}),
    }
    return splits, tokenizer, partial(AutoModelForSequenceClassification.from_config, config)


def load_real(args: Arguments) -> tuple[dict[Any, Dataset], Any, Any]:
    """Return the splits of a GLUE task, the model's tokenizer, and what loads the model."""
    splits, labels = load_glue(args.task_name, args.data_dir, args.cache_dir, args.token), GLUE[args.task_name].labels
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    hub["trust_remote_code"] = args.trust_remote_code
    config, tokenizer = args.config_name or args.model_name_or_path, args.tokenizer_name or args.model_name_or_path
    config = AutoConfig.from_pretrained(config, num_labels=len(labels) or 1, **hub)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer, use_fast=args.use_fast_tokenizer, **hub)
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    hub |= {"use_safetensors": True, "ignore_mismatched_sizes": args.ignore_mismatched_sizes}
    # Weights in float32, under autocast with --bf16 or --fp16: a short ascent step would be lost in 16-bit weights.
    load = AutoModelForSequenceClassification.from_pretrained
    return splits, tokenizer, partial(load, args.model_name_or_path, config=config, dtype="float32", **hub)


def train_and_evaluate(
    row: dict[str, Any], model: Any, args: TrainingArguments, evaluation: dict[str, Any], **parts: Any
) -> dict[str, Any]:
    """Make one run, from its last checkpoint if it has one, and return its row."""
    # transformers#47688: the head ignores num_items_in_batch, which the Trainer counts on. Delete when that is closed.
    model.accepts_loss_kwargs = False
    timer, first = report.StepTimer(), next(iter(evaluation))
    trainer = SharpTrainer(model=model, args=args, eval_dataset=evaluation[first], callbacks=[timer], **parts)
    checkpoint = last_complete_checkpoint(str(args.output_dir))
    if checkpoint and args.process_index == 0:
        print(f"resuming from {checkpoint}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    scores = {name: trainer.evaluate(split, metric_key_prefix=name) for name, split in evaluation.items()}
    gaps = [entry["sharp_gap"] for entry in trainer.state.log_history if "sharp_gap" in entry]
    measured = {"value": scores[first][f"{first}_{row['metric']}"], "loss": scores[first][f"{first}_loss"]}
    measured |= {"gap": float(np.mean(gaps)) if gaps else None, "seconds_per_step": timer.seconds_per_step}
    return row | measured | {"steps": trainer.state.global_step, "metrics": scores}


def main() -> None:
    try:  # whatever is wrong with the command or the data is found before any training
        args, sharp, training = parse()
        methods = methods_of(args, sharp)
        settings = {f"method {label}": config.to_dict() for label, config in methods.items()}
        settings |= {**training.to_dict(), **asdict(args), "processes": training.world_size}
        output = Path(str(training.output_dir))
        settings = report.keep_settings(output, settings)
        task = GLUE[args.task_name] if args.task_name else DOCSTRINGS
        for noise in filter(None, args.label_noise):
            redraw_labels([], noise, len(task.labels), seed=0)
        beforehand.need("sklearn", "scipy", "matplotlib")
        splits, tokenizer, make_model = load_real(args) if args.task_name else load_demo(args)
        beforehand.try_methods(methods, make_model, beforehand.bare(SharpTrainer, training))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"glue_fsam.py: {error}") from error
    with training.main_process_first(desc="tokenizing"):
        options = tokenizer, args.max_seq_length, args.pad_to_max_length, args.overwrite_cache
        train = tokenize(splits.pop("train"), task.texts, args.max_train_samples, *options)
        train = beforehand.number_rows(train, methods.values())
        evaluation = {k: tokenize(s, task.texts, args.max_eval_samples, *options) for k, s in splits.items()}
    majority = majority_value(task.metric, task.main_metric, next(iter(evaluation.values()))["label"])
    metric, results = load_metric(task.metric), output / "results.json"

    def compute_metrics(prediction: Any) -> dict[str, float]:
        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        answers = np.argmax(scores, axis=1) if task.labels else np.squeeze(scores, axis=1)
        return metric.compute(predictions=answers, references=prediction.label_ids)

    finished, first = {report.identity(row) for row in report.read_rows(results)}, training.process_index == 0
    if first:
        report.write_json(results.with_name("settings.json"), settings)
    shared = {"recipe": "glue_fsam", "task": task.name, "model": args.model_name_or_path or None}
    shared |= {"metric": task.main_metric, "majority": majority}
    runs = list(product(args.label_noise, range(training.seed, training.seed + args.seeds), methods))
    for number, (noise, seed, label) in enumerate(runs, start=1):
        times = 2 if label.endswith("_2x") else 1
        epochs = training.num_train_epochs * times
        row = {**shared, "method": label, "label_noise": noise, "epochs": epochs, "seed": seed}
        row["passes"], done = methods[label].build().cost, report.identity(row) in finished
        if first:
            title = f"[{number}/{len(runs)}] {report.panel_title(row)}: {label}, seed {seed}"
            print(title + (f": finished before, kept as it is in {results}" if done else ""), flush=True)
        if done:
            continue
        labels = redraw_labels(train["label"], noise, len(task.labels), seed) if noise else list(train["label"])
        changes = {"output_dir": str(output / "runs" / f"{label}_noise{noise:g}_seed{seed}")}
        changes |= {"seed": seed, "num_train_epochs": epochs, "max_steps": max(training.max_steps * times, -1)}
        set_seed(seed)
        row = train_and_evaluate(
            row,
            make_model(),
            replace(training, **changes),
            evaluation,
            method=methods[label],
            train_dataset=train.remove_columns("label").add_column("label", labels, feature=train.features["label"]),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
            compute_metrics=compute_metrics,
        )
        if first:
            report.plot(report.add_row(results, row), results.with_suffix(".png"))

    for noise in args.label_noise if first else ():
        rows = [row for row in report.read_rows(results) if row["label_noise"] == noise]
        print(f"\n{report.panel_title(rows[0])}\n{report.table(rows)}\n{report.verdict(rows, sharp.method)}")
    if first:
        print(f"\nWritten: {results} and {results.with_suffix('.png')}")


if __name__ == "__main__":
    main()
