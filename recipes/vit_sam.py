r"""Train a ViT with plain AdamW, SAM, GSAM, MSAM, SAM-ON and FSAM, on clean and on noisy labels, and corrupt the test.

The demo (no network: a small ViT, from scratch, reads the handwritten digits that scikit-learn brings along):

    accelerate launch recipes/vit_sam.py

Expected there (one run, so hints at most): accuracy on clean and on corrupted images for clean labels linear model
0.92 and 0.81, plain 0.96 and 0.81, plain_2x 0.95 and 0.82, sam 0.95 and 0.83, gsam 0.95 and 0.86, msam 0.94 and 0.84,
sam_on 0.96 and 0.83, fsam 0.95 and 0.83; with 20 % of the training labels drawn at random linear 0.89 and 0.71, plain
0.91 and 0.78, plain_2x 0.88 and 0.67, sam 0.93 and 0.83, gsam 0.92 and 0.77, msam 0.91 and 0.83, sam_on 0.92 and 0.79,
fsam 0.93 and 0.81. Majority class 0.10. 2 min 47 s on 2 CPU cores; --seeds 5 for intervals.

Your own images: a folder (or tar archive) with train/<class>/* and test/<class>/*, or a data set of the Hub; the small
ViT, any other architecture from scratch, or a checkpoint:

    accelerate launch recipes/vit_sam.py --data_dir ./cifar10 --bf16 --seeds 3 --output_dir outputs/cifar10
    accelerate launch recipes/vit_sam.py --dataset_name uoft-cs/cifar100 --label_column fine_label \
        --model_name_or_path microsoft/resnet-18 --from_scratch --image_size 32 --num_train_epochs 100
    accelerate launch recipes/vit_sam.py --data_dir ./flowers --model_name_or_path google/vit-base-patch16-224-in21k \
        --methods plain plain_2x sam gsam --label_noise 0 0.2 --sam_rho 0.05 --bf16

Corruptions are made here, from a part of the test images: noise, blur, contrast, brightness, JPEG and pixelation at
five severities. plain_2x is plain training of twice the epochs, the same compute as two passes a step.
Finished runs are in <output_dir>/results.json: the same command again skips them, and resumes a run that was cut off.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_sharp import SharpConfig, SharpTrainer, last_complete_checkpoint
from hf_sharp.recipes import beforehand, report
from hf_sharp.recipes.tasks import redraw_labels
from hf_sharp.recipes.tasks.augmentation import Augmentation
from hf_sharp.recipes.tasks.corruptions import corrupted_accuracy, corrupted_rows
from hf_sharp.recipes.tasks.domains import accuracy
from hf_sharp.recipes.tasks.image_data import ImageTask, load_digits, load_image_folder, load_image_hub
from hf_sharp.recipes.tasks.image_models import ImageModel, pick_model, small_vit
from hf_sharp.recipes.tasks.images import Batches, Images
from hf_sharp.recipes.tasks.linear import linear_scores

METHODS: dict[str, dict[str, str]] = {  # settings of SharpConfig: a word, or the flag that gives the number
    "plain": {"method": "plain"},
    "plain_2x": {"method": "plain"},
    "sam": {"method": "sam", "rho": "--sam_rho"},
    "gsam": {"method": "gsam", "rho": "--gsam_rho", "alpha": "--gsam_alpha"},
    "msam": {"method": "msam", "rho": "--msam_rho"},
    "sam_on": {"method": "sam_on", "rho": "--sam_on_rho"},
    "fsam": {"method": "fsam", "rho": "--sam_rho", "keep": "--keep"},
}
LINEAR = "linear"
DEFAULTS = {"report_to": "none", "logging_steps": 20, "save_total_limit": 1, "per_device_eval_batch_size": 256}
DEFAULTS |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "weight_decay": 0.05, "remove_unused_columns": False}
DEFAULTS |= {"dataloader_pin_memory": torch.accelerator.is_available()}  # without one, pinning only brings a warning
DEMO = {"output_dir": "outputs/vit_sam", "label_noise": [0.0, 0.2], "num_train_epochs": 40.0, "learning_rate": 3e-3}
DEMO |= {"per_device_train_batch_size": 64, "flip": False, "area": 0.8, "corrupted_samples": 200, "layers": 2}
SCRATCH = {"num_train_epochs": 50.0, "learning_rate": 1e-3, "per_device_train_batch_size": 128}
TUNE = {"num_train_epochs": 3.0, "learning_rate": 5e-5, "per_device_train_batch_size": 32, "save_strategy": "epoch"}


@dataclass
class Arguments:
    """What is compared, on which images, from which model."""

    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"{', '.join(METHODS)}."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds, from --seed upwards."})
    label_noise: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "Shares of random labels."})
    sam_rho: float = field(default=0.1, metadata={"help": "Radius of sam, and of fsam before masking."})
    gsam_rho: float = field(default=0.2, metadata={"help": "Largest radius of gsam, at the largest learning rate."})
    gsam_alpha: float = field(default=0.4, metadata={"help": "gsam: weight of what is removed."})
    msam_rho: float = field(default=1.0, metadata={"help": "Radius of msam."})
    sam_on_rho: float = field(default=0.5, metadata={"help": "Radius of sam_on."})
    keep: float = field(default=0.1, metadata={"help": "fsam: share of the entries that are perturbed."})
    data_dir: str = field(default="", metadata={"help": "Folder or archive of class folders. Default: the digits."})
    dataset_name: str = field(default="", metadata={"help": "The same from the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the first column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the first column of classes."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many, drawn once."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many, drawn once."})
    corrupted_samples: int = field(default=500, metadata={"help": "Corrupt so many of these, in 30 ways each."})
    linear_samples: int = field(default=5000, metadata={"help": "Fit the linear model to at most so many."})
    area: float = field(default=0.25, metadata={"help": "Crops: smallest share of the image; 1 crops nothing."})
    flip: bool = field(default=True, metadata={"help": "Mirror every second image."})
    jitter: float = field(default=0.2, metadata={"help": "Largest change of brightness, contrast, saturation."})
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels. Default: the model's, or 32."})
    model_name_or_path: str = field(default="", metadata={"help": "Hub id or folder. Default: a small ViT."})
    from_scratch: bool = field(default=False, metadata={"help": "Take the architecture only, not the weights."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the small ViT."})
    layers: int = field(default=4, metadata={"help": "Depth of the small ViT."})


def parse() -> tuple[Arguments, TrainingArguments, dict[str, SharpConfig]]:
    """Read the command line over the defaults for its kind of training, and make the methods."""
    parser = HfArgumentParser([Arguments, TrainingArguments])  # pyright: ignore[reportArgumentType]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("data_dir", "dataset_name", "model_name_or_path"):
        first.add_argument(f"--{name}", default="")
    first.add_argument("--from_scratch", nargs="?", const=True, default=False)
    early = first.parse_known_args()[0]
    real = SCRATCH if early.from_scratch or not early.model_name_or_path else TUNE
    own = early.data_dir or early.dataset_name or early.model_name_or_path
    parser.set_defaults(**DEFAULTS | ({"output_dir": "outputs/vit_sam_own"} | real if own else DEMO))
    args, training = parser.parse_args_into_dataclasses(look_for_args_file=False)
    if args.data_dir and args.dataset_name:
        raise ValueError("Give --data_dir or --dataset_name, not both.")
    if args.from_scratch and not args.model_name_or_path:
        raise ValueError("--from_scratch needs --model_name_or_path; the small ViT is always from scratch.")
    for name in ("seeds", "corrupted_samples", "linear_samples", "max_train_samples", "max_eval_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is at least 1; got {getattr(args, name)}.")
    configs = {}
    for label in dict.fromkeys(args.methods):
        if label not in METHODS:
            raise ValueError(f"There is no method '{label}'. Known: {', '.join(METHODS)}.")
        settings = {k: getattr(args, v[2:]) if v.startswith("--") else v for k, v in METHODS[label].items()}
        configs[label] = SharpConfig.from_dict(settings)
        configs[label].build()
    return args, training, configs


def load(args: Arguments) -> ImageTask:
    """Read the images that are asked for."""
    if args.dataset_name:
        columns = args.image_column, args.label_column
        task = load_image_hub(args.dataset_name, args.dataset_config_name, *columns)
    else:
        task = load_image_folder(args.data_dir) if args.data_dir else load_digits()
    train, test = task.train.take(args.max_train_samples), task.test.take(args.max_eval_samples)
    return replace(task, train=train, test=test)


def pick(args: Arguments, task: ImageTask) -> ImageModel:
    """Choose the model that reads them."""
    if args.model_name_or_path:
        return pick_model(args.model_name_or_path, task.classes, args.image_size, args.from_scratch)
    size, channels = (32, 3) if args.data_dir or args.dataset_name else (8, 1)
    return small_vit(task.classes, args.image_size or size, channels, args.hidden_size, args.layers)


def run(trainer: SharpTrainer, checkpoint: str | None, test: Images, corrupted: list[Any]) -> dict[str, Any]:
    """Make one run, from its checkpoint if it has one, and return what came out."""
    trainer.add_callback(timer := report.StepTimer())
    trainer.train(resume_from_checkpoint=checkpoint)
    scores = trainer.evaluate(test, metric_key_prefix="test")
    logits: Any = trainer.predict(corrupted).predictions  # pyright: ignore[reportArgumentType]
    gaps = [entry["sharp_gap"] for entry in trainer.state.log_history if "sharp_gap" in entry]
    measured = {"value": scores["test_accuracy"], "loss": scores["test_loss"], "steps": trainer.state.global_step}
    measured |= {"gap": float(np.mean(gaps)) if gaps else None, "seconds_per_step": timer.seconds_per_step}
    logits = logits[0] if isinstance(logits, tuple) else logits
    return measured | {"corruptions": corrupted_accuracy(logits.argmax(-1).tolist(), corrupted)}


def both(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows as they are and with the accuracy on corrupted images in its place."""
    other = [row | {"value": row["corrupted"], "task": f"{row['task']}, corrupted", "loss": None} for row in rows]
    return {"clean": rows, "corrupted": other}


def summary(rows: list[dict[str, Any]]) -> str:
    """Print the methods on clean and on corrupted images, by kind of corruption, and what the seeds show."""
    parts = []
    for title, each in both(rows).items():
        networks = [row for row in each if row["method"] != LINEAR]
        parts += [f"\n{report.panel_title(rows[0])}, {title} test images", report.table(each)]
        parts += [report.against(networks, b) for b in ("plain", "plain_2x") if any(r["method"] == b for r in each)]
    parts += ["\nMean over severities and seeds", f"{'':10}" + "".join(f"{k:>12}" for k in rows[0]["corruptions"])]
    for name in dict.fromkeys(row["method"] for row in rows):
        means = np.mean([[*row["corruptions"].values()] for row in rows if row["method"] == name], axis=(0, 2))
        parts.append(f"{name:10}" + "".join(f"{mean:12.3f}" for mean in means))
    return "\n".join(parts)


def main() -> None:
    try:  # whatever is wrong with the command or the data is found before any training
        args, training, configs = parse()
        output, first = Path(str(training.output_dir)), training.process_index == 0
        settings = {key: value for key, value in asdict(args).items() if key != "methods"}
        settings = report.keep_settings(output, {**training.to_dict(), **settings, "processes": training.world_size})
        task = load(args)
        for noise in args.label_noise:
            redraw_labels([], noise, len(task.classes), seed=0)
        model = pick(args, task)
        beforehand.need("sklearn", "matplotlib")
        collate = Batches(Augmentation(args.area, args.flip, args.jitter), model.mean, model.std)
        part = Images(task.test.take(args.corrupted_samples), model.size, model.channels)
        corrupted = corrupted_rows(part.pixels(), part.labels)
        beforehand.try_methods(configs, model.make, beforehand.bare(SharpTrainer, training))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"vit_sam.py: {error}") from error

    results, test = output / "results.json", Images(task.test, model.size, model.channels)
    if first:
        report.write_json(results.with_name("settings.json"), settings)
    finished = {report.identity(row) for row in report.read_rows(results)}
    shared = {"recipe": "vit_sam", "task": task.name, "model": args.model_name_or_path or "small ViT"}
    shared |= {"metric": "accuracy", "majority": float(np.bincount(test.labels).max() / len(test))}
    runs = list(product(args.label_noise, range(training.seed, training.seed + args.seeds), [LINEAR, *configs]))
    for number, (noise, seed, label) in enumerate(runs, start=1):
        times = 2 if label.endswith("_2x") else 1
        row: dict[str, Any] = {**shared, "method": label, "label_noise": noise, "seed": seed}
        row["epochs"] = training.num_train_epochs * times
        row["passes"] = configs[label].build().cost if label in configs else 0
        done = report.identity(row) in finished
        if first:
            title = f"[{number}/{len(runs)}] {report.panel_title(row)}: {label}, seed {seed}"
            print(title + ": finished before, kept" * done, flush=True)
        if done or (label == LINEAR and not first):
            continue
        labels = redraw_labels(task.train.labels, noise, len(task.classes), seed)
        train = Images(task.train, model.size, model.channels, augment=True, labels=labels)
        if label == LINEAR:
            row |= dict.fromkeys(("loss", "gap", "seconds_per_step"))
            row["value"], row["corruptions"] = linear_scores(train, test, corrupted, args.linear_samples)
        else:
            folder = output / "runs" / f"{label}_noise{noise:g}_seed{seed}"
            checkpoint, changes = last_complete_checkpoint(folder), {"output_dir": str(folder), "seed": seed}
            changes |= {"num_train_epochs": row["epochs"], "max_steps": max(training.max_steps * times, -1)}
            set_seed(seed)
            network: Any = model.make()
            if checkpoint:
                # transformers#48805: the Trainer cannot read weights that are saved under other names, as a ViT's are.
                network = type(network).from_pretrained(checkpoint, dtype="float32")  # Delete when that is closed.
                print(f"resuming from {checkpoint}" * first, flush=True)
            # transformers#47688: heads ignore num_items_in_batch, which the Trainer counts on. Delete when closed.
            network.accepts_loss_kwargs = False
            parts = {"model": network, "args": replace(training, **changes), "data_collator": collate}
            parts |= {"train_dataset": train, "compute_metrics": accuracy, "method": configs[label]}
            row |= run(SharpTrainer(**parts), checkpoint, test, corrupted)
        row["corrupted"] = float(np.mean([*row["corruptions"].values()]))
        if first:
            rows = report.add_row(results, row)
            # The majority's line, at a tenth, would leave no room for the differences.
            shown = [each | {"majority": None} for part in both(rows).values() for each in part]
            report.plot(shown, results.with_suffix(".png"))
    for noise in args.label_noise if first else ():
        print(f"\n{summary([row for row in report.read_rows(results) if row['label_noise'] == noise])}")
    if first:
        print(f"\nWritten: {results} and {results.with_suffix('.png')}")


if __name__ == "__main__":
    main()
