"""Gradient ascent on what is to be forgotten, alone and beside descent on what is to be retained.

    GradientAscent:     L = -NLL(forget) / tokens                                   (Jang et al., 2023)
    GradientDifference: L = -NLL(forget) / tokens + lambda NLL(retain) / tokens     (Liu et al., 2022)

With `retain="kl"` the second is TOFU's KL minimisation (Maini et al., 2024). Its code averages the divergence
over all positions; here, as everywhere, prompt and padding do not count. Both have no lower bound: they diverge
by nature, and a run that does not stop in time loses the whole model. `max_nll` bounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sharp._checks import check_positive
from hf_sharp.unlearning._objectives.base import Objective, Part, Term
from hf_sharp.unlearning._objectives.forget_retain import ForgetRetain
from hf_sharp.unlearning._objectives.likelihood import TokenTerm, nll
from hf_sharp.unlearning._objectives.models import Models


@dataclass(frozen=True)
class Ascent(TokenTerm):
    """The negative log-likelihood with its sign turned.

    Args:
        max_nll: a row whose mean NLL a token is above this has been forgotten, and pushes no further.
    """

    max_nll: float | None = None

    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """Minus the negative log-likelihood."""
        outputs = models.outputs(part)
        each = nll(outputs, part, models.shifted)
        if self.max_nll is not None:
            each = torch.minimum(each, self.max_nll * self.units(part, models).to(each))
        return -each, outputs


@dataclass(frozen=True)
class GradientAscent(Objective):
    """Ascent on the forget data, and nothing that keeps the rest.

    Args:
        max_nll: the mean NLL a token, in nats, above which a row pushes no further; None for no bound, as in the
            papers. The logarithm of the vocabulary's size is a uniform guess.

    Example:
        >>> sorted(GradientAscent().terms)
        ['forget']
    """

    max_nll: float | None = None

    def __post_init__(self) -> None:
        if self.max_nll is not None:
            check_positive(self.max_nll, "max_nll")

    @property
    def terms(self) -> dict[str, Term]:
        """Forget."""
        return {"forget": Ascent(self.max_nll)}


@dataclass(frozen=True)
class GradientDifference(ForgetRetain):
    """Ascent on the forget data and descent on the retain data.

    Args:
        max_nll: as in `GradientAscent`.
        retain: "nll": cross-entropy on the retain data; "kl": KL(reference || model) there; None: no such term.
        retain_weight: its weight; the forget term has weight 1.

    Example:
        >>> GradientDifference(retain_weight=2.0).weights
        {'forget': 1.0, 'retain': 2.0}
    """

    max_nll: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_nll is not None:
            check_positive(self.max_nll, "max_nll")

    @property
    def forget_term(self) -> Term:
        """The ascent."""
        return Ascent(self.max_nll)
