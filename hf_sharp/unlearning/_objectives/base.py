"""What an objective is: a loss of named terms, each a sum over units with a normaliser of its own.

A term of a window's loss is the sum of its rows' losses over the number of its units (tokens or sequences) in the
whole window and on all ranks, so that it does not depend on how the window is cut. The trainer counts and divides;
a term says what a row's loss and units are. It reads these columns of its part of a batch:

* `input_ids`, `attention_mask` and whatever else the model takes;
* `labels`: -100 where a position does not count, and otherwise the token at that place;
* `reference_nll` (optional): the reference model's negative log-likelihood of each row, summed over its labels; what
  is missing is computed;
* `alternative` (DPO, IDK): a dict of the same columns with another answer to the same prompt, row by row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_sharp.unlearning._objectives.models import Models

Part = Mapping[str, Any]


@dataclass(frozen=True)
class Term(ABC):
    """One named term of a loss."""

    reference = False  # whether it compares with a reference model,
    precomputable = False  # and whether columns of the data can stand for it

    @abstractmethod
    def losses(self, part: Part, models: Models) -> tuple[Tensor, Any]:
        """The loss of each row, summed over the row's units.

        Args:
            part: the term's part of a batch, on the model's device.
            models: the model and its reference.

        Returns:
            A tensor of shape (rows,) in float32 or better, zero for rows without units, and the model's outputs.
        """

    @abstractmethod
    def units(self, part: Part, models: Models) -> Tensor:
        """How many units each row's loss is a sum of.

        Args:
            part: the term's part of a batch.
            models: the model and its reference.

        Returns:
            An integer tensor of shape (rows,); zero for rows of which no label counts.
        """

    def prepared(self, part: Part, models: Models) -> Part:
        """A part as the term reads it, made once before the passes of a step: with what the reference says of a row.

        Args:
            part: the term's part of a batch, on the model's device.
            models: the model and its reference.

        Returns:
            A new part; by default the part itself.
        """
        del models
        return part


@dataclass(frozen=True)
class Objective(ABC):
    """A loss of named terms; subclasses are frozen dataclasses of settings."""

    @property
    @abstractmethod
    def terms(self) -> dict[str, Term]:
        """The terms by the names that batches have them under."""

    @property
    def weights(self) -> dict[str, float]:
        """The terms' weights, by default 1."""
        return dict.fromkeys(self.terms, 1.0)

    @property
    def needs_reference(self) -> bool:
        """Whether a term compares with a reference model."""
        return any(term.reference for term in self.terms.values())

    def unreached(self, module: nn.Module) -> list[str]:
        """Trainable parameters of a model that a term's loss does not reach.

        Args:
            module: the unwrapped model.

        Returns:
            Their names; by default there are none.
        """
        del module
        return []
