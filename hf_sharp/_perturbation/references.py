"""What TRAM compares the model's outputs with: the weights before, the weights at the start, or noisy inputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_sharp._checks import check_at_least_zero
from hf_sharp._engine.landscape import Landscape
from hf_sharp._perturbation.kept import LIKE_WEIGHTS
from hf_sharp._perturbation.noise import input_embeddings, noisy_inputs
from hf_sharp._perturbation.part import Part


@dataclass(frozen=True)
class Reference(Part):
    """Another distribution over the labels of the same inputs."""

    @abstractmethod
    def outputs(self, batch: Any, landscape: Landscape) -> Any:
        """The outputs to compare with, with the same dropout as the model's own.

        Args:
            batch: the micro-batch being evaluated.
            landscape: the step's, in the middle of its first pass.

        Returns:
            The outputs, without gradients.
        """

    def remember(self, landscape: Landscape) -> None:
        """Called when the step's passes are made, before the optimizer moves the weights.

        Args:
            landscape: the step's, at the unshifted weights.
        """


@dataclass(frozen=True)
class PreviousWeights(Reference):
    """The weights of the step before (TRAM-theta_{t-1}); at the first step the present ones, a divergence of zero."""

    remembers: ClassVar = {"weights": LIKE_WEIGHTS}

    def outputs(self, batch: Any, landscape: Landscape) -> Any:
        """The outputs at the remembered weights."""
        weights = self._state.get("weights")
        return landscape.outputs_at(batch, None if weights is None else landscape.facts.vector(weights))

    def remember(self, landscape: Landscape) -> None:
        """A copy of the weights before the update."""
        self._state["weights"] = landscape.facts.named(landscape.weights.scale(1.0))


@dataclass(frozen=True)
class PretrainedWeights(Reference):
    """The weights at the start of training (TRAM-theta_0): a frozen copy of the trainables.

    For adapters that is a copy of the adapters alone, and as they start as zero it is the model with the adapter
    switched off, without switching anything.
    """

    remembers: ClassVar = {"weights": LIKE_WEIGHTS}

    def outputs(self, batch: Any, landscape: Landscape) -> Any:
        """The outputs at the first weights."""
        weights = self._state.get("weights")
        return landscape.outputs_at(batch, None if weights is None else landscape.facts.vector(weights))

    def begin(self, landscape: Landscape) -> None:
        """A copy of the weights, at the first step of training only."""
        if "weights" not in self._state:
            self._state["weights"] = landscape.facts.named(landscape.weights.scale(1.0))


@dataclass(frozen=True)
class NoisyInputs(Reference):
    """The present weights with normal noise on the embedded inputs (TRAM-x).

    Args:
        sigma: standard deviation of the noise; 0.1 is R3F's, TRAM's own is not printed.
    """

    sigma: float = 0.1

    def __post_init__(self) -> None:
        check_at_least_zero(self.sigma, "sigma")

    @property
    def needs(self) -> frozenset[str]:
        """The input embedding is one of the modules; noise goes by row."""
        return frozenset({"modules", "rows"})

    def check(self, landscape: Landscape) -> None:
        """Refuse a model whose input embedding cannot be found."""
        input_embeddings(landscape.model)

    def outputs(self, batch: Any, landscape: Landscape) -> Any:
        """The outputs at the present weights, for noisy inputs."""
        with noisy_inputs(landscape, self.sigma):
            return landscape.outputs_at(batch)
