"""Negative preference optimisation and its form without a reference.

    NPO:    L = (2/beta) mean_i log(1 + (pi(y_i|x_i) / pi_ref(y_i|x_i))^beta)
              = -(2/beta) mean_i log sigma(beta (NLL_i - NLL_ref,i))               (Zhang et al., 2024, Eq. 3)
    SimNPO: L = -(2/beta) mean_i log sigma((beta/|y_i|) NLL_i - gamma)             (Fan et al., 2024)

NLL_i is summed over the answer of sequence i, the mean is over sequences, as in the authors' code for TOFU. Other
public code takes one ratio a batch (Unlearn-Smooth on WMDP) or applies sigma to raw logits (its MUSE part), which are
other losses. SimNPO's paper has the margin gamma outside of beta, its code inside, -(2/beta) log sigma(beta (NLL/|y| -
gamma)); here it is the paper's. At gamma = 0 they are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from hf_sharp._checks import check_positive, is_number
from hf_sharp.unlearning._objectives.base import Part, Term
from hf_sharp.unlearning._objectives.forget_retain import ForgetRetain
from hf_sharp.unlearning._objectives.likelihood import SequenceTerm, nll, reference_nll, tokens, with_reference_nll
from hf_sharp.unlearning._objectives.models import Models


@dataclass(frozen=True)
class NegativePreference(SequenceTerm):
    """-(2/beta) log sigma(beta (NLL - NLL_ref)).

    Args:
        beta: inverse temperature.
    """

    beta: float

    reference = precomputable = True

    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """The loss of each sequence."""
        reference = reference_nll(part, models)
        outputs = models.outputs(part)
        each = nll(outputs, part, models.shifted)
        margin = self.beta * (each - reference.to(each))
        return -2 / self.beta * functional.logsigmoid(margin) * self.units(part, models).to(each), outputs

    def prepared(self, part: Part, models: Models) -> Part:
        """With the reference's likelihoods."""
        return with_reference_nll(part, models)


@dataclass(frozen=True)
class SimpleNegativePreference(SequenceTerm):
    """-(2/beta) log sigma(beta NLL / |y| - gamma).

    Args:
        beta: inverse temperature.
        gamma: margin.
    """

    beta: float
    gamma: float

    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """The loss of each sequence."""
        outputs = models.outputs(part)
        each = nll(outputs, part, models.shifted)
        length = tokens(part, models.shifted).clamp_min(1).to(each)
        margin = self.beta * each / length - self.gamma
        return -2 / self.beta * functional.logsigmoid(margin) * self.units(part, models).to(each), outputs


@dataclass(frozen=True)
class NPO(ForgetRetain):
    """Negative preference optimisation: ascent that fades for sequences which the reference likes better by now.

    Args:
        beta: inverse temperature, 0.1 in the paper; towards 0 this is gradient ascent on summed NLL.
        retain: "nll": cross-entropy on the retain data; "kl": KL(reference || model) there; None: no such term.
        retain_weight: its weight; the forget term has weight 1.

    Example:
        >>> NPO(beta=0.1, retain="kl").needs_reference
        True
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.beta, "beta")

    @property
    def forget_term(self) -> Term:
        """One ratio a sequence."""
        return NegativePreference(self.beta)


@dataclass(frozen=True)
class SimNPO(ForgetRetain):
    """NPO on length-normalised likelihoods, without a reference model.

    Args:
        beta: inverse temperature; 4.5 in open-unlearning, which repeats the authors' TOFU runs.
        gamma: margin, 0 in these runs.
        retain: "nll": cross-entropy on the retain data; "kl": KL(reference || model) there; None: no such term.
        retain_weight: its weight; the forget term has weight 1. In open-unlearning forget has 0.125 and retain 1.

    Example:
        >>> SimNPO().needs_reference
        False
    """

    beta: float = 4.5
    gamma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.beta, "beta")
        if not is_number(self.gamma):
            raise ValueError(f"gamma is a number; got {self.gamma!r}.")

    @property
    def forget_term(self) -> Term:
        """One length-normalised likelihood a sequence."""
        return SimpleNegativePreference(self.beta, self.gamma)
