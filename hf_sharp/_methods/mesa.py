"""MESA (Du et al., NeurIPS 2022): stay near the outputs of the averaged weights, SAM for a forward. Cost: 4/3.

    L + lam T^2 KL(softmax(teacher / T) || softmax(model / T)),  teacher weights <- decay teacher + (1 - decay) w

The mean is over the positions that the loss looks at; the teacher is kept in float32 or better. The logged loss holds
the added term. The average is taken at every step of training, also where a combinator leaves the term out (a late
start, an interval), as in the authors' code. Their teacher predicts in evaluation mode; here it has the model's mode
and the same dropout, since a forward at other weights repeats the pass that is being made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sharp._checks import check_at_least_zero, check_positive, check_share
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import remembered, timed
from hf_sharp._perturbation.kept import AT_LEAST_FLOAT32
from hf_sharp._tensors.divergences import kl_sum, window_positions
from hf_sharp._tensors.vector import ParamVector


@dataclass(frozen=True)
class MESA(Method):
    """The gradient of the loss plus a trajectory loss towards a running mean of the weights.

    Args:
        lam: weight of the trajectory loss; 0 gives plain training. The paper starts it after some epochs: `After`,
            before which only the average is taken.
        decay: how much of the old mean a step keeps.
        temperature: T.

    Example:
        >>> MESA(lam=0.8).cost
        1.3333333333333333
    """

    remembers: ClassVar = {"teacher": AT_LEAST_FLOAT32}
    ahead = True
    weighs = True

    lam: float = 0.8
    decay: float = 0.999
    temperature: float = 5.0

    def __post_init__(self) -> None:
        check_at_least_zero(self.lam, "lam")
        check_share(self.decay, "decay", "how much of the old mean is kept", zero=True)
        check_positive(self.temperature, "temperature")

    @property
    def needs(self) -> frozenset[str]:
        """Outputs with a term on them, and the number of positions of the whole window beforehand."""
        return frozenset({"outputs", "window"})

    @property
    def cost(self) -> float:
        """One evaluation and the teacher's forward, which counts as a third."""
        return 1.0 + 1 / 3

    def begin(self, landscape: Landscape) -> None:
        """The teacher takes in the present weights, at every step of training."""
        facts = landscape.facts
        here = landscape.weights.map(lambda w: w.to(torch.promote_types(w.dtype, torch.float32), copy=True))
        new, old = here, self._state.get("teacher")
        if old is not None:
            known = facts.vector(facts.named(here) | old)  # a weight that was frozen before joins as it is
            new = known.scale(self.decay).add_(here, 1 - self.decay)
        self._state["teacher"] = facts.named(new)

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The teacher's term belongs to the first evaluation."""
        teacher = landscape.facts.vector(self._state["teacher"])
        counts: dict[int, Tensor] = {}
        return FirstPass(add=lambda outputs, batch: self._term(outputs, batch, landscape, teacher, counts))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The first evaluation, which `plan_first_pass` gave the term."""
        return landscape.evaluate()

    def _term(
        self, outputs: Any, batch: Any, landscape: Landscape, teacher: ParamVector, counts: dict[int, Tensor]
    ) -> Tensor:
        reference, shifted = landscape.outputs_at(batch, landscape.facts.cast(teacher)), landscape.facts.shifts_labels
        summed = kl_sum(reference, outputs, batch, shifted, temperature=self.temperature)
        number, batches = landscape.window.group
        if number not in counts:  # the host normalises each announced group of micro-batches by itself
            counts[number] = landscape.ranks.sum(window_positions(batches, shifted))
        return self.lam * self.temperature**2 * summed / counts[number].to(summed.device).clamp_min(1)


@remembered
def mesa(
    lam: float = 0.8, decay: float = 0.999, temperature: float = 5.0, interval: int = 1, start: float = 0.0
) -> Method:
    """MESA (Du et al., 2022): the loss plus a divergence from the outputs of the averaged weights.

    Args:
        lam: weight of the divergence; the paper's 0.8.
        decay: how much of the old average a step keeps; the default of the authors' script is 0.9998.
        temperature: divides the logits; the paper's 5.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before; the average is taken all the same, and the paper starts
            after 5 of its many epochs.

    Returns:
        The method, of cost 1 + 1/3; memory: 2 copies.
    """
    return timed(MESA(lam, decay, temperature), interval, start)
