"""How far is far: the ball in which a perturbation goes to the worst loss.

A ball is a positive diagonal metric M. Among all e with e' M^-1 e <= rho^2, the one that raises the linearised loss
most is

    e = rho M g / sqrt(g' M g)

which is SAM for M = 1 (Foret et al., 2021), ASAM for M = T^2 (Kwon et al., 2021) and Fisher-metric SAM for M = F^-1
(Kim et al., 2022).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sharp._checks import check_at_least_zero, check_choice
from hf_sharp._engine.landscape import Landscape
from hf_sharp._perturbation.part import Part
from hf_sharp._tensors.shards import summed
from hf_sharp._tensors.vector import ParamVector, chunks, wide

WEIGHT = re.compile(r"(^|\.)weight(\.|_|$)")  # the ASAM authors' name rule: `weight`, `weight_g`, `weight.original0`


@dataclass(frozen=True)
class Ball(Part):
    """What the length of a perturbation is measured by: a diagonal metric M, positive on every entry."""

    @abstractmethod
    def metric(self, grad: Tensor, weight: Tensor, name: str, landscape: Landscape) -> Tensor:
        """The diagonal of M on entries of one parameter.

        Args:
            grad: the ascent gradient or a part of it, loss-scaled, in float32 or better.
            weight: the parameter's values at the same entries.
            name: the parameter's name.
            landscape: the step's; of it a metric reads the loss scale.

        Returns:
            A tensor of the gradient's shape.
        """

    def length(self, grad: ParamVector, landscape: Landscape) -> Tensor:
        """The length of g that the perturbation is divided by.

        Args:
            grad: the ascent gradient.
            landscape: the step's, at the weights that M is of.

        Returns:
            sqrt(g' M g), a 0-dim tensor.
        """
        return summed((owner, (g * image).sum()) for owner, _, g, image in self._images(grad, landscape)).sqrt()

    def stretch_(self, grad: ParamVector, landscape: Landscape) -> Tensor:
        """Turn g into M g, in place.

        Args:
            grad: the ascent gradient, which the caller owns.
            landscape: the step's, at the weights that M is of.

        Returns:
            sqrt(g' M g) of the old g, a 0-dim tensor.
        """
        products = []
        for owner, target, g, image in self._images(grad, landscape):
            products.append((owner, (g * image).sum()))
            target.copy_(image)
        return summed(products).sqrt()

    def _images(self, grad: ParamVector, landscape: Landscape) -> Iterator[tuple[Tensor, ...]]:
        """A part of a parameter at a time: the gradient it is of; g as stored; g and M g in float32 or better."""
        for stored, w, name in zip(grad.tensors, landscape.weights.tensors, landscape.facts.names, strict=True):
            if stored is not None and w is not None:
                for part, weight in chunks(stored, w):
                    g = wide(part)
                    yield stored, part, g, g * self.metric(g, wide(weight), name, landscape)


@dataclass(frozen=True)
class L2Ball(Ball):
    """The Euclidean ball of SAM (Foret et al., 2021): M = 1."""

    def metric(self, grad: Tensor, weight: Tensor, name: str, landscape: Landscape) -> Tensor:
        """1 on every entry."""
        del weight, name, landscape
        return torch.ones_like(grad)

    def length(self, grad: ParamVector, landscape: Landscape) -> Tensor:
        """The Euclidean norm of g, all tensors at once."""
        del landscape
        return grad.norm()

    def stretch_(self, grad: ParamVector, landscape: Landscape) -> Tensor:
        """Nothing to stretch: the norm of g, and g stays."""
        del landscape
        return grad.norm()


@dataclass(frozen=True)
class AdaptiveBall(Ball):
    """The ball of ASAM, which rescaling the weights does not change (Kwon et al., 2021): M = T^2.

    Args:
        eta: added to |w| in T, so that weights at zero are perturbed too.
        on: "weights": T = |w| + eta on the tensors named `weight` (linear, convolution, embedding and normalisation
            layers), 1 elsewhere, as the authors' code has it. "all": T = |w| + eta everywhere; with eta = 0 this is
            the widely used variant of davda54/sam.
    """

    eta: float = 0.01
    on: str = "weights"

    def __post_init__(self) -> None:
        check_at_least_zero(self.eta, "eta")
        check_choice(self.on, "on", ("weights", "all"))

    @property
    def needs(self) -> frozenset[str]:
        """The parameters' names, where it goes by them."""
        return frozenset({"names"} if self.on == "weights" else ())

    def metric(self, grad: Tensor, weight: Tensor, name: str, landscape: Landscape) -> Tensor:
        """T^2 = (|w| + eta)^2; 1 on tensors that are not named `weight`, unless `on` is "all"."""
        del landscape
        if self.on == "weights" and not WEIGHT.search(name):
            return torch.ones_like(grad)
        return (weight.abs() + self.eta).square()


@dataclass(frozen=True)
class FisherBall(Ball):
    """The Fisher metric of Kim et al. (2022): M = D = 1 / (1 + eta F), F the square of the window's unscaled gradient.

    The gradient is that of the mean over the window, also where the host's loss is a multiple of it.

    Args:
        eta: weight of the Fisher diagonal against the Euclidean metric; 0 gives `L2Ball`.
    """

    weighs = True

    eta: float = 0.1

    def __post_init__(self) -> None:
        check_at_least_zero(self.eta, "eta")

    def metric(self, grad: Tensor, weight: Tensor, name: str, landscape: Landscape) -> Tensor:
        """D = 1 / (1 + eta F), F the square of the gradient without its loss scale."""
        del weight, name
        facts = landscape.facts
        fisher = (grad / (facts.loss_scale.to(grad.device) * facts.inflation)).square()
        return 1 / (1 + self.eta * fisher)
