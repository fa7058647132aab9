"""Unlearning objectives by plain loops in float64, written from the papers. Imports torch and nothing of ours.

Everything starts from the logits of a bigram model, logits[b][t] = W[x[b][t]]. Of an objective there is, for every
row, its loss, its number of units, and the derivative of that loss by every logit.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
Row = tuple[float, int, list[tuple[int, list[float]]]]  # loss, units, [(input token, derivative by its logits)]


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    parts = [math.exp(value - top) for value in logits]
    return [part / sum(parts) for part in parts]


def predictions(batch: Batch, row: int) -> list[tuple[int, int]]:
    """(input token, next token) wherever the next token's label counts."""
    ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
    return [(ids[t], labels[t + 1]) for t in range(len(ids) - 1) if labels[t + 1] != -100]


def likelihood(table: list[list[float]], batch: Batch, row: int) -> Row:
    """Summed NLL, tokens, and softmax - onehot at every prediction."""
    loss, slopes = 0.0, []
    for token, following in predictions(batch, row):
        chances = softmax(table[token])
        loss -= math.log(chances[following])
        slopes.append((token, [chance - (k == following) for k, chance in enumerate(chances)]))
    return loss, len(slopes), slopes


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def chain(outer: float, slopes: list) -> list:
    return [(token, [outer * value for value in slope]) for token, slope in slopes]


def ascent(table, reference, batch, row, max_nll=None) -> Row:
    loss, units, slopes = likelihood(table, batch, row)
    if max_nll is not None and loss > max_nll * units:
        return -max_nll * units, units, []
    return -loss, units, chain(-1.0, slopes)


def npo(table, reference, batch, row, beta) -> Row:
    """(2/beta) log(1 + (pi/pi_ref)^beta), pi = exp(-NLL); its derivative by NLL is -2 s, s = ratio / (1 + ratio)."""
    loss, count, slopes = likelihood(table, batch, row)
    if not count:
        return 0.0, 0, []
    ratio = math.exp(-beta * (loss - likelihood(reference, batch, row)[0]))
    return 2 / beta * math.log(1 + ratio), 1, chain(-2 * ratio / (1 + ratio), slopes)


def simnpo(table, reference, batch, row, beta, gamma) -> Row:
    loss, count, slopes = likelihood(table, batch, row)
    if not count:
        return 0.0, 0, []
    margin = beta * loss / count - gamma
    return -2 / beta * log_sigmoid(margin), 1, chain(-2 / count * sigmoid(-margin), slopes)


def dpo(table, reference, batch, row, beta) -> Row:
    other = batch["alternative"]
    lost, count, lost_slopes = likelihood(table, batch, row)
    won, count_won, won_slopes = likelihood(table, other, row)
    if not (count and count_won):
        return 0.0, 0, []
    margin = lost - likelihood(reference, batch, row)[0] - (won - likelihood(reference, other, row)[0])
    outer = -2 * sigmoid(-beta * margin)
    slopes = chain(outer, lost_slopes) + chain(-outer, won_slopes)
    return -2 / beta * log_sigmoid(beta * margin), 1, slopes


def idk(table, reference, batch, row) -> Row:
    return likelihood(table, batch["alternative"], row)


def nll(table, reference, batch, row) -> Row:
    return likelihood(table, batch, row)


def kl(table, reference, batch, row) -> Row:
    """Sum of p log(p/q) over predictions, p the reference's; the derivative by the logits is q - p."""
    loss, slopes = 0.0, []
    for token, _ in predictions(batch, row):
        p, q = softmax(reference[token]), softmax(table[token])
        loss += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        slopes.append((token, [b - a for a, b in zip(p, q, strict=True)]))
    return loss, len(slopes), slopes


def mean(
    rule: Callable[..., Row], weights: Tensor, reference: Tensor, batch: Batch, **settings
) -> tuple[float, Tensor]:
    """The loss over its units, and its gradient by W."""
    table, frozen = weights.tolist(), reference.tolist()
    rows = [rule(table, frozen, batch, row, **settings) for row in range(len(batch["input_ids"]))]
    units = sum(row[1] for row in rows)
    gradient = torch.zeros(weights.shape, dtype=torch.float64)
    for _, _, slopes in rows:
        for token, slope in slopes:
            gradient[token] += torch.tensor(slope, dtype=torch.float64) / units
    return sum(row[0] for row in rows) / units, gradient
