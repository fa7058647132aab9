"""Likelihoods and divergences of sequences, row by row, and the two terms that keep a model as it is.

Everything is computed in float32 or better, whatever the logits' precision. Positions whose label is -100 count for
nothing; for causal language models the label of a position is that of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_sharp._tensors.divergences import IGNORED, logits_of
from hf_sharp.unlearning._objectives.base import Part, Term
from hf_sharp.unlearning._objectives.models import Models


def targets(part: Part, shifted: bool) -> Tensor:
    """The labels, each at the position whose logits predict it.

    Args:
        part: a part of a batch.
        shifted: whether the label of a position is that of the next one.

    Returns:
        A tensor of shape (rows, positions), -100 where nothing is to be predicted.

    Raises:
        ValueError: if there are no labels with one integer a token.
    """
    labels = part.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"Unlearning takes labels of shape (rows, tokens), one integer a token; got {shape}.")
    return labels[:, 1:] if shifted else labels


def tokens(part: Part, shifted: bool) -> Tensor:
    """How many labels of each row count.

    Args:
        part: a part of a batch.
        shifted: whether the label of a position is that of the next one.

    Returns:
        Integers of shape (rows,).
    """
    return (targets(part, shifted) != IGNORED).sum(dim=1)


def nll(outputs: Any, part: Part, shifted: bool) -> Tensor:
    """The negative log-likelihood of each row, summed over its labels.

    Args:
        outputs: the model's outputs, with logits of shape (rows, positions, tokens known).
        part: the part of the batch that they belong to.
        shifted: whether the label of a position is that of the next one.

    Returns:
        Nats, of shape (rows,).
    """
    wanted = targets(part, shifted)
    logits = _aligned(outputs, part, shifted)
    each = functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten().to(logits.device), ignore_index=IGNORED, reduction="none"
    )
    return each.view(wanted.shape).sum(dim=1)


def kl(reference: Any, outputs: Any, part: Part, shifted: bool) -> Tensor:
    """KL(reference || model) of each row, summed over the positions of its labels.

    Args:
        reference: the reference's outputs.
        outputs: the model's.
        part: the part of the batch that they belong to.
        shifted: whether the label of a position is that of the next one.

    Returns:
        Nats, of shape (rows,).
    """
    ours = _aligned(outputs, part, shifted).log_softmax(dim=-1)
    theirs = _aligned(reference, part, shifted).to(ours.device).log_softmax(dim=-1)
    impossible = theirs == -torch.inf  # tokens that padded vocabularies rule out add nothing
    each = (theirs.exp() * (theirs.masked_fill(impossible, 0.0) - ours.masked_fill(impossible, 0.0))).sum(dim=-1)
    return each.masked_fill((targets(part, shifted) == IGNORED).to(each.device), 0.0).sum(dim=1)


def _aligned(outputs: Any, part: Part, shifted: bool) -> Tensor:
    """Logits at the positions of `targets`; of more positions than labels, as under prompt tuning, the last ones."""
    logits, labels = logits_of(outputs), part["labels"]
    if logits.ndim != 3 or logits.shape[0] != labels.shape[0] or logits.shape[1] < labels.shape[1]:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} do not belong to labels of shape {tuple(labels.shape)}. "
            "Unlearning takes language models, whose logits are of shape (rows, tokens, tokens known)."
        )
    logits = logits[:, -labels.shape[1] :]
    logits = logits[:, :-1] if shifted else logits
    return logits.float() if logits.dtype.itemsize < 4 else logits


def reference_nll(part: Part, models: Models) -> Tensor:
    """The reference's negative log-likelihood of each row: the column `reference_nll`, else computed.

    Args:
        part: a part of a batch.
        models: the model and its reference.

    Returns:
        Nats, of shape (rows,), without gradient.

    Raises:
        ValueError: if the column does not have one number a row.
    """
    known = part.get("reference_nll")
    if known is None:
        return nll(models.reference(part), part, models.shifted)
    if not isinstance(known, Tensor) or known.shape != part["labels"].shape[:1] or not known.is_floating_point():
        raise ValueError(f"The column 'reference_nll' holds one float a row of its part of the batch; got {known!r}.")
    return known


@dataclass(frozen=True)
class SequenceTerm(Term):
    """A term whose units are sequences: rows of which at least one label counts."""

    def units(self, part: Part, models: Models) -> Tensor:
        """1 for each row with a label."""
        return (tokens(part, models.shifted) > 0).long()


@dataclass(frozen=True)
class TokenTerm(Term):
    """A term whose units are tokens: the labels that count."""

    def units(self, part: Part, models: Models) -> Tensor:
        """The number of labels of each row."""
        return tokens(part, models.shifted)


@dataclass(frozen=True)
class NegativeLogLikelihood(TokenTerm):
    """Cross-entropy, as in fine-tuning."""

    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """The negative log-likelihood."""
        outputs = models.outputs(part)
        return nll(outputs, part, models.shifted), outputs


@dataclass(frozen=True)
class KullbackLeibler(TokenTerm):
    """KL(reference || model), which keeps all of the reference's distribution and not only the labels."""

    reference = True

    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """The divergence; the reference is called first, before there is a graph."""
        reference = models.reference(part)
        outputs = models.outputs(part)
        return kl(reference, outputs, part, models.shifted), outputs


def with_reference_nll(part: Part, models: Models) -> Part:
    """A part with its column `reference_nll`.

    Args:
        part: a part of a batch.
        models: the model and its reference.

    Returns:
        The part itself if it has the column, else a dict with one more.
    """
    if "reference_nll" in part:
        return part
    with torch.no_grad():
        return {**part, "reference_nll": reference_nll(part, models)}
