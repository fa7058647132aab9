"""What a model writes greedily, and how much of the truth is in it: ROUGE-L, verbatim memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_sharp._extras import optional
from hf_sharp.unlearning._evaluation.reading import reading


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, batch_size: int = 32
) -> list[list[int]]:
    """Continue prompts greedily.

    Batches hold prompts of like length, padded on the left and masked, whatever the tokenizer's padding side is. The
    model's mode, and sampling settings in its generation config, do not count.

    Args:
        model: a causal language model with `generate`.
        tokenizer: for its EOS and padding tokens.
        prompts: tokens; none of them empty.
        max_new_tokens: where a continuation stops that has not come to an EOS.
        batch_size: prompts at once.

    Returns:
        The new tokens of each prompt, without EOS and what follows it.

    Raises:
        ValueError: if a prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("An empty prompt cannot be continued.")
    eos = tokenizer.eos_token_id
    padding = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written: list[list[int]] = [[]] * len(prompts)
    # Given as None, settings of sampling in the model's own generation config are not warned about.
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    limits = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": padding}
    with reading(model) as device:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            length = len(prompts[chosen[-1]])
            gaps = [length - len(prompts[i]) for i in chosen]
            ids = [[padding] * gap + list(prompts[i]) for i, gap in zip(chosen, gaps, strict=True)]
            mask = [[0] * gap + [1] * (length - gap) for gap in gaps]
            batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            batch = {key: value.to(device) for key, value in batch.items()}
            model_generate: Any = model.generate
            answers = model_generate(**batch, **greedy, **limits)[:, length:].tolist()
            for i, answer in zip(chosen, answers, strict=True):
                written[i] = answer[: answer.index(eos)] if eos in answer else answer
    return written


def rouge_l(
    predictions: Sequence[str], references: Sequence[str], value: str = "recall", stemmer: bool = True
) -> list[float]:
    """ROUGE-L (Lin, 2004) by the package ``rouge-score``: the longest common subsequence of words.

    TOFU takes the recall with stemming, MUSE the F1 without.

    Args:
        predictions: what was written.
        references: the truth, one each.
        value: "recall", "precision" or "fmeasure".
        stemmer: whether words are compared by their stems.

    Returns:
        One number a pair in [0, 1].

    Raises:
        ValueError: if there is no such value, or the numbers of both differ.
    """
    if value not in ("recall", "precision", "fmeasure"):
        raise ValueError(f"value is recall, precision or fmeasure; got {value!r}.")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions do not belong to {len(references)} references.")
    scorer = optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=stemmer)
    pairs = zip(references, predictions, strict=True)
    return [float(getattr(scorer.score(truth, written)["rougeL"], value)) for truth, written in pairs]


def rouge_l_recall(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> list[float]:
    """TOFU's ROUGE (Maini et al., 2024, section 2.2): ROUGE-L recall of the greedy answer, with stemming.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        prompts: tokens of the questions, as `Encoder.prompt` gives them.
        answers: the true ones.
        max_new_tokens: where an answer stops at the latest.
        batch_size: prompts at once.

    Returns:
        One number a question in [0, 1].
    """
    written = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return rouge_l(tokenizer.batch_decode(written, skip_special_tokens=True), answers)


def verbatim_memory(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Sequence[int]],
    prompt_tokens: int,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[float]:
    """MUSE's VerbMem (Shi et al., 2025): how much of a text is written on word for word, given its beginning.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        texts: tokens; what comes after prompt and continuation is left out.
        prompt_tokens: how many tokens are given.
        max_new_tokens: how many are compared, at most.
        batch_size: texts at once.

    Returns:
        ROUGE-L F1 without stemming of the greedy continuation with the true one, one number a text in [0, 1].

    Raises:
        ValueError: if a text is not longer than the prompt.
    """
    short = next((i for i, text in enumerate(texts) if len(text) <= prompt_tokens), None)
    if short is not None or prompt_tokens < 1:
        raise ValueError(f"prompt_tokens={prompt_tokens} leaves nothing before or after it in text {short or 0}.")
    written = generate(model, tokenizer, [text[:prompt_tokens] for text in texts], max_new_tokens, batch_size)
    true = [list(text[prompt_tokens : prompt_tokens + max_new_tokens]) for text in texts]
    strings = (tokenizer.batch_decode(each, skip_special_tokens=True) for each in (written, true))
    return rouge_l(*strings, value="fmeasure", stemmer=False)
