r"""Fine-tune adapters of a language model with LoRA and its sharpness-aware kin; report what is gained and forgotten.

The demo (no network: a small Llama reads the docstrings of the standard library, then adapters learn its code):

    accelerate launch recipes/llm_lora_sam.py

Expected (perplexities of code and docstrings, 3 seeds, 3 min 19 s on 2 CPU cores): before 310 and 75, lora 23.0, 171,
lora_sam 23.5, 170, bi_lora 23.0, 171, nbar 23.1, 172. At equal gain none forgets less by more than the seeds differ.

Your own model and text; what the model should not forget is --ood_file or --ood_dataset_name (may be left out):

    accelerate launch recipes/llm_lora_sam.py --model_name_or_path Qwen/Qwen3-0.6B --train_file code.jsonl \
        --text_column content --ood_dataset_name Salesforce/wikitext --ood_dataset_config_name wikitext-2-raw-v1 --bf16
    accelerate launch recipes/llm_lora_sam.py --model_name_or_path meta-llama/Llama-3.1-8B --dataset_name my/chats \
        --chat --bf16 --gradient_checkpointing --load_in_4bit --methods lora bi_lora --seeds 1

--chat trains with TRL on a column `messages`, or `prompt` and `completion`. Several GPUs: the same command (DDP), or
--config_file with fsdp_version: 2 (FSDP2). "At equal gain" compares out-of-domain perplexities where two runs, on
their way, were equally good in-domain. The same command again skips finished runs, and resumes one that was cut off.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import is_bitsandbytes_available

import hf_sharp
from hf_sharp import SharpConfig, SharpTrainer, last_complete_checkpoint
from hf_sharp.recipes import beforehand, report
from hf_sharp.recipes.tasks import chats
from hf_sharp.recipes.tasks import domains as data
from hf_sharp.recipes.tasks.pretraining import pretrain

METHODS: dict[str, dict[str, str]] = {  # settings of SharpConfig: a word, or the flag that gives the number
    "lora": {"method": "plain"},
    "lora_sam": {"method": "sam", "rho": "--sam_rho"},
    "bi_lora": {"method": "bi_lora", "rho": "--bi_lora_rho", "rank": "--bi_lora_rank"},
    "nbar": {"method": "bar", "mu": "--bar_mu"},
    "flat_lora": {"method": "flat_lora", "sigma": "--flat_lora_sigma"},
}
BASE, PLACES = "lora", ("in-domain", "out-of-domain")
DEFAULTS = {"output_dir": "outputs/llm_lora_sam", "report_to": "none", "logging_steps": 50, "save_total_limit": 1}
DEFAULTS |= {"dataloader_pin_memory": torch.accelerator.is_available(), "eval_strategy": "steps"}
DEFAULTS |= {"lr_scheduler_type": "constant_with_warmup"}  # so that a point on the way is as settled as the end
SMALL = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64, "max_steps": 150, "learning_rate": 3e-3}
SMALL |= {"block_size": 64, "disable_tqdm": True, "max_eval_samples": 300, "warmup_steps": 10, "save_strategy": "no"}
LARGE = {"num_train_epochs": 1.0, "learning_rate": 2e-4, "warmup_steps": 0.03, "save_strategy": "epoch"}


@dataclass
class Arguments:
    """What is compared, on which data, from which model."""

    methods: list[str] = field(default_factory=lambda: list(METHODS)[:4], metadata={"help": f"{', '.join(METHODS)}."})
    seeds: int = field(default=3, metadata={"help": "Number of seeds, from --seed upwards."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Their scaling is this over the rank."})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "PEFT's target_modules."})
    sam_rho: float = field(default=0.05, metadata={"help": "Radius of lora_sam, over all adapters."})
    bi_lora_rho: float = field(default=0.05, metadata={"help": "Radius of bi_lora's auxiliary adapter."})
    bi_lora_rank: int = field(default=8, metadata={"help": "Rank of bi_lora's auxiliary adapter."})
    bar_mu: float = field(default=0.5, metadata={"help": "Strength of nbar, times the learning rate."})
    flat_lora_sigma: float = field(default=0.05, metadata={"help": "Noise of flat_lora on the base weights."})
    train_file: str = field(default="", metadata={"help": "Text to train on: .txt, .csv, .jsonl or a folder."})
    validation_file: str = field(default="", metadata={"help": "Its test rows. Default: a tenth held back."})
    ood_file: str = field(default="", metadata={"help": "Text that should not be forgotten."})
    dataset_name: str = field(default="", metadata={"help": "From the Hub: what to train on."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    ood_dataset_name: str = field(default="", metadata={"help": "From the Hub: what should not be forgotten."})
    ood_dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    chat: bool = field(default=False, metadata={"help": "Rows of messages, or of prompt and completion; needs TRL."})
    block_size: int = field(default=1024, metadata={"help": "Tokens of an example; with --chat at most."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many, drawn once."})
    max_eval_samples: int | None = field(default=1000, metadata={"help": "Evaluate on so many, drawn once."})
    evaluations: int = field(default=6, metadata={"help": "How often each run is evaluated on its way."})
    model_name_or_path: str = field(default="", metadata={"help": "Hub id or folder, with safetensors."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Base weights in NF4 (QLoRA); needs bitsandbytes."})
    pretrain_steps: int = field(default=600, metadata={"help": "Without a model: steps on the docstrings."})


def parse() -> tuple[Arguments, TrainingArguments, dict[str, SharpConfig]]:
    """Read the command line over the defaults for the small model or the user's, and make the methods."""
    parser = HfArgumentParser([Arguments, TrainingArguments])  # pyright: ignore[reportArgumentType]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model_name_or_path")
    parser.set_defaults(**DEFAULTS | (LARGE if first.parse_known_args()[0].model_name_or_path else SMALL))
    args, training = parser.parse_args_into_dataclasses(look_for_args_file=False)
    if bool(args.train_file) + bool(args.dataset_name) > 1 or bool(args.ood_file) + bool(args.ood_dataset_name) > 1:
        raise ValueError("Give a file or a data set of the Hub, not both.")
    if bool(args.model_name_or_path) != bool(args.train_file or args.dataset_name):
        raise ValueError("--model_name_or_path goes with --train_file or --dataset_name; without both the demo runs.")
    if args.chat and not args.model_name_or_path:
        raise ValueError("--chat is for a model of your own: --model_name_or_path.")
    if args.load_in_4bit and not is_bitsandbytes_available():
        raise ValueError("--load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    for name, least in {"seeds": 1, "block_size": 2, "pretrain_steps": 1, "evaluations": 2, "lora_r": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is at least {least}; got {getattr(args, name)}.")
    if args.chat:
        _ = hf_sharp.SharpSFTTrainer  # without TRL this says how to get it
    training.eval_steps = 1 / args.evaluations
    configs = {}
    for label in dict.fromkeys([BASE, *args.methods]):
        if label not in METHODS:
            raise ValueError(f"There is no method '{label}'. Known: {', '.join(METHODS)}.")
        settings = {k: getattr(args, v[2:]) if v.startswith("--") else v for k, v in METHODS[label].items()}
        configs[label] = SharpConfig.from_dict(settings)
        configs[label].build()
    return args, training, configs


def load(args: Arguments) -> tuple[Any, Any, dict[str, Any], list[dict[str, Any]]]:
    """Return a tokenizer, what to train on, what to evaluate on, and what the small model reads beforehand."""
    if not args.model_name_or_path:
        outside, inside = data.load_domains()
        tokenizer: Any = data.byte_tokenizer([text for text, _ in outside.train], max_length=args.block_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        other = args.ood_file, args.ood_dataset_name, args.ood_dataset_config_name
        outside = data.pick_domain(*other, args.text_column, test_share=1.0) if any(other) else None
        own = args.train_file, args.dataset_name, args.dataset_config_name
        inside = None if args.chat else data.pick_domain(*own, args.text_column, test_file=args.validation_file)
    limits = {"train": args.max_train_samples, "test": args.max_eval_samples}

    def blocks(domain: data.Domain, part: str, limit: int | None) -> Any:
        return Dataset.from_list(data.encode(domain, part, tokenizer, args.block_size, limit=limit))

    if inside is None:
        parts = chats.load_chats(args.train_file, args.dataset_name, args.dataset_config_name, args.validation_file)
        parts = {part: chats.some(rows, limits[part]) for part, rows in parts.items()}
    else:
        parts = {part: blocks(inside, part, limit) for part, limit in limits.items()}
    tests = {PLACES[0]: parts["test"]} | ({PLACES[1]: blocks(outside, "test", limits["test"])} if outside else {})
    before = blocks(outside, "train", None) if outside and not args.model_name_or_path else []
    return tokenizer, parts["train"], tests, before


def adapted(source: str, args: Arguments, training: TrainingArguments) -> Any:
    """Load the model and put adapters on it; they are float32, so that a short ascent step is not rounded away."""
    options: dict[str, Any] = {"dtype": "bfloat16" if training.bf16 else "float32"}
    checkpointing = bool(training.gradient_checkpointing)
    if args.load_in_4bit:
        quantised = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantised["bnb_4bit_compute_dtype"] = options["dtype"]
        options["quantization_config"] = BitsAndBytesConfig(**quantised)
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.enable_input_require_grads()
    sizes: dict[str, Any] = {"r": args.lora_r, "lora_alpha": args.lora_alpha}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=args.lora_target_modules, **sizes))


def trainer_of(model: Any, tokenizer: Any, args: Arguments, training: TrainingArguments, **parts: Any) -> Any:
    """Build the trainer: TRL's for chats, the plain one for blocks of text."""
    if not args.chat:
        return SharpTrainer(model, training, default_data_collator, processing_class=tokenizer, **parts)
    from trl import SFTConfig

    options = {**training.to_dict(), "hub_token": training.hub_token, "max_length": args.block_size}
    return hf_sharp.SharpSFTTrainer(model, SFTConfig(**options), processing_class=tokenizer, **parts)


def run(trainer: Any, places: list[str]) -> dict[str, Any]:
    """Make one run, from its last checkpoint if it has one; return where it stood on its way, and what it took."""
    trainer.add_callback(timer := report.StepTimer())
    trainer.add_callback(memory := report.PeakMemory())
    start = {"step": -1, **trainer.evaluate()}
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(trainer.args.output_dir)))
    end = {"step": trainer.state.global_step, **trainer.evaluate()}
    path = report.perplexities([start, *trainer.state.log_history, end], places)
    took = {"seconds_per_step": timer.seconds_per_step, "memory": memory.peak, "steps": trainer.state.global_step}
    return {"path": path, "value": path[-1][0], **took}


def main() -> None:
    try:  # whatever is wrong with the command or the data is found before any training
        args, training, configs = parse()
        output, first = Path(str(training.output_dir)), training.process_index == 0
        own = {"methods": None, "processes": training.world_size}
        settings = report.keep_settings(output, training.to_dict() | asdict(args) | own)
        beforehand.need("matplotlib")
        tokenizer, train, tests, before = load(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"llm_lora_sam.py: {error}") from error

    results, source, places = output / "results.json", args.model_name_or_path or str(output / "start"), list(tests)
    if first:
        report.write_json(results.with_name("settings.json"), settings)
    if before:
        changes = {"max_steps": args.pretrain_steps, "lr_scheduler_type": "cosine"}
        pretrain(Path(source), before, tokenizer, training, args.block_size, **changes)
    parts = {"train_dataset": train, "eval_dataset": tests}
    try:  # a method that refuses this model is found before any of them trains
        beforehand.try_methods(
            configs,
            partial(adapted, source, args, training),
            lambda model, method: trainer_of(model, tokenizer, args, training, method=method, **parts),
        )
    except ValueError as error:
        raise SystemExit(f"llm_lora_sam.py: {error}") from error
    shared = {"recipe": "llm_lora_sam", "task": "chat" if args.chat else "text", "model": args.model_name_or_path}
    shared |= {"metric": "perplexity", "majority": None, "epochs": training.num_train_epochs}
    finished = set(map(report.identity, report.read_rows(results)))
    runs = list(product(range(training.seed, training.seed + args.seeds), configs))
    for number, (seed, label) in enumerate(runs, start=1):
        row = {**shared, "method": label, "seed": seed, "passes": configs[label].build().cost}
        done = report.identity(row) in finished
        if first:
            print(f"[{number}/{len(runs)}] {label}, seed {seed}" + ": finished before, kept" * done, flush=True)
        if done:
            continue
        set_seed(seed)  # the same new adapters for each method
        options = replace(training, seed=seed, output_dir=str(output / "runs" / f"{label}_seed{seed}"))
        model = adapted(source, args, options)
        row |= run(trainer_of(model, tokenizer, args, options, method=configs[label], **parts), places)
        rows = report.add_row(results, row) if first else []
        if rows and len(places) > 1:
            report.plot_paths(rows, results.with_suffix(".png"), places)
    if first:
        print(f"\n{report.exchange(report.read_rows(results), places, BASE)}\n\nWritten: {results}")


if __name__ == "__main__":
    main()
