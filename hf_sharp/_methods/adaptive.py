"""AE-SAM (Jiang et al., ICLR 2023): the method only where the gradient is unusually long. Cost: about 1.5 with SAM.

    s = ||g||^2;  mu <- decay mu + (1 - decay) s;  var <- decay var + (1 - decay) (s - mu)^2  (first: mu = s, var = 0)
    the method if s >= mu + c sqrt(var),  c = lam1 t / T + lam2 (1 - t / T)

No official code is known; the formula is as quoted by others. Costs one wait for the device a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hf_sharp._checks import check_share
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._perturbation.kept import NUMBER


@dataclass(frozen=True)
class Adaptive(Method):
    """A method at the steps whose gradient is long compared with those before; plain training at the others.

    Args:
        method: a method whose first evaluation is at the present weights, such as SAM.
        lam1: the threshold in standard deviations at the end of training.
        lam2: that at its start.
        decay: how much of the old statistics a step keeps.

    Example:
        >>> from hf_sharp import SAM, Perturbation
        >>> Adaptive(SAM(Perturbation(rho=0.05))).cost
        1.5
    """

    remembers: ClassVar = {"mu": NUMBER, "var": NUMBER}

    method: Method
    lam1: float = -1.0
    lam2: float = 1.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ValueError(f"method is a Method, such as SAM(Perturbation(rho=0.05)); got {self.method!r}.")
        check_share(self.decay, "decay", "how much of the old statistics is kept", zero=True)
        if any(getattr(part, "ahead", False) for _, part in self.method.named_parts()) or "terms" in self.method.needs:
            raise ValueError(self._refusal())

    @property
    def needs(self) -> frozenset[str]:
        """The threshold falls over the length of training."""
        return frozenset({"length"})

    @property
    def cost(self) -> float:
        """About half the steps use the method; the data decide."""
        return 1 + 0.5 * (self.method.cost - 1)

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The method's own plan with the whole gradient, since its length decides.

        Returns:
            The plan.

        Raises:
            ValueError: if the method begins elsewhere or adds to the loss: the plain gradient decides.
        """
        plan = self.method.plan_first_pass(landscape)
        if plan.shift is not None or plan.add is not None or plan.terms is not None:
            raise ValueError(self._refusal())
        return plan._replace(only=None, synced=True)

    def _refusal(self) -> str:
        return f"{self.method!r} looks elsewhere before any gradient is known; Adaptive decides by one. Use Every."

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The method's gradient, or the one that is there already.

        Returns:
            The evaluation.

        Raises:
            ValueError: if the length of training is not known.
        """
        if landscape.facts.total_steps is None:
            raise ValueError(
                "Adaptive needs the number of training steps, which is not known here: set max_steps, or "
                "total_steps= of SharpStep."
            )
        squared = float((landscape.first.grad.norm() / landscape.facts.loss_scale).square())
        mu, var = squared, 0.0
        if self._state:
            mu = self.decay * self._state["mu"] + (1 - self.decay) * squared
            var = self.decay * self._state["var"] + (1 - self.decay) * (squared - mu) * (squared - mu)
        self._state.update(mu=mu, var=var)
        done = landscape.facts.step / landscape.facts.total_steps
        threshold = mu + (self.lam1 * done + self.lam2 * (1 - done)) * math.sqrt(var)
        return self.method.gradient(landscape) if squared >= threshold else landscape.evaluate()
