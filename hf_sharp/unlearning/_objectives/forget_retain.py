"""An objective with a term to forget and a term to retain, the form that most of them have."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from hf_sharp._checks import check_positive
from hf_sharp.unlearning._objectives.base import Objective, Term
from hf_sharp.unlearning._objectives.likelihood import KullbackLeibler, NegativeLogLikelihood


@dataclass(frozen=True)
class ForgetRetain(Objective):
    """An objective with a term to forget and one to retain.

    Args:
        retain: "nll": cross-entropy on the retain data; "kl": KL(reference || model) there; None: no such term.
        retain_weight: its weight; the forget term has weight 1.
    """

    retain: str | None = field(default="nll", kw_only=True)
    retain_weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        known = tuple(self.retain_terms)
        if self.retain is not None and self.retain not in known:
            raise ValueError(f"retain is one of {', '.join(known)} or None; got {self.retain!r}.")
        check_positive(self.retain_weight, "retain_weight")

    @property
    @abstractmethod
    def forget_term(self) -> Term:
        """The term to forget."""

    @property
    def retain_terms(self) -> dict[str, Term]:
        """The terms that `retain` may name."""
        return {"nll": NegativeLogLikelihood(), "kl": KullbackLeibler()}

    @property
    def terms(self) -> dict[str, Term]:
        """Forget, and retain if there is one."""
        forget = {"forget": self.forget_term}
        return forget if self.retain is None else {**forget, "retain": self.retain_terms[self.retain]}

    @property
    def weights(self) -> dict[str, float]:
        """1 and `retain_weight`."""
        return {name: 1.0 if name == "forget" else float(self.retain_weight) for name in self.terms}
