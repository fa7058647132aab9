"""Which weights are perturbed: the role of a mask, and masks over whole parameters (`NormLayers`, `ByName`).

A mask over parameters restricts the vector before its norm is taken, so that ||e|| = rho. A mask over entries
(`entry_masks.py`) drops them afterwards, so that ||e|| <= rho as in the papers' code, unless `renormalise`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hf_sharp._engine.landscape import Landscape
from hf_sharp._perturbation.part import Part
from hf_sharp._tensors.vector import ParamVector

NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
NORM_NAME = re.compile(r"(layer|rms|batch|group|instance)_?norm", re.IGNORECASE)  # T5LayerNorm, LlamaRMSNorm, ...


class Entries(NamedTuple):
    """Which entries of the parameters are perturbed.

    Attributes:
        kept: by parameter name a bool tensor of its shape, or True (all of it) or False (nothing).
        overflow: a 0-dim tensor, NaN if what the mask was drawn from was not finite, else 0; None if that cannot be.
    """

    kept: Mapping[str, Tensor | bool]
    overflow: Tensor | None = None


@dataclass(frozen=True)
class Mask(Part):
    """Which weights a perturbation may move."""

    renormalise = False  # True: entries are dropped before the norm is taken, so that ||e|| = rho

    def names(self, landscape: Landscape) -> list[str] | None:
        """The parameters that the ascent needs a gradient for.

        Args:
            landscape: the step's, or the model's before training; only names and modules are read.

        Returns:
            Their names; None for all.
        """
        del landscape
        return None

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """The share of entries that may move, by parameter name.

        Args:
            landscape: the model's, without data.

        Returns:
            1 for a parameter that moves as a whole; parameters that never move are missing.
        """
        names = self.names(landscape)
        return dict.fromkeys(landscape.facts.names if names is None else names, 1.0)

    def entries(self, grad: ParamVector, landscape: Landscape) -> Entries | None:
        """The entries that are perturbed, refreshed if that is due.

        Args:
            grad: the ascent gradient, not to be changed.
            landscape: the step's; a mask may evaluate.

        Returns:
            The entries; None for everything.
        """
        del grad, landscape
        return None

    def check(self, landscape: Landscape) -> None:
        """Refuse a mask that leaves nothing to perturb.

        Raises:
            ValueError: if the mask is empty for this model.
        """
        names = self.names(landscape)
        if names is not None and not names:
            raise ValueError(
                f"The mask {self!r} selects none of the {len(landscape.facts.names)} trainable parameters, so nothing "
                f"would be perturbed. They are named like {landscape.facts.names[:3]}. Use another mask, or none."
            )


@dataclass(frozen=True)
class NormLayers(Mask):
    """The parameters of normalisation layers only, found by type: SAM-ON (Mueller et al., 2023)."""

    @property
    def needs(self) -> frozenset[str]:
        """Norm layers are told by the type of the module."""
        return frozenset({"modules"})

    def names(self, landscape: Landscape) -> list[str]:
        """The trainable parameters that normalisation layers own."""
        known = {id(p): name for name, p in landscape.facts.parameters.items()}
        norms = [
            m for m in landscape.modules.values() if isinstance(m, NORM_TYPES) or NORM_NAME.search(type(m).__name__)
        ]
        return [known[id(p)] for m in norms for p in m.parameters(recurse=False) if id(p) in known]


@dataclass(frozen=True)
class ByName(Mask):
    """The parameters whose name matches a pattern.

    Args:
        pattern: a regular expression, searched for in each parameter's name.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"pattern is a regular expression over parameter names; got {self.pattern!r}: {error}."
            ) from error

    @property
    def needs(self) -> frozenset[str]:
        """The pattern goes over the parameters' names."""
        return frozenset({"names"})

    def names(self, landscape: Landscape) -> list[str]:
        """The trainable parameters whose name matches."""
        return [name for name in landscape.facts.names if re.search(self.pattern, name)]
