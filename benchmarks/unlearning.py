"""Which smoothing makes unlearning resist relearning? A grid of objectives, smoothings and attacks on TOFU.

    python benchmarks/unlearning.py prepare --data_dir ./tofu --work outputs/unlearning
    python benchmarks/unlearning.py run --data_dir ./tofu --work outputs/unlearning --part 0/2 &
    python benchmarks/unlearning.py run --data_dir ./tofu --work outputs/unlearning --part 1/2
    python benchmarks/unlearning.py report --work outputs/unlearning

`prepare` trains a small Llama on some authors until it knows their answers by heart, and one on all but those to
forget. `run` unlearns and attacks, cell by cell; every number is appended to <work>/<part>.jsonl at once, and what is
there already is not done again, so that a run can be cut off and go on, also with other parts. `report` prints the
tables and draws the curves of what is there.

All smoothings of an objective share learning rate, steps, batches and weights. "none, 1.5 x steps" is the control of
the same compute as sam and gp; rs and cr spend more. Compare at like forget NLL: a shallower one is easier to relearn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import unlearning_tables
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from unlearning_tables import BEFORE, GOLD, LONGER, NONE

from hf_sharp import (
    NPO,
    GradientDifference,
    SimNPO,
    UnlearnTrainer,
    WeightAveraging,
    curvature_regularization,
    gradient_penalty,
    randomized_smoothing,
    sam,
)
from hf_sharp.evaluation import rouge_l_recall, score, summary
from hf_sharp.recipes import report
from hf_sharp.recipes.tasks import unlearning as task
from hf_sharp.recipes.tasks.domains import byte_tokenizer
from hf_sharp.recipes.tasks.fictions import Facts, attack_sets, load_facts
from hf_sharp.unlearning import (
    Encoder,
    ForgetRetainCollator,
    ForgetRetainDataset,
    encode_rows,
    quantize,
    relearn,
)
from hf_sharp.unlearning._encoding import IGNORED

LENGTH = 192
OBJECTIVES: dict[str, Any] = {
    "npo": NPO(beta=0.1, retain_weight=20.0),
    "simnpo": SimNPO(beta=1.0, retain_weight=1.0),
    "graddiff": GradientDifference(retain_weight=1.0, max_nll=4.0),
}
SMOOTHINGS: dict[str, tuple[Any, float]] = {  # the method of the forget term, and how many times the steps
    NONE: (None, 1.0),
    LONGER: (None, 1.5),
    "sam": (sam(rho=0.1), 1.0),
    "rs": (randomized_smoothing(sigma=0.002), 1.0),
    "gp": (gradient_penalty(lam=0.1), 1.0),
    "cr": (curvature_regularization(lam=1.0), 1.0),
    "wa": (None, 1.0),
}
# Rows, of which set, learning rate, steps, and when it is measured.
ATTACKS: dict[str, tuple[int, str, float, tuple[int, ...]]] = {
    "4 rows": (4, "forget", 5e-4, (0, 5, 10, 20)),
    "20 rows": (20, "forget", 5e-4, (0, 2, 5, 10, 20)),
    "40 rows": (40, "forget", 5e-4, (0, 5, 10, 20)),
    "20 rows, lr 2e-4, 100 steps": (20, "forget", 2e-4, (0, 10, 25, 50, 100)),
    "20 rows, lr 2e-3, 100 steps": (20, "forget", 2e-3, (0, 1, 2, 5, 10, 25, 100)),
    "20 unrelated rows": (20, "retain", 5e-4, (0, 10, 20)),
}


def facts_of(args: argparse.Namespace) -> Facts:
    return load_facts(args.data_dir, forget_people=args.forget_people, retain_people=args.retain_people)


def encoder_of(args: argparse.Namespace) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(args.work / "knows"), LENGTH)


def load(args: argparse.Namespace, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(args.work / name, dtype="float32")


def arguments(folder: str, **settings: Any) -> TrainingArguments:
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(folder, dataloader_pin_memory=False, **quiet, **settings)


def prepare(args: argparse.Namespace) -> None:
    facts = facts_of(args)
    everything = load_facts(args.data_dir)
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in everything.forget + everything.retain]
    tokenizer = byte_tokenizer(texts, 4096, LENGTH)
    encode = Encoder(tokenizer, LENGTH)
    settings: dict[str, Any] = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 20}
    for name, rows in (("knows", facts.forget + facts.retain), ("gold", facts.retain)):
        started = time.process_time()
        set_seed(0)
        options = arguments(str(args.work / name), num_train_epochs=args.teach_epochs, **settings)
        task.teach(
            lambda: task.small_llama(tokenizer, LENGTH),
            args.work / name,
            encode_rows(rows, encode),
            tokenizer,
            options,
        )
        numbers = summary(score(load(args, name), encode_rows(facts.forget, encode)))
        print(f"{name}: forget {numbers}, {time.process_time() - started:.0f} s of processor time", flush=True)


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Objective, smoothing and seed of each cell: seed by seed, so that a run cut off leaves whole seeds."""
    yield from (("", BEFORE, 0), ("", GOLD, 0))
    for seed in range(args.seeds):
        for objective in args.objectives:
            yield from ((objective, smoothing, seed) for smoothing in args.smoothings)


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("objective", "smoothing", "seed", "attack"))


def read(work: Path) -> list[dict[str, Any]]:
    """All numbers that are there; a last line that was cut off does not count."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(work.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                found.setdefault(key(record), record)
    return list(found.values())


def unlearn(args: argparse.Namespace, cell: tuple[str, str, int], examples: tuple[list, list], encode: Encoder) -> Any:
    objective, smoothing, seed = cell
    method, times = SMOOTHINGS[smoothing]
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        steps = round(args.steps * times)
        trainer = UnlearnTrainer(
            model=load(args, "knows"),
            args=arguments(folder, max_steps=steps, learning_rate=args.lr, per_device_train_batch_size=32, seed=seed),
            objective=OBJECTIVES[objective],
            method=method,
            train_dataset=ForgetRetainDataset(*examples, seed=seed),
            data_collator=ForgetRetainCollator(encode.tokenizer),
            callbacks=[WeightAveraging(start=0.5, every=5)] if smoothing == "wa" else [],
        )
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)


def run(args: argparse.Namespace) -> None:
    facts, encode = facts_of(args), encoder_of(args)
    forget, retain = encode_rows(facts.forget, encode), encode_rows(facts.retain, encode)
    part, parts = map(int, args.part.split("/"))
    mine = [cell for number, cell in enumerate(cells(args)) if number % parts == part]
    with (args.work / f"{part}-{parts}.jsonl").open("a", encoding="utf-8") as file:
        for number, cell in enumerate(mine, start=1):
            names: dict[str, Any] = dict(zip(("objective", "smoothing", "seed"), cell, strict=True))
            done = {key(line) for line in read(args.work)}
            todo = [attack for attack in ("", *args.attacks) if (*cell, attack) not in done]
            if not todo:
                continue
            begun = time.process_time()
            model = {BEFORE: "knows", GOLD: "gold"}.get(cell[1])
            model = load(args, model) if model else kept(args, cell, (forget, retain), encode)
            for attack in todo:
                started = time.process_time()
                if attack:
                    found = attacked(model, attack, facts, forget, retain, cell[2])
                else:
                    found = {"unlearning": started - begun, **judge(model, facts, forget, retain, encode)}
                record = {**names, "attack": attack, "seconds": time.process_time() - started, **found}
                file.write(json.dumps(record) + "\n")
                file.flush()
            taken = time.process_time() - begun
            print(f"[{number}/{len(mine)}] {cell}: {taken:.0f} s of processor time", flush=True)


def kept(args: argparse.Namespace, cell: tuple[str, str, int], examples: tuple[list, list], encode: Encoder) -> Any:
    """The unlearned model, unlearned now if it was not before: further attacks need no further unlearning."""
    path = args.work / "unlearned" / f"{'_'.join(map(str, cell))}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(unlearn(args, cell, examples, encode).state_dict(), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    model = load(args, "knows")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def judge(model: Any, facts: Facts, forget: list, retain: list, encode: Encoder) -> dict[str, Any]:
    found: dict[str, Any] = {"forget": summary(score(model, forget)), "retain": summary(score(model, retain))}
    found |= {f"{bits} bits": summary(score(quantize(model, bits), forget)) for bits in (8, 4)}
    prompts, answers = (
        [encode.prompt(row["question"]) for row in facts.forget],
        [row["answer"] for row in facts.forget],
    )
    longest = max(sum(label != IGNORED for label in example["labels"]) for example in forget)
    return found | {"rouge": fmean(rouge_l_recall(model, encode.tokenizer, prompts, answers, longest))}


def attacked(model: Any, attack: str, facts: Facts, forget: list, retain: list, seed: int) -> dict[str, Any]:
    count, source, lr, times = ATTACKS[attack]
    sets = attack_sets(forget, facts.per_person, count)
    samples = sets["relearned"] if source == "forget" else retain[-count:]
    sets = {name: sets[name] for name in ("relearned", "same person", "untouched") if name in sets}
    settings: dict[str, Any] = {"steps": max(times), "lr": lr, "batch_size": None, "seed": seed, "measure_at": times}
    return {"curve": relearn(model, samples, measure=sets, **settings)}


def tables(args: argparse.Namespace) -> None:
    unlearning_tables.show(read(args.work), OBJECTIVES, [BEFORE, GOLD, *SMOOTHINGS], list(ATTACKS), args.work)


def keep_settings(args: argparse.Namespace) -> None:
    """Numbers of other settings are not put beside these."""
    settings = {
        name: getattr(args, name) for name in ("forget_people", "retain_people", "teach_epochs", "steps", "lr")
    }
    settings["data"] = args.data_dir
    for table in (OBJECTIVES, SMOOTHINGS, ATTACKS):
        settings |= {name: repr(value) for name, value in table.items()}
    try:
        report.write_json(args.work / "settings.json", report.keep_settings(args.work, settings))
    except ValueError as error:
        raise SystemExit(f"unlearning.py: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("prepare", "run", "report"))
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument(
        "--data_dir", default="", help="folder with forget10.json and retain90.json; default: made-up facts"
    )
    parser.add_argument("--forget_people", type=int, default=4)
    parser.add_argument("--retain_people", type=int, default=16)
    parser.add_argument("--teach_epochs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--smoothings", nargs="+", default=list(SMOOTHINGS), choices=SMOOTHINGS)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--part", default="0/1", help="which share of the cells, i/n")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.mode != "report":
        keep_settings(args)
    {"prepare": prepare, "run": run, "report": tables}[args.mode](args)


if __name__ == "__main__":
    main()
