"""Which weights are perturbed: whole parameters (`NormLayers`, `ByName`) or entries (`FisherMask`, `RandomMask`).

A mask over parameters restricts the vector before its norm is taken, so that ||e|| = rho. A mask over entries drops
them afterwards, so that ||e|| <= rho as in the papers' code, unless `renormalise` is set.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hf_sharp.part import Part
from hf_sharp.vector import ParamVector, total, wide

if TYPE_CHECKING:
    from hf_sharp.landscape import Landscape

NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
NORM_NAME = re.compile(r"(layer|rms|batch|group|instance)_?norm", re.IGNORECASE)  # T5LayerNorm, LlamaRMSNorm, ...
Entries = Mapping[str, "Tensor | bool"]


@dataclass(frozen=True)
class Mask(Part):
    """Which weights a perturbation may move."""

    renormalise = False  # True: entries are dropped before the norm is taken, so that ||e|| = rho

    def names(self, landscape: Landscape) -> list[str] | None:
        """The parameters that the ascent needs a gradient for.

        Args:
            landscape: where this is.

        Returns:
            Their names; None for all.
        """
        del landscape
        return None

    def entries(self, grad: ParamVector, landscape: Landscape) -> Entries | None:
        """The entries that are perturbed, refreshed if that is due.

        Args:
            grad: the ascent gradient, not to be changed.
            landscape: where this is; a mask may evaluate.

        Returns:
            By parameter name a bool tensor of its shape, or True (all of it) or False (nothing); None for everything.
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
                f"The mask {self!r} selects none of the {len(landscape.names)} trainable parameters, so nothing would "
                f"be perturbed. They are named like {landscape.names[:3]}."
            )


@dataclass(frozen=True)
class NormLayers(Mask):
    """The parameters of normalisation layers only, found by type: SAM-ON (Mueller et al., 2023)."""

    def names(self, landscape: Landscape) -> list[str]:
        """The trainable parameters that normalisation layers own."""
        known = {id(p): name for name, p in landscape.host.parameters.items()}
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

    def names(self, landscape: Landscape) -> list[str]:
        """The trainable parameters whose name matches."""
        return [name for name in landscape.names if re.search(self.pattern, name)]


@dataclass(frozen=True)
class _Refreshed(Mask):
    """A mask over entries that is drawn anew at every step that `every` divides."""

    keep: float = 0.1
    every: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of entries that are perturbed, in (0, 1]; got {self.keep!r}.")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is a number of steps of at least 1; got {self.every!r}.")

    @abstractmethod
    def draw(self, grad: ParamVector, landscape: Landscape) -> dict[str, Tensor]:
        """A new mask.

        Args:
            grad: the ascent gradient, not to be changed.
            landscape: where this is.

        Returns:
            Bool tensors by parameter name, equal on all ranks.
        """

    def others(self, landscape: Landscape) -> bool:
        """What happens to parameters that `draw` leaves out: perturbed whole (True) or not at all (False)."""
        del landscape
        return False

    def entries(self, grad: ParamVector, landscape: Landscape) -> Entries:
        """The mask of this step; a refresh step perturbs with the mask that it draws."""
        last = self._state.get("refreshed")
        if last is None or landscape.step // self.every != last // self.every:
            self._state["mask"] = self.draw(grad, landscape)
            self._state["refreshed"] = landscape.step
        others, mask = self.others(landscape), self._state["mask"]
        return {name: mask.get(name, others) for name in landscape.names}


@dataclass(frozen=True)
class RandomMask(_Refreshed):
    """A random share of all entries, drawn from a private generator: the control for `FisherMask`.

    Args:
        keep: the share of entries that is perturbed; int(keep x entries) are.
        every: how many steps a draw is used.
    """

    def draw(self, grad: ParamVector, landscape: Landscape) -> dict[str, Tensor]:
        """The entries with the largest of as many random numbers."""
        scores = {
            name: torch.rand(g.shape, generator=landscape.random(name)).to(g.device)
            for name, g in zip(landscape.names, grad.tensors, strict=True)
            if g is not None
        }
        return largest(scores, self.keep)


@dataclass(frozen=True)
class FisherMask(_Refreshed):
    """The entries with the largest Fisher information: the mask of FSAM (Zhong et al., 2022).

    Args:
        keep: the share of eligible entries that is perturbed; int(keep x eligible) are.
        every: how many steps a mask is used; the step that refreshes it perturbs like any other.
        fisher: "batch": the square of the window's mean gradient, as in the authors' code, at no cost. "per_sample":
            the mean of the squared gradients of single rows in evaluation mode, as in the paper, at one backward a
            row.
        samples: how many rows of the window "per_sample" uses, on each rank.
        scope: "global": the largest over the whole network. "tensor": over each parameter by itself.
        outside: what happens to parameters named `bias` or `embed` and those of BatchNorm, which are not eligible:
            "always" perturbed (the authors' code) or "never".
        renormalise: False: the norm is over all entries and ||e|| <= rho (the authors' code). True: ||e|| = rho.
    """

    fisher: str = "batch"
    samples: int = 32
    scope: str = "global"
    outside: str = "always"
    renormalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("fisher", ("batch", "per_sample")), ("scope", ("global", "tensor"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}; got {getattr(self, name)!r}.")
        if self.outside not in ("always", "never"):
            raise ValueError(f"outside is 'always' or 'never'; got {self.outside!r}.")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples is a number of rows of at least 1; got {self.samples!r}.")

    def check(self, landscape: Landscape) -> None:
        """Refuse a share of the eligible entries that rounds to nothing.

        Raises:
            ValueError: if no entry would be perturbed.
        """
        eligible = self._eligible(landscape)
        sizes = [p.numel() for name, p in landscape.host.parameters.items() if name in eligible]
        kept = int(self.keep * sum(sizes)) if self.scope == "global" else sum(int(self.keep * n) for n in sizes)
        if not kept and (self.outside == "never" or len(eligible) == len(landscape.names)):
            raise ValueError(
                f"The mask {self!r} keeps none of {sum(sizes)} eligible entries, so nothing would be perturbed."
            )

    def others(self, landscape: Landscape) -> bool:
        """Parameters that are not eligible."""
        del landscape
        return self.outside == "always"

    def draw(self, grad: ParamVector, landscape: Landscape) -> dict[str, Tensor]:
        """The entries with the largest Fisher diagonal."""
        eligible = self._eligible(landscape)
        fisher = grad.map(lambda g: wide(g).abs()) if self.fisher == "batch" else self._per_sample(landscape)
        scores = {
            name: f
            for name, f in zip(landscape.names, fisher.tensors, strict=True)
            if f is not None and name in eligible
        }
        if self.scope == "global":
            return largest(scores, self.keep)
        return {name: largest({name: f}, self.keep)[name] for name, f in scores.items()}

    def _eligible(self, landscape: Landscape) -> set[str]:
        known = {id(p): name for name, p in landscape.host.parameters.items()}
        batch_norms = [
            m for m in landscape.modules.values() if isinstance(m, _NormBase) or "BatchNorm" in type(m).__name__
        ]
        excluded = {known[id(p)] for m in batch_norms for p in m.parameters(recurse=False) if id(p) in known}
        return {name for name in landscape.names if "bias" not in name and "embed" not in name} - excluded

    def _per_sample(self, landscape: Landscape) -> ParamVector:
        squares: list[Tensor | None] = [None] * len(landscape.names)
        for grad in landscape.row_gradients(self.samples):
            for index, g in enumerate(grad.tensors):
                if g is not None:
                    square = wide(g / landscape.loss_scale.to(g.device)).square()
                    old = squares[index]
                    squares[index] = square if old is None else old.add_(square)
        return landscape.mean_over_ranks(ParamVector(squares))


def largest(scores: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The largest int(keep x entries) of all scores, ties going to the entries that come first.

    The k-th largest value is found by bisection over the bit patterns of the numbers (which order non-negative
    floats), on the device: 31 counts for float32, 63 for float64, no sort and no wait.

    Args:
        scores: non-negative tensors.
        keep: the share.

    Returns:
        Bool tensors of the same shapes.
    """
    if not scores:
        return {}
    exact = torch.float64 if any(s.dtype == torch.float64 for s in scores.values()) else torch.float32
    pattern = torch.int64 if exact == torch.float64 else torch.int32
    bits = {name: s.to(exact).view(pattern) for name, s in scores.items()}
    k = int(keep * sum(b.numel() for b in bits.values()))
    home = next(iter(bits.values()))
    low = torch.zeros((), dtype=torch.int64, device=home.device)
    high = torch.full_like(low, torch.iinfo(home.dtype).max)
    for _ in range(torch.iinfo(home.dtype).bits - 1):  # the largest t with at least k entries >= t
        middle = high - (high - low) // 2
        enough = total((b >= middle.to(b.device)).sum() for b in bits.values()) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    spare = k - total((b > low.to(b.device)).sum() for b in bits.values())
    masks = {}
    for name, b in bits.items():
        threshold = low.to(b.device)
        tied = b == threshold
        rank = tied.flatten().cumsum(0).view_as(b)
        masks[name] = (b > threshold) | (tied & (rank <= spare.to(b.device)))
        spare = (spare - tied.sum().to(spare.device)).clamp_min(0)
    return masks
