"""What recipes on unlearning share: a small model that learns facts by heart, its judgement, and tables of that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_sharp.recipes import report
from hf_sharp.unlearning._encoding import IGNORED, Encoder, Example, pad
from hf_sharp.unlearning._evaluation.generation import rouge_l_recall
from hf_sharp.unlearning._evaluation.likelihood import score, summary
from hf_sharp.unlearning._quantize import quantize
from hf_sharp.unlearning._relearn import relearn

Row = dict[str, Any]
NONE = "none"  # the run without smoothing, which the others are compared with


def small_llama(tokenizer: Any, max_length: int) -> LlamaForCausalLM:
    """Make the language model that learns some hundred rows by heart in less than a minute on a processor.

    Args:
        tokenizer: its tokenizer.
        max_length: longest row in tokens.

    Returns:
        A two-layer Llama, 128 wide, with tied embeddings and random weights from the global stream.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def teach(
    make_model: Callable[[], Any], folder: Path, examples: Sequence[Example], tokenizer: Any, args: TrainingArguments
) -> None:
    """Train a model until it knows examples by heart, and save it; do nothing if it is there.

    Args:
        make_model: gives the model to begin with.
        folder: where it is saved, as a whole or not at all.
        examples: with ``input_ids`` and ``labels``.
        tokenizer: saved with it.
        args: of the Trainer; its output folder is replaced.
    """
    if folder.exists():
        return
    options = replace(args, output_dir=f"{folder}.runs")
    collate: Any = partial(pad, pad_token_id=tokenizer.pad_token_id)
    data: Any = list(examples)
    trainer = Trainer(make_model(), options, collate, data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(f"{folder}.new")
    if args.process_index == 0:
        Path(f"{folder}.new").replace(folder)
    trainer.accelerator.wait_for_everyone()


def judge(
    model: nn.Module,
    encode: Encoder,
    rows: Sequence[Mapping[str, Any]],
    sets: Mapping[str, Sequence[Example]],
    attack: Mapping[str, Any],
) -> Row:
    """Measure what a model knows, attack it by relearning, and measure how much comes back.

    Args:
        model: the model; it is not changed.
        encode: its encoder.
        rows: to forget, for greedy answers.
        sets: examples by name: "forget", "retain", and those of `attack_sets`, which are followed during the attack.
        attack: settings of `relearn`.

    Returns:
        ``forget`` and ``retain`` (each a `summary`), ``rouge`` (mean ROUGE-L recall of greedy answers, no longer than
        the longest true one), ``rounded`` (probability of the rows to forget after rounding to 4 bits), ``curve`` (of
        the attack), and ``value``: by how much the probability of the untouched rows has risen at its end.
    """
    prompts = [encode.prompt(str(row[encode.question])) for row in rows]
    longest = max(sum(label != IGNORED for label in example["labels"]) for example in sets["forget"])
    answers = [str(row[encode.answer]) for row in rows]
    rouge = rouge_l_recall(model, encode.tokenizer, prompts, answers, max_new_tokens=longest)
    found: Row = {name: summary(score(model, sets[name])) for name in ("forget", "retain")}
    found |= {"rouge": fmean(rouge), "rounded": summary(score(quantize(model, 4), sets["forget"]))["probability"]}
    followed = {name: examples for name, examples in sets.items() if name not in ("forget", "retain")}
    curve = relearn(model, sets["relearned"], measure=followed, **attack)
    gain = curve[-1]["untouched_probability"] - curve[0]["untouched_probability"]
    return found | {"curve": curve, "value": gain}


def table(rows: Sequence[Row]) -> str:
    """Print what models know before and after the attack, a line each.

    Args:
        rows: runs with ``method``, ``seed``, ``steps``, ``seconds_per_step`` and what `judge` gives.

    Returns:
        Probabilities, means over seeds; of the gain also the 95 % interval of its difference to the run without
        smoothing, seed by seed, where there are two seeds or more.
    """
    places = [key.removesuffix("_probability") for key in rows[0]["curve"][0] if key.endswith("_probability")]
    heads = ["smoothing", "seeds", "steps", "ms/step", "forget", "ROUGE", "accuracy", "4 bits", "retain"]
    lines = [[*heads, *(f"{place} after" for place in places), "gain", "minus none"]]
    base = {row["seed"]: row["value"] for row in rows if row["method"] == NONE}
    for label in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == label]
        seconds = [row["seconds_per_step"] for row in runs if row["seconds_per_step"] is not None]
        columns = [[row["forget"]["probability"] for row in runs], [row["rouge"] for row in runs]]
        columns += [[row["forget"]["token_accuracy"] for row in runs], [row["rounded"] for row in runs]]
        columns += [[row["retain"]["probability"] for row in runs]]
        columns += [[row["curve"][-1][f"{place}_probability"] for row in runs] for place in places]
        cells = [label, str(len(runs)), str(runs[0]["steps"]), f"{1000 * fmean(seconds):.0f}" if seconds else "-"]
        cells += [f"{fmean(column):.3f}" for column in columns] + [f"{fmean(row['value'] for row in runs):+.3f}"]
        paired = [row["value"] - base[row["seed"]] for row in runs if row["seed"] in base and label != NONE]
        half = report.interval(paired)
        lines.append(
            [*cells, f"{fmean(paired):+.3f}" + (f" +/- {half:.3f}" if half is not None else "") if paired else "-"]
        )
    notes = (
        "Probabilities of the true answers, but ROUGE and accuracy (share of right tokens). 4 bits: after rounding.\n"
    )
    notes += "After: at the end of relearning; gain: by how much untouched rows rose in it, less is better.\n"
    notes += "+/-: 95 % interval over seeds; one seed is a hint at most."
    return f"{report.grid(lines)}\n{notes}"


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Draw the attack: probability of the answers against its steps.

    Args:
        rows: as for `table`.
        path: the PNG file.
    """
    places = [key.removesuffix("_probability") for key in rows[0]["curve"][0] if key.endswith("_probability")]
    panels: dict[str, dict[str, list]] = {f"{place} rows": {} for place in places}
    for row in rows:
        for place in places:
            curve = [(record["step"], record[f"{place}_probability"]) for record in row["curve"]]
            panels[f"{place} rows"].setdefault(row["method"], []).append(curve)
    report.curves(panels, path, "steps of relearning", "probability of the answer")
