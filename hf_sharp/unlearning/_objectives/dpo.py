"""Another answer in place of the one to forget, such as "I don't know": preferred to it, or simply learned.

    DPO: L = -(2/beta) mean_i log sigma(beta ((NLL_i - NLL_ref,i) - (NLL'_i - NLL'_ref,i)))
    IDK: L = NLL' / tokens'

NLL is that of the answer to forget, NLL' that of the alternative to the same prompt, both summed over the answer. DPO
is Eq. 7 of Rafailov et al. (2023) times 2/beta, which the paper does not have: open-unlearning has it, and with it NPO
is what remains without the alternative. IDK is TOFU's preference optimisation (Maini et al., 2024): cross-entropy on
refusals, over their own tokens. With either, the forget part of a batch has the other answers under "alternative", a
dict of the same columns, row by row for the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_sharp._checks import check_positive
from hf_sharp.unlearning._objectives.base import Part, Term
from hf_sharp.unlearning._objectives.forget_retain import ForgetRetain
from hf_sharp.unlearning._objectives.likelihood import (
    NegativeLogLikelihood,
    SequenceTerm,
    nll,
    reference_nll,
    tokens,
    with_reference_nll,
)
from hf_sharp.unlearning._objectives.models import Models


def alternative_of(part: Part) -> Part:
    """The alternative answers of a forget part.

    Args:
        part: the forget part of a batch.

    Returns:
        A part of as many rows.

    Raises:
        ValueError: if there are none, or not one a row.
    """
    other = part.get("alternative")
    if not isinstance(other, Mapping):
        raise ValueError(
            "This objective learns another answer to the prompts to forget, and the forget part of this batch, which "
            f"has {', '.join(part)}, has no dict of such answers under 'alternative'."
        )
    if other["labels"].shape[0] != part["labels"].shape[0]:
        counts = f"{other['labels'].shape[0]} alternatives for {part['labels'].shape[0]} rows"
        raise ValueError(f"An alternative belongs to each row of the forget part; got {counts}.")
    return other


@dataclass(frozen=True)
class Preference(SequenceTerm):
    """-(2/beta) log sigma of beta times how much the alternative has gained on the answer to forget.

    Args:
        beta: inverse temperature.
    """

    beta: float

    reference = precomputable = True

    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """The loss of each pair; the outputs are those for the answers to forget, which are called last."""
        other = alternative_of(part)
        references = [reference_nll(side, models) for side in (other, part)]
        preferred = nll(models.outputs(other), other, models.shifted) - references[0]
        outputs = models.outputs(part)
        rejected = nll(outputs, part, models.shifted) - references[1]
        margin = self.beta * (rejected - preferred)
        return -2 / self.beta * functional.logsigmoid(margin) * self.units(part, models).to(margin), outputs

    def units(self, part: Part, models: Models) -> Tensor:
        """1 for each row of which both answers have a label."""
        both = [tokens(side, models.shifted) > 0 for side in (part, alternative_of(part))]
        return torch.logical_and(*both).long()

    def prepared(self, part: Part, models: Models) -> Part:
        """With the reference's likelihoods of both answers."""
        other = with_reference_nll(alternative_of(part), models)
        return {**with_reference_nll(part, models), "alternative": other}


@dataclass(frozen=True)
class Refusal(NegativeLogLikelihood):
    """Cross-entropy on the alternatives, which take the place of the answers to forget."""

    def prepared(self, part: Part, models: Models) -> Part:
        """The alternatives alone."""
        del models
        return alternative_of(part)


@dataclass(frozen=True)
class DPO(ForgetRetain):
    """Direct preference optimisation: the alternative answer is preferred to the one to forget.

    Args:
        beta: inverse temperature.
        retain: "nll": cross-entropy on the retain data; "kl": KL(reference || model) there; None: no such term.
        retain_weight: its weight; the forget term has weight 1.

    Example:
        >>> DPO(beta=0.1).needs_reference
        True
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.beta, "beta")

    @property
    def forget_term(self) -> Term:
        """One preference a row."""
        return Preference(self.beta)


@dataclass(frozen=True)
class IDK(ForgetRetain):
    """Fine-tuning on refusals in place of the answers to forget.

    Args:
        retain: "nll": cross-entropy on the retain data; "kl": KL(reference || model) there; None: no such term.
        retain_weight: its weight; the forget term has weight 1.

    Example:
        >>> IDK().needs_reference
        False
    """

    @property
    def forget_term(self) -> Term:
        """Cross-entropy on the alternatives."""
        return Refusal()
