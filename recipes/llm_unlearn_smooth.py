r"""Unlearn with and without smoothing, then attack what came out by relearning: does the forgotten come back?

The demo (no network: a small Llama learns made-up facts by heart, and another one all but a tenth of them):

    accelerate launch recipes/llm_unlearn_smooth.py

Expected there (one seed, 1 min 46 s on 2 CPU cores): the probability of the answers to forget falls from 0.97 to 0.05
with NPO and to 0.05 with NPO and SAM (a model that never knew them: 0.01); what is retained stands at 0.93 and 0.92,
from 0.97. Relearning 20 rows brings *other* forgotten rows back by 0.14 without smoothing, by 0.14 with half as many
steps again (SAM's compute), by 0.06 with SAM. The relearned rows themselves come back to 0.98 in every case: smoothing
slows relearning, it does not block it. With --seeds 3 the difference to SAM is 0.09 +/- 0.03.

Real models; without --teach_epochs a given model is taken as one that knows the facts already:

    accelerate launch recipes/llm_unlearn_smooth.py --dataset_name locuslab/TOFU --lora --bf16 \
        --model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
        --gold_model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90
    accelerate launch recipes/llm_unlearn_smooth.py --data_dir ./tofu --forget_people 4 --retain_people 16 --seeds 3

Finished runs are in <output_dir>/results.json: the same command again skips them.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed

from hf_sharp import Objective, SharpConfig, UnlearnTrainer, WeightAveraging
from hf_sharp.recipes import beforehand, report
from hf_sharp.recipes.tasks import domains, fictions
from hf_sharp.recipes.tasks import unlearning as task
from hf_sharp.unlearning import (
    OBJECTIVES,
    Encoder,
    ForgetRetainCollator,
    ForgetRetainDataset,
    encode_rows,
    options_of,
    read_objective,
)

SMOOTHINGS: dict[str, dict[str, str]] = {  # settings of SharpConfig: a word, or the flag that gives the number
    "sam": {"method": "sam", "rho": "--rho"},
    "asam": {"method": "asam", "rho": "--asam_rho"},
    "tram": {"method": "tram", "reference": "noise", "sigma": "--tram_sigma"},
    "rs": {"method": "randomized_smoothing", "sigma": "--rs_sigma"},
    "gp": {"method": "gradient_penalty", "lam": "--gp_lam"},
    "cr": {"method": "curvature_regularization", "lam": "--cr_lam"},
    "wa": {"method": "plain"},  # and a callback
}
BEFORE, GOLD, REFUSAL = "before", "never knew", "I do not know."
DEFAULTS = {"output_dir": "outputs/llm_unlearn_smooth", "report_to": "none", "save_strategy": "no"}
DEFAULTS |= {"dataloader_pin_memory": False, "logging_steps": 50, "disable_tqdm": True}
SMALL = {"max_steps": 50, "learning_rate": 1e-3, "per_device_train_batch_size": 20, "retain_weight": 20.0, "rho": 0.1}
SMALL |= {"teach_epochs": 32, "max_length": 128, "relearn_lr": 5e-4}
LARGE = {"num_train_epochs": 5.0, "learning_rate": 1e-5, "per_device_train_batch_size": 8}


@dataclass
class Arguments:
    """What is forgotten, by which objective and smoothing, and how it is attacked."""

    objective: str = field(default="npo", metadata={"help": f"{', '.join(OBJECTIVES)}."})
    beta: float | None = field(default=None, metadata={"help": "Of npo, simnpo, dpo, idk; default: the paper's."})
    layer: int | None = field(default=None, metadata={"help": "Of rmu: which block's outputs are changed."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on what is retained."})
    smoothing: list[str] = field(default_factory=lambda: ["sam"], metadata={"help": f"{', '.join(SMOOTHINGS)}."})
    rho: float = field(default=0.01, metadata={"help": "Radius of sam."})
    asam_rho: float = field(default=0.5, metadata={"help": "Radius of asam."})
    tram_sigma: float = field(default=0.1, metadata={"help": "Noise on the inputs by which tram finds its radius."})
    rs_sigma: float = field(default=0.001, metadata={"help": "Noise on the weights, rs."})
    gp_lam: float = field(default=0.1, metadata={"help": "Weight of the penalty, gp."})
    cr_lam: float = field(default=1.0, metadata={"help": "Weight of the penalty, cr."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds, from --seed upwards."})
    relearn_samples: int = field(default=20, metadata={"help": "The attack: how many rows it learns from,"})
    relearn_steps: int = field(default=20, metadata={"help": "in how many steps of all these rows,"})
    relearn_lr: float = field(default=1e-5, metadata={"help": "at which learning rate of AdamW."})
    data_dir: str = field(default="", metadata={"help": "Folder with forget10.json, retain90.json as in TOFU."})
    dataset_name: str = field(default="", metadata={"help": "The same from the Hub: locuslab/TOFU."})
    split: str = field(default="forget10", metadata={"help": "What is to be forgotten; the rest is retained."})
    forget_people: int | None = field(default=None, metadata={"help": "Only so many authors to forget."})
    retain_people: int | None = field(default=None, metadata={"help": "Only so many authors to retain."})
    max_length: int = field(default=256, metadata={"help": "Longest row in tokens."})
    model_name_or_path: str = field(default="", metadata={"help": "Hub id or folder; default: a small Llama."})
    gold_model_name_or_path: str = field(default="", metadata={"help": "One that never saw what is forgotten."})
    teach_epochs: int = field(default=0, metadata={"help": "Epochs by which the facts are learned beforehand."})
    teach_lr: float = field(default=3e-3, metadata={"help": "Learning rate of that."})
    lora: bool = field(default=False, metadata={"help": "Unlearn by adapters, merged before the attack."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})


def parse() -> tuple[Arguments, TrainingArguments, dict[str, tuple[SharpConfig | None, float]]]:
    """Read the command line over the defaults for the small model or the user's, and make the runs."""
    parser = HfArgumentParser([Arguments, TrainingArguments])  # pyright: ignore[reportArgumentType]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model_name_or_path")
    parser.set_defaults(**DEFAULTS | (LARGE if first.parse_known_args()[0].model_name_or_path else SMALL))
    args, training = parser.parse_args_into_dataclasses(look_for_args_file=False)
    for name, least in {"seeds": 1, "relearn_steps": 1, "teach_epochs": 0 if args.model_name_or_path else 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is at least {least}; got {getattr(args, name)}.")
    runs: dict[str, tuple[SharpConfig | None, float]] = {task.NONE: (None, 1.0)}
    for label in dict.fromkeys(args.smoothing):
        if label not in SMOOTHINGS:
            raise ValueError(f"There is no smoothing '{label}'. Known: {', '.join(SMOOTHINGS)}.")
        settings = {k: getattr(args, v[2:]) if v.startswith("--") else v for k, v in SMOOTHINGS[label].items()}
        config = SharpConfig.from_dict(settings)
        times = (config.build().cost + 1) / 2  # of the passes of a step, half are over what is retained
        runs |= {f"none, {times:g} x steps": (None, times)} if times > 1 else {}  # the control: the same compute
        runs[label] = (config, 1.0)
    return args, training, runs


def objective_of(args: Arguments) -> Objective:
    """Give the objective those of the settings that it takes."""
    known = options_of(args.objective) if args.objective in OBJECTIVES else ()
    own = {key: getattr(args, key) for key in ("beta", "layer", "retain_weight") if key in known}
    return read_objective({"objective": args.objective, **{k: v for k, v in own.items() if v is not None}})


def starts(args: Arguments, training: TrainingArguments, facts: fictions.Facts, encode: Encoder) -> tuple[str, str]:
    """Say where the model lies that knows everything, and where the one that never saw what is to be forgotten."""
    if not args.teach_epochs:
        return args.model_name_or_path, args.gold_model_name_or_path
    folders = Path(str(training.output_dir), "knows"), Path(str(training.output_dir), "gold")
    learning: dict[str, Any] = {"learning_rate": args.teach_lr, "num_train_epochs": args.teach_epochs, "max_steps": -1}
    learning |= {"per_device_train_batch_size": 32, "warmup_steps": 20, "weight_decay": 0.0}
    small = partial(task.small_llama, encode.tokenizer, args.max_length)
    make = partial(load, args.model_name_or_path) if args.model_name_or_path else small
    for folder, rows in zip(folders, (facts.forget + facts.retain, facts.retain), strict=True):
        set_seed(training.seed)
        task.teach(make, folder, encode_rows(rows, encode), encode.tokenizer, replace(training, **learning))
    return str(folders[0]), str(folders[1])


def load(path: str) -> Any:
    # Weights in float32, under autocast with --bf16: a short ascent step would be lost in 16-bit weights.
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32")


def unlearn(
    model: Any,
    label: str,
    run: tuple[SharpConfig | None, float],
    pairs: Any,
    tokenizer: Any,
    args: Arguments,
    options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Unlearn, for so many times as many steps as were asked for; return the model and what it took."""
    if args.lora:
        from peft import LoraConfig, get_peft_model

        lora = {"r": args.lora_r, "lora_alpha": 2 * args.lora_r, "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    method, times = run
    steps = max(round(options.max_steps * times), -1)
    trainer = UnlearnTrainer(
        model=model,
        args=replace(options, max_steps=steps, num_train_epochs=options.num_train_epochs * times),
        objective=objective_of(args),
        method=method,
        train_dataset=pairs,
        data_collator=ForgetRetainCollator(tokenizer),
        callbacks=[timer := report.StepTimer(), *([WeightAveraging()] if label == "wa" else [])],
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    taken = {"seconds_per_step": timer.seconds_per_step, "steps": trainer.state.global_step}
    return model.merge_and_unload() if args.lora else model, taken


def main() -> None:
    try:  # whatever is wrong with the command or the data is found before any training
        args, training, runs = parse()
        beforehand.need("rouge_score", "matplotlib", *(["peft"] if args.lora else []))
        objective = repr(objective_of(args))
        output = Path(str(training.output_dir))
        settings = {key: value for key, value in asdict(args).items() if key != "smoothing"}
        settings = report.keep_settings(output, {**training.to_dict(), **settings, "processes": training.world_size})
        facts = fictions.load_facts(
            args.data_dir, args.dataset_name, args.split, args.forget_people, args.retain_people
        )
        if args.model_name_or_path:
            tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        else:
            texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in facts.forget + facts.retain]
            tokenizer = domains.byte_tokenizer(texts, 1024 if facts.name == "made-up facts" else 4096, args.max_length)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        encode = Encoder(tokenizer, args.max_length)
        refused = [{"alternative": REFUSAL} if args.objective in ("dpo", "idk") else {}] * len(facts.forget)
        forget = encode_rows([a | b for a, b in zip(refused, facts.forget, strict=True)], encode)
        retain = encode_rows(facts.retain, encode)
        sets = {"forget": forget, "retain": retain[:200]}
        sets |= fictions.attack_sets(forget, facts.per_person, args.relearn_samples)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"llm_unlearn_smooth.py: {error}") from error

    first, results = training.process_index == 0, output / "results.json"
    if first:
        report.write_json(results.with_name("settings.json"), settings)
    knows, gold = starts(args, training, facts, encode)
    shared = {"recipe": "llm_unlearn_smooth", "task": f"{objective} on {facts.name}", "model": args.model_name_or_path}
    shared |= {"metric": "gain of untouched rows by relearning", "majority": None, "epochs": training.num_train_epochs}
    finished = set(map(report.identity, report.read_rows(results)))
    plan = [(training.seed, BEFORE), *([(training.seed, GOLD)] if gold else [])]
    plan += product(range(training.seed, training.seed + args.seeds), runs)
    for number, (seed, label) in enumerate(plan, start=1):
        passes = 0 if label in (BEFORE, GOLD) else 2 if (method := runs[label][0]) is None else method.build().cost + 1
        row = {**shared, "method": label, "seed": seed, "passes": passes, "seconds_per_step": None, "steps": 0}
        done = report.identity(row) in finished
        if first:
            print(f"[{number}/{len(plan)}] {label}, seed {seed}" + ": finished before, kept" * done, flush=True)
        if done:
            continue
        set_seed(seed)
        model = load(gold if label == GOLD else knows)
        if label in runs:
            pairs = ForgetRetainDataset(forget, retain, seed)
            options = replace(training, seed=seed, output_dir=str(output / "runs" / f"{number}"))
            model, taken = unlearn(model, label, runs[label], pairs, tokenizer, args, options)
            row |= taken
        attack = {"steps": args.relearn_steps, "lr": args.relearn_lr, "batch_size": None, "seed": seed}
        row |= task.judge(model, encode, facts.forget, sets, attack)
        if label == BEFORE and row["forget"]["probability"] < 0.9:
            print(f"It never knew: probability {row['forget']['probability']:.2f} before. Raise --teach_epochs.")
        if first:
            task.plot(report.add_row(results, row), results.with_suffix(".png"))
    if first:
        print(f"\n{objective}\n{task.table(report.read_rows(results))}\n\nWritten: {results}, {results.stem}.png")


if __name__ == "__main__":
    main()
