"""Kullback-Leibler divergences between two outputs of a model, over the positions that the loss looks at.

All logarithms are taken in float32 or better. A position is a row for a classifier and a token for labels with one
integer a token; tokens whose label is -100 do not count, and for causal language models a label belongs to the
position before it, as in their loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from hf_sharp._tensors.types import Batch, Outputs, is_mapping

KINDS = ("forward", "reverse", "symmetric")
IGNORED = -100


def logits_of(outputs: Outputs) -> Tensor:
    """The logits among a model's outputs.

    Args:
        outputs: a dict or an object with `logits`.

    Returns:
        The logits, classes last.

    Raises:
        ValueError: if there are none.
    """
    logits = outputs.get("logits") if is_mapping(outputs) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "A divergence between outputs needs outputs with one tensor named 'logits', classes last; "
            f"this model returns {type(outputs).__name__}. Use a method that needs gradients only, such as SAM."
        )
    return logits


def _marks(batch: Batch) -> Tensor | None:
    """Which positions of the labels count, for labels with one integer a token; else None."""
    labels = batch.get("labels") if is_mapping(batch) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return None
    return labels != IGNORED


def positions(batch: Batch, shifted: bool) -> Tensor:
    """How many positions of a micro-batch count.

    Args:
        batch: the micro-batch, labels under "labels".
        shifted: whether a label belongs to the position before it.

    Returns:
        A 0-dim float tensor.

    Raises:
        ValueError: if the batch is not a dict with a tensor in it.
    """
    marks = _marks(batch)
    if marks is not None:
        return (marks[..., 1:] if shifted else marks).sum().float()
    tensors: list[Tensor] = (
        [t for t in batch.values() if isinstance(t, Tensor) and t.ndim] if is_mapping(batch) else []
    )
    if not tensors:
        raise ValueError(
            "The positions of a batch are counted by its tensors, and this one is not a dict of them. Let the data "
            "collator return a dict, or use a method of gradients alone, such as SAM."
        )
    named: object = batch.get("labels")
    rows = (named if isinstance(named, Tensor) and named.ndim else tensors[0]).shape[0]
    return torch.tensor(float(rows), device=tensors[0].device)


def window_positions(batches: Iterable[Batch], shifted: bool) -> Tensor:
    """How many positions of a window count on this rank.

    Args:
        batches: its micro-batches.
        shifted: whether a label belongs to the position before it.

    Returns:
        A 0-dim float tensor.
    """
    return torch.stack([positions(batch, shifted) for batch in batches]).sum()


def kl_sum(
    reference: Outputs, outputs: Outputs, batch: Batch, shifted: bool, kind: str = "forward", temperature: float = 1.0
) -> Tensor:
    """The divergence between two outputs, summed over the positions of a micro-batch that count.

    Args:
        reference: outputs to compare with; no gradient flows into them.
        outputs: the model's outputs.
        batch: the micro-batch.
        shifted: whether a label belongs to the position before it.
        kind: "forward" KL(reference || outputs), "reverse" KL(outputs || reference), "symmetric" their mean.
        temperature: divides both logits.

    Returns:
        A 0-dim tensor in float32 or better.

    Raises:
        ValueError: if the outputs are no distributions over the labels' positions.
    """
    marks, theirs, ours = _marks(batch), logits_of(reference).detach(), logits_of(outputs)
    if ours.shape[-1] < 2:
        raise ValueError(
            f"A divergence between outputs needs two classes or more, and these logits are {tuple(ours.shape)}: "
            "for regression there is none. Use a method that needs gradients only, such as SAM."
        )
    if marks is not None and not (ours.ndim == 2 and marks.shape[1:] == (1,)):
        theirs, ours = (_chosen(x, marks, shifted) for x in (theirs, ours))
    p, q = (_log_probabilities(x, temperature) for x in (theirs, ours))
    if kind == "forward":
        return _kl(p, q)
    return _kl(q, p) if kind == "reverse" else (_kl(p, q) + _kl(q, p)) / 2


def _chosen(logits: Tensor, marks: Tensor, shifted: bool) -> Tensor:
    """The logits at the positions that count; of more positions than labels, as under prompt tuning, the last ones."""
    places = marks.shape[1]
    if (
        logits.ndim != marks.ndim + 1
        or logits.shape[0] != marks.shape[0]
        or logits.shape[1] < places
        or marks.ndim != 2
    ):
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} do not belong, position by position, to labels of shape "
            f"{tuple(marks.shape)}, so no divergence can be taken. Use a method of gradients alone, such as SAM."
        )
    logits = logits[:, -places:]
    return logits[:, :-1][marks[:, 1:]] if shifted else logits[marks]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(exp(p) || exp(q)), summed; what has no probability under p adds nothing."""
    impossible = p == -torch.inf
    return (p.exp() * (p.masked_fill(impossible, 0.0) - q.masked_fill(impossible, 0.0))).sum()


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return functional.log_softmax(wide / temperature, dim=-1)
