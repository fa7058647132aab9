"""Pairs of texts, one to read and one to write, for encoder-decoders; and scores of what was written."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_sharp.recipes.tasks.docstrings import load_docstrings
from hf_sharp.recipes.tasks.domains import END, Domain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, T5Config


def load_packages() -> Domain:
    """Read pairs that every machine has: a docstring of the standard library, and the package that it comes from.

    Returns:
        The pairs, the package's name as the label.
    """
    task = load_docstrings()
    train = [(text, task.labels[label]) for text, label in zip(task.train_texts, task.train_labels, strict=True)]
    test = [(text, task.labels[label]) for text, label in zip(task.test_texts, task.test_labels, strict=True)]
    return Domain("packages", train, test)


def encode_pairs(
    rows: Sequence[tuple[str, str]],
    tokenizer: Any,
    longest: tuple[int, int],
    prefix: str = "",
    limit: int | None = None,
) -> list[dict[str, list[int]]]:
    """Turn pairs into examples for a Seq2SeqTrainer.

    Args:
        rows: source and target each.
        tokenizer: of the model.
        longest: tokens of a source and of a target; what is longer is cut off.
        prefix: put before every source.
        limit: how many are kept, drawn at random but the same every time; None keeps all.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` each; a target ends with the end token.
    """
    rows = rows if limit is None or limit >= len(rows) else random.Random(0).sample(list(rows), limit)
    sources = [prefix + source for source, _ in rows]
    end = tokenizer.eos_token_id
    examples: Any = tokenizer(sources, truncation=True, max_length=longest[0])
    labels = tokenizer(text_target=[target for _, target in rows], truncation=True, max_length=longest[1])["input_ids"]
    labels = [ids if ids and ids[-1] == end else [*ids[: longest[1] - 1], end] for ids in labels]
    columns = zip(examples["input_ids"], examples["attention_mask"], labels, strict=True)
    return [{"input_ids": ids, "attention_mask": seen, "labels": target} for ids, seen, target in columns]


def score_texts(prediction: Any, tokenizer: Any) -> dict[str, float]:
    """Score generated texts, as ``Seq2SeqTrainer(compute_metrics=...)`` wants it.

    Args:
        prediction: token ids that were generated, and labels.
        tokenizer: of the model.

    Returns:
        "exact", the share that is word for word right, and "f1", the mean F1 of words as in SQuAD, without its
        stripping of articles and punctuation.
    """
    written, wanted = (
        [text.split() for text in tokenizer.batch_decode(_without_padding(ids, tokenizer), skip_special_tokens=True)]
        for ids in (prediction.predictions, prediction.label_ids)
    )
    exact = [ours == theirs for ours, theirs in zip(written, wanted, strict=True)]
    f1 = [_f1(ours, theirs) for ours, theirs in zip(written, wanted, strict=True)]
    return {"exact": sum(exact) / len(exact), "f1": sum(f1) / len(f1)}


def _f1(ours: list[str], theirs: list[str]) -> float:
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs)) if ours or theirs else 1.0


def _without_padding(ids: Any, tokenizer: Any) -> list[list[int]]:
    return [[int(token) if token >= 0 else tokenizer.pad_token_id for token in row] for row in ids]


def small_t5(tokenizer: "PreTrainedTokenizerFast") -> "T5Config":
    """Describe the encoder-decoder that learns the embedded pairs from scratch in a minute on a processor.

    Args:
        tokenizer: its tokenizer.

    Returns:
        The configuration of a two-layer T5, 96 wide, with tied embeddings.
    """
    from transformers import T5Config

    end = tokenizer.get_vocab()[END]
    special: Any = {"decoder_start_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=96,
        d_kv=24,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        **special,
    )
