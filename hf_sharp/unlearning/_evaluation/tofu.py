"""TOFU's metrics (Maini et al., 2024, section 2.2): truth ratio, model utility, forget quality, and all together.

Paper and code differ in places, and the code from itself; each function says which it computes and offers the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_sharp._extras import optional
from hf_sharp.unlearning._encoding import Encoder, Row
from hf_sharp.unlearning._evaluation.generation import rouge_l_recall
from hf_sharp.unlearning._evaluation.likelihood import score

OTHER_SETS = ("retain", "authors", "world")
NUMBERS = ("probability", "rouge", "truth_ratio")


def truth_ratio(paraphrased: Tensor, perturbed: Sequence[Tensor], mean: str = "arithmetic") -> Tensor:
    """How probable wrong answers are against a right one that is worded like them (Maini et al., 2024, equation 1).

    R = mean_i p(wrong_i | x)^(1/|wrong_i|) / p(right | x)^(1/|right|). The paper's mean is arithmetic. Its repository
    has two: `utils.py` takes the arithmetic mean for the score of a set and the geometric one for forget quality;
    `aggregate_eval_stat.py`, the script that the README runs for the table of results, the geometric one for both, as
    open-unlearning does. (Both take the inverse of R for forget quality, which changes nothing there.)

    Args:
        paraphrased: `TokenScores.mean_nll` of the paraphrased right answers, shape [rows].
        perturbed: the same of each row's wrong answers, shapes [number of wrong answers].
        mean: "arithmetic" (the paper) or "geometric" (that script, and open-unlearning).

    Returns:
        R, one positive number a row: far below 1 if the model knows, about 1 if it does not.

    Raises:
        ValueError: if the mean is neither, or the numbers of rows differ.
    """
    if mean not in ("arithmetic", "geometric"):
        raise ValueError(f"The mean is arithmetic or geometric; got {mean!r}.")
    if len(paraphrased) != len(perturbed) or not all(len(wrong) for wrong in perturbed):
        raise ValueError("A truth ratio needs for each row one right answer and one wrong answer or more.")
    means = [
        -(wrong.mean()) if mean == "geometric" else (-wrong).logsumexp(0) - _log(len(wrong)) for wrong in perturbed
    ]
    return (torch.stack(means) + paraphrased).exp()


def truth_ratio_score(ratios: Tensor, forget: bool) -> float:
    """Sum up a set's truth ratios in one number, as TOFU's code does.

    Args:
        ratios: of `truth_ratio`.
        forget: of rows to forget mean(min(R, 1/R)), which is 1 where right and wrong are equally likely; else
            mean(max(0, 1 - R)), which is 1 where wrong answers are impossible.

    Returns:
        A number in [0, 1].
    """
    return float(torch.minimum(ratios, 1 / ratios).mean() if forget else (1 - ratios).clamp_min(0).mean())


def option_probability(right: Tensor, wrong: Sequence[Tensor]) -> Tensor:
    """Probability of the right one among given answers, for questions about real authors and the world.

    p(right) / (p(right) + sum_i p(wrong_i)). The paper writes plain probabilities, its code and open-unlearning take
    those normalised for length: give `TokenScores.mean_nll` for the code's number, `TokenScores.nll` for the paper's.

    Args:
        right: negative log-likelihoods of the right answers, shape [rows].
        wrong: those of each row's wrong answers, shapes [number of wrong answers].

    Returns:
        One number a row in [0, 1].
    """
    rows = zip(right, wrong, strict=True)
    return torch.stack([torch.cat([-r[None], -others]).softmax(0)[0] for r, others in rows])


def model_utility(numbers: Iterable[float]) -> float:
    """Harmonic mean of TOFU's nine: probability, ROUGE-L recall, truth ratio of retain set, authors, world facts.

    Args:
        numbers: the nine, none negative. (Fewer are taken too, where a set is missing; then it is no TOFU number.)

    Returns:
        The harmonic mean; 0 if one of them is.

    Raises:
        ValueError: if there is none, or one is negative.
    """
    numbers = list(numbers)
    if not numbers or min(numbers) < 0:
        raise ValueError(f"A harmonic mean is one of numbers that are not negative; got {numbers}.")
    return 0.0 if min(numbers) == 0 else len(numbers) / sum(1 / number for number in numbers)


def forget_quality(ratios: Tensor, retained: Tensor) -> float:
    """P-value of the Kolmogorov-Smirnov test that both models' truth ratios on the rows to forget are alike.

    Args:
        ratios: of the unlearned model.
        retained: of the model that was trained without these rows.

    Returns:
        The p-value: 1 if they are indistinguishable, below 0.05 if surely not. (Often shown as its logarithm.)
    """
    return float(optional("scipy.stats").ks_2samp(ratios.numpy(), retained.numpy()).pvalue)


def tofu_metrics(
    model: nn.Module,
    encode: Encoder,
    sets: Mapping[str, Sequence[Row]],
    retained: Tensor | None = None,
    mean: str = "arithmetic",
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> tuple[dict[str, float], Tensor | None]:
    """Measure all that TOFU does.

    Args:
        model: a causal language model.
        encode: its encoder.
        sets: rows by the names "forget", "retain", "authors", "world", any of them, with the columns ``question``,
            ``answer``, ``perturbed_answer`` (a list) and, except for authors and world, ``paraphrased_answer``: the
            files ``forget10_perturbed``, ``retain_perturbed``, ``real_authors_perturbed``, ``world_facts_perturbed``.
        retained: the second value that this function gives for a model trained without the rows to forget.
        mean: of `truth_ratio`; "geometric" for numbers beside those of TOFU's script and of open-unlearning.
        max_new_tokens: of a greedy answer.
        batch_size: examples at once.

    Returns:
        Numbers by name: for each set ``<set>_probability``, ``<set>_rouge``, ``<set>_truth_ratio``; with all three of
        retain, authors and world ``model_utility``; with ``retained`` ``forget_quality``. And the truth ratios of the
        set forget, or None without it.

    Raises:
        ValueError: if a set has another name.
    """
    unknown = sorted(set(sets) - {"forget", *OTHER_SETS})
    if unknown:
        raise ValueError(f"Sets are forget, {', '.join(OTHER_SETS)}; got {', '.join(unknown)}.")
    numbers: dict[str, float] = {}
    ratios: dict[str, Tensor] = {}
    for name, rows in sets.items():
        found, ratios[name] = _measure(model, encode, rows, name, mean, max_new_tokens, batch_size)
        numbers |= {f"{name}_{key}": value for key, value in found.items()}
    nine = [f"{name}_{key}" for name in OTHER_SETS for key in NUMBERS]
    if set(nine) <= set(numbers):
        numbers["model_utility"] = model_utility(numbers[key] for key in nine)
    if retained is not None and "forget" in ratios:
        numbers["forget_quality"] = forget_quality(ratios["forget"], retained)
    return numbers, ratios.get("forget")


def _measure(
    model: nn.Module, encode: Encoder, rows: Sequence[Row], name: str, mean: str, max_new_tokens: int, batch_size: int
) -> tuple[dict[str, float], Tensor]:
    """The three numbers of one set, and its truth ratios."""
    columns = {encode.question, encode.answer, "perturbed_answer"}
    columns |= set() if name in ("authors", "world") else {"paraphrased_answer"}
    lacking = [column for row in rows for column in sorted(columns) if row.get(column) is None]
    if lacking or not rows:
        raise ValueError(
            f"The set {name} needs rows with {', '.join(sorted(columns))}; {lacking[:1] or 'there are none'}."
        )
    questions, answers = [row[encode.question] for row in rows], [row[encode.answer] for row in rows]

    def mean_nll(texts: Sequence[str], asked: Sequence[str]) -> Tensor:
        pairs = zip(asked, texts, strict=True)
        return score(model, [encode.answered(question, text) for question, text in pairs], batch_size).mean_nll

    wrong = [list(row["perturbed_answer"]) for row in rows]
    repeated = [question for question, texts in zip(questions, wrong, strict=True) for _ in texts]
    perturbed = mean_nll([text for texts in wrong for text in texts], repeated).split([len(texts) for texts in wrong])
    right = mean_nll(answers, questions)
    chances = option_probability(right, perturbed) if name in ("authors", "world") else (-right).exp()
    paraphrases = answers if name in ("authors", "world") else [row["paraphrased_answer"] for row in rows]
    ratios = truth_ratio(mean_nll(paraphrases, questions), perturbed, mean)
    prompts = [encode.prompt(question) for question in questions]
    rouge = rouge_l_recall(model, encode.tokenizer, prompts, answers, max_new_tokens, batch_size)
    numbers = {"probability": float(chances.mean()), "rouge": sum(rouge) / len(rouge)}
    return numbers | {"truth_ratio": truth_ratio_score(ratios, name == "forget")}, ratios


def _log(count: int) -> Tensor:
    return torch.tensor(float(count), dtype=torch.float64).log()
