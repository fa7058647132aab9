"""What a causal language model makes of given answers: probability, accuracy, extraction strength, perplexity, min-k.

All start from `score`, which asks the model once for every example. Means over examples are left to the caller, since
some definitions need the single values. Notation: y is the answer, x its prompt, |y| its number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_sharp.unlearning._encoding import IGNORED, Example, pad
from hf_sharp.unlearning._evaluation.reading import reading


@dataclass(frozen=True)
class TokenScores:
    """What a model gave to the labelled tokens of some examples.

    Args:
        log_probs: for each example log p(y_t | x, y_<t) in nats, float64 of shape [tokens].
        greedy: for each example whether y_t is the most probable token there, bool of shape [tokens].
    """

    log_probs: list[Tensor]
    greedy: list[Tensor]

    @property
    def tokens(self) -> Tensor:
        """Number of labelled tokens, float64 of shape [examples]."""
        return torch.tensor([len(row) for row in self.log_probs], dtype=torch.float64)

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood summed over the labelled tokens, float64 of shape [examples]."""
        return torch.stack([-row.sum() for row in self.log_probs])

    @property
    def mean_nll(self) -> Tensor:
        """The same divided by the number of tokens."""
        return self.nll / self.tokens

    def without_last(self) -> TokenScores:
        """The same without the last labelled token of each example.

        That is the EOS where `Encoder` made the examples and none was cut off at its longest length. open-unlearning
        leaves it out of exact memorization and extraction strength: `extraction_strength(scores.without_last())`.

        Returns:
            Scores of one token less an example.

        Raises:
            ValueError: if an example has only one.
        """
        short = next((i for i, row in enumerate(self.log_probs) if len(row) < 2), None)
        if short is not None:
            raise ValueError(f"Example {short} has one label only, so nothing is left without its last one.")
        return TokenScores([row[:-1] for row in self.log_probs], [row[:-1] for row in self.greedy])


def score(model: nn.Module, examples: Sequence[Example], batch_size: int = 32) -> TokenScores:
    """Ask a causal language model for the probabilities of labelled tokens.

    Batches hold examples of like length, padded on the right and masked, so that neither the batch size nor the
    tokenizer's padding side changes a number by more than rounding. Logits of 16 bits are taken to float32 before the
    softmax; sums are in float64. The model's mode and gradients are left as they were.

    Args:
        model: gives ``logits`` of shape [examples, length, vocabulary].
        examples: with ``input_ids`` and ``labels``, as `Encoder` makes them; labels of -100 are not scored.
        batch_size: examples at once.

    Returns:
        The scores, in the order of the examples.

    Raises:
        ValueError: if an example has nothing to be scored.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    log_probs: list[Tensor] = [torch.empty(0)] * len(examples)
    greedy = list(log_probs)
    with reading(model) as device:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {key: value.to(device) for key, value in pad([examples[i] for i in chosen], 0).items()}
            labels = batch.pop("labels")[:, 1:]
            marks = labels != IGNORED
            empty = [chosen[i] for i in (~marks.any(dim=1)).nonzero().flatten().tolist()]
            if empty:
                raise ValueError(f"Example {empty[0]} has no label beyond its first token, so there is no score.")
            logits = model(**batch).logits[:, -marks.shape[1] - 1 : -1][marks]  # prompt tuning puts more in front
            wide = logits.float() if logits.dtype.itemsize < 4 else logits
            targets = labels[marks]
            values = wide.log_softmax(-1).gather(-1, targets[:, None])[:, 0].double().cpu()
            right = (wide.argmax(-1) == targets).cpu()
            counts = marks.sum(dim=1).tolist()
            for i, row, hits in zip(chosen, values.split(counts), right.split(counts), strict=True):
                log_probs[i], greedy[i] = row, hits
    return TokenScores(log_probs, greedy)


def probability(scores: TokenScores) -> Tensor:
    """Probability of an answer, normalised for length: p(y | x)^(1 / |y|) (TOFU; Maini et al., 2024, section 2.2).

    Args:
        scores: of the answers.

    Returns:
        One number an example in [0, 1], float64: the geometric mean of the probabilities of its tokens.
    """
    return (-scores.mean_nll).exp()


def token_accuracy(scores: TokenScores) -> Tensor:
    """Share of tokens that are the most probable ones after the true beginning.

    Called exact memorization by Tirumala et al. (2022). It sees knowledge that greedy answers and thus ROUGE miss,
    since one wrong token does not spoil what follows. The EOS after an answer is a label and counts; open-unlearning
    leaves it out: give `scores.without_last()` for its number.

    Args:
        scores: of the answers.

    Returns:
        One number an example in [0, 1], float64.
    """
    return torch.stack([row.double().mean() for row in scores.greedy])


def extraction_strength(scores: TokenScores) -> Tensor:
    """How little of an answer has to be given for the model to complete it greedily.

    1 - min{k : f(x, y_<k) = y_>=k} / |y| (Carlini et al., 2021, as Wang et al., 2025, use it for unlearning), where f
    continues greedily and k counts given tokens. All of an answer extracted from its prompt alone is 1; if even the
    last token is wrong it is 0. The EOS after an answer is a label and counts, so knowing that an answer ends is part
    of it; open-unlearning leaves it out: give `scores.without_last()`. (It also stops at k = |y| - 1 and so gives
    1 / |y| at least.)

    Args:
        scores: of the answers.

    Returns:
        One number an example in [0, 1], float64.
    """
    # Greedy decoding from k yields the answer exactly if each later token is the most probable after the true ones.
    runs = [row.flip(0).long().cumprod(0).sum() for row in scores.greedy]
    return torch.stack(runs).double() / scores.tokens


def perplexity(scores: TokenScores) -> float:
    """Perplexity of all labelled tokens together, exp(sum of nll / sum of tokens): utility on held-out text.

    Args:
        scores: of texts, each token conditioned on those before it in its example.

    Returns:
        A number of at least 1.
    """
    return float((scores.nll.sum() / scores.tokens.sum()).exp())


def min_k(scores: TokenScores, share: float = 0.4) -> Tensor:
    """Mean log-probability of the least probable tokens (Min-K% Prob; Shi et al., 2024): high for what was trained on.

    Args:
        scores: of texts.
        share: of the tokens, rounded down but one at least; MUSE (Shi et al., 2025) uses 0.4.

    Returns:
        One number an example, float64. MUSE's code has it with the opposite sign.

    Raises:
        ValueError: if the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share of tokens is in (0, 1]; got {share}.")
    return torch.stack([row.sort().values[: max(1, int(share * len(row)))].mean() for row in scores.log_probs])


def summary(scores: TokenScores) -> dict[str, float]:
    """Sum up answers in four numbers.

    Args:
        scores: of the answers.

    Returns:
        Means over examples of ``probability``, ``token_accuracy`` and ``extraction_strength``, and ``nll``, the mean
        over all tokens in nats.
    """
    means = {f.__name__: float(f(scores).mean()) for f in (probability, token_accuracy, extraction_strength)}
    return means | {"nll": float(scores.nll.sum() / scores.tokens.sum())}
