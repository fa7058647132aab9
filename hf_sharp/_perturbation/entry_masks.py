"""Masks over single entries, drawn anew every so many steps: `FisherMask` and its control, `RandomMask`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hf_sharp._checks import check_choice, check_count, check_share
from hf_sharp._engine.landscape import Landscape
from hf_sharp._perturbation.kept import COUNT, MASKS
from hf_sharp._perturbation.masks import Entries, Mask
from hf_sharp._tensors.shards import earlier, like, local, placed, summed
from hf_sharp._tensors.vector import ParamVector, chunks, nan_unless_finite, wide


@dataclass(frozen=True)
class _Refreshed(Mask):
    """A mask over entries that is drawn anew at every step that `every` divides."""

    remembers: ClassVar = {"mask": MASKS, "refreshed": COUNT}

    keep: float = 0.1
    every: int = 100

    def __post_init__(self) -> None:
        check_share(self.keep, "keep", "the share of entries that are perturbed")
        check_count(self.every, "every")

    @abstractmethod
    def draw(self, grad: ParamVector, landscape: Landscape) -> tuple[dict[str, Tensor], Tensor | None]:
        """A new mask.

        Args:
            grad: the ascent gradient, not to be changed.
            landscape: the step's, for masks that evaluate single rows or draw by seed and step.

        Returns:
            Bool tensors by parameter name, equal on all ranks; and `Entries.overflow`.
        """

    def whole(self, landscape: Landscape) -> set[str]:
        """The parameters that are perturbed as a whole, outside the mask.

        Args:
            landscape: the step's, or the model's before training; only names and modules are read.

        Returns:
            Their names; the default is none.
        """
        del landscape
        return set()

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """What is outside moves as a whole, of the rest the share `keep`."""
        whole = self.whole(landscape)
        return {name: 1.0 if name in whole else self.keep for name in landscape.facts.names}

    def entries(self, grad: ParamVector, landscape: Landscape) -> Entries:
        """The mask of this step; a refresh step perturbs with the mask that it draws."""
        last, overflow = self._state.get("refreshed"), None
        if last is None or landscape.facts.step // self.every != last // self.every:
            self._state["mask"], overflow = self.draw(grad, landscape)
            self._state["refreshed"] = landscape.facts.step
        whole, mask = self.whole(landscape), self._state.get("mask", {})
        landscape.facts.check_shapes(mask)
        return Entries({name: mask.get(name, name in whole) for name in landscape.facts.names}, overflow)


@dataclass(frozen=True)
class RandomMask(_Refreshed):
    """A random share of all entries, drawn from a private generator: the control for `FisherMask`.

    Args:
        keep: the share of entries that is perturbed; int(keep x entries) are.
        every: how many steps a draw is used.
    """

    def draw(self, grad: ParamVector, landscape: Landscape) -> tuple[dict[str, Tensor], None]:
        """The entries with the largest of as many random numbers."""
        del grad
        scores = {
            name: placed(torch.rand(p.shape, generator=landscape.facts.random(name)), p)
            for name, p in landscape.facts.parameters.items()
        }
        return largest(scores, self.keep), None


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
        outside: what happens to biases, embeddings and the parameters of BatchNorm, which are not eligible: "always"
            perturbed (the authors' code) or "never".
        embeddings: which parameters count as embeddings. "modules": those that `nn.Embedding` modules own, so that
            GPT-2's `wte` and T5's `shared` do and BERT's `embeddings.LayerNorm` does not. "names": those with `embed`
            in their name, as in the authors' code.
        renormalise: False: the norm is over all entries and ||e|| <= rho (the authors' code). True: ||e|| = rho.
    """

    fisher: str = "batch"
    samples: int = 32
    scope: str = "global"
    outside: str = "always"
    embeddings: str = "modules"
    renormalise: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Biases, embeddings and BatchNorm are told by name and module; single rows, for the paper's Fisher."""
        return frozenset({"names", "modules"} | ({"rows"} if self.fisher == "per_sample" else set()))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.fisher, "fisher", ("batch", "per_sample"))
        check_choice(self.scope, "scope", ("global", "tensor"))
        check_choice(self.outside, "outside", ("always", "never"))
        check_choice(self.embeddings, "embeddings", ("modules", "names"))
        check_choice(self.renormalise, "renormalise", (True, False))
        check_count(self.samples, "samples", "a number of rows")

    def check(self, landscape: Landscape) -> None:
        """Refuse a model without eligible entries, and a share of them that rounds to nothing.

        Raises:
            ValueError: if no entry would be masked or perturbed, or if parameters are sharded and rows are asked for.
        """
        if self.fisher == "per_sample" and landscape.facts.sharded:
            raise ValueError(
                "fisher='per_sample' takes gradients of single rows on each rank, which sharded parameters (FSDP) do "
                "not have. Use fisher='batch', or DDP."
            )
        eligible = self._eligible(landscape)
        if not eligible:
            raise ValueError(
                f"The mask {self!r} finds no eligible parameter: all {len(landscape.facts.names)} trainable ones are "
                "biases, embeddings or BatchNorm, which stand outside it. Use SAM without a mask."
            )
        sizes = [p.numel() for name, p in landscape.facts.parameters.items() if name in eligible]
        kept = int(self.keep * sum(sizes)) if self.scope == "global" else sum(int(self.keep * n) for n in sizes)
        if not kept and not self.whole(landscape):
            raise ValueError(
                f"The mask {self!r} keeps none of {sum(sizes)} eligible entries, so nothing would be perturbed. "
                "Raise keep."
            )

    def whole(self, landscape: Landscape) -> set[str]:
        """The parameters that are not eligible, unless they never move."""
        return set(landscape.facts.names) - self._eligible(landscape) if self.outside == "always" else set()

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """What is outside moves as a whole or never."""
        shares, eligible = super().perturbed(landscape), self._eligible(landscape)
        return {name: share for name, share in shares.items() if share == 1.0 or name in eligible}

    def kept_names(self, landscape: Landscape) -> set[str]:
        """What the mask chooses from."""
        return self._eligible(landscape)

    def draw(self, grad: ParamVector, landscape: Landscape) -> tuple[dict[str, Tensor], Tensor | None]:
        """The entries with the largest Fisher diagonal."""
        eligible = self._eligible(landscape)
        if self.fisher == "batch":
            fisher, overflow = grad.map(lambda g: wide(g).abs()), None
        else:
            fisher = self._per_sample(landscape)
            overflow = nan_unless_finite(fisher.norm())
        scores = {
            name: f
            for name, f in zip(landscape.facts.names, fisher.tensors, strict=True)
            if f is not None and name in eligible
        }
        if self.scope == "global":
            return largest(scores, self.keep), overflow
        return {name: largest({name: f}, self.keep)[name] for name, f in scores.items()}, overflow

    def _eligible(self, landscape: Landscape) -> set[str]:
        """The names of what the mask chooses from: no bias, no embedding, nothing of BatchNorm."""
        known = {id(p): name for name, p in landscape.facts.parameters.items()}
        outside = [module for module in landscape.modules.values() if self._stands_outside(module)]
        excluded = {known[id(p)] for m in outside for p in m.parameters(recurse=False) if id(p) in known}
        words = ("bias", "embed") if self.embeddings == "names" else ("bias",)
        return {name for name in landscape.facts.names if not any(word in name for word in words)} - excluded

    def _stands_outside(self, module: nn.Module) -> bool:
        if isinstance(module, _NormBase) or "BatchNorm" in type(module).__name__:
            return True
        return self.embeddings == "modules" and isinstance(module, nn.Embedding | nn.EmbeddingBag)

    def _per_sample(self, landscape: Landscape) -> ParamVector:
        squares: list[Tensor | None] = [None] * len(landscape.facts.names)
        for grad in landscape.row_gradients(self.samples):
            for index, g in enumerate(grad.tensors):
                if g is not None:
                    square = wide(g / landscape.facts.loss_scale.to(g.device)).square()
                    old = squares[index]
                    squares[index] = square if old is None else old.add_(square)
        return landscape.ranks.mean(ParamVector(squares))


def largest(scores: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The largest int(keep x entries) of all scores, ties going to the entries that come first.

    The k-th largest value is found by bisection over the bit patterns of the numbers (which order non-negative
    floats), on the device: 31 counts for float32, 63 for float64, no sort and no wait.

    Args:
        scores: non-negative tensors, sharded or not; of sharded ones the largest over all ranks are taken.
        keep: the share.

    Returns:
        Bool tensors of the same shapes.
    """
    if not scores:
        return {}
    exact = torch.float64 if any(s.dtype == torch.float64 for s in scores.values()) else torch.float32
    pattern = torch.int64 if exact == torch.float64 else torch.int32
    bits = {name: local(s).to(exact).contiguous().view(pattern) for name, s in scores.items()}
    k = int(keep * sum(s.numel() for s in scores.values()))
    home, owners = next(iter(bits.values())), list(scores.values())
    low = torch.zeros((), dtype=torch.int64, device=home.device)
    high = torch.full_like(low, torch.iinfo(home.dtype).max)
    for _ in range(torch.iinfo(home.dtype).bits - 1):  # the largest t with at least k entries >= t
        middle = high - (high - low) // 2
        enough = summed((scores[n], (b >= middle.to(b.device)).sum()) for n, b in bits.items()) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    spare_here = k - summed((scores[n], (b > low.to(b.device)).sum()) for n, b in bits.items())
    ties = torch.stack([(b == low.to(b.device)).sum().to(home.device) for b in bits.values()])
    masks = {}
    for (name, b), before in zip(bits.items(), earlier(ties, owners), strict=True):
        mask, spare = torch.empty_like(b, dtype=torch.bool), (spare_here - before).clamp_min(0)
        for part, kept in chunks(b, mask):  # in parts, since ranks take eight bytes an entry
            tied = part == low.to(b.device)
            kept.copy_((part > low.to(b.device)) | (tied & (tied.cumsum(0) <= spare.to(b.device))))
            spare = (spare - tied.sum().to(spare.device)).clamp_min(0)
        masks[name] = like(mask, scores[name])
    return masks
