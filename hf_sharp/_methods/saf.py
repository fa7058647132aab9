"""SAF (Du et al., NeurIPS 2022): stay near each sample's own outputs of some visits ago, SAM for free. Cost: 1.

    L + lam T^2 KL(softmax(then / T) || softmax(now / T)),  then = the sample's logits `lag` visits ago

The mean is over all rows of the window; a row seen fewer than `lag` times before adds nothing. Logits are kept on the
CPU under the row's number, the column `sample_index` of the data set: lag x rows x classes numbers, refused for
outputs with a vocabulary. The logged loss holds the added term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sharp._checks import check_at_least_zero, check_count, check_positive
from hf_sharp._engine.evaluation import Evaluation, FirstPass
from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import remembered, timed
from hf_sharp._perturbation.kept import BLOCKS, UnfitState, check_tensor
from hf_sharp._tensors.divergences import kl_sum, logits_of, window_positions

BLOCK = 256  # rows kept in one tensor: a step replaces the blocks it touches, so that it can be undone
MOST = 10_000  # classes


@dataclass(frozen=True)
class SAF(Method):
    """The gradient of the loss plus a trajectory loss towards each sample's own earlier outputs.

    Args:
        lam: weight of the trajectory loss; 0 gives plain training.
        lag: how many visits (epochs) ago.
        temperature: T.

    Example:
        >>> SAF(lam=0.3, lag=3).cost
        1.0
    """

    remembers: ClassVar = {"logits": BLOCKS, "visits": BLOCKS}
    ahead = True
    weighs = True

    lam: float = 0.3
    lag: int = 3
    temperature: float = 5.0

    def __post_init__(self) -> None:
        check_at_least_zero(self.lam, "lam")
        check_count(self.lag, "lag", "a number of visits")
        check_positive(self.temperature, "temperature")

    @property
    def needs(self) -> frozenset[str]:
        """Outputs with a term on them, the window's number of rows beforehand, and the rows' own numbers."""
        return frozenset({"outputs", "window", "index"})

    @property
    def cost(self) -> float:
        """One evaluation."""
        return 1.0

    def check(self, landscape: Landscape) -> None:
        """Refuse several processes: each would know only the rows that it has seen itself.

        Raises:
            ValueError: if there are several.
        """
        if landscape.facts.ranks > 1:
            raise ValueError("SAF keeps outputs in one process, and rows change ranks from epoch to epoch. Use MESA.")

    def check_state(self, state: Mapping[str, Any], path: str, landscape: Landscape) -> None:
        """Logits and visits of the same rows; how many classes there are the first batch tells."""
        super().check_state(state, path, landscape)
        logits, visits = state.get("logits", {}), state.get("visits", {})
        if logits.keys() != visits.keys():
            raise UnfitState(f"'{path}:logits' and '{path}:visits' are of other rows")
        classes = {tensor.shape[-1] for tensor in logits.values() if tensor.ndim}
        if len(classes) > 1:
            raise UnfitState(f"'{path}:logits' has numbers of classes that differ: {sorted(classes)}")
        for block, tensor in logits.items():
            shape = (BLOCK, self.lag, *classes)
            check_tensor(f"{path}:logits/{block}", tensor, shape, None)
            check_tensor(f"{path}:visits/{block}", visits[block], (BLOCK,), torch.long)
            if not tensor.is_floating_point() or bool((visits[block] < 0).any()):
                raise UnfitState(f"'{path}:logits/{block}' holds no numbers, or '{path}:visits/{block}' no counts")

    def plan_first_pass(self, landscape: Landscape) -> FirstPass:
        """The term belongs to the first evaluation."""
        return FirstPass(add=lambda outputs, batch: self._term(outputs, batch, landscape))

    def gradient(self, landscape: Landscape) -> Evaluation:
        """The first evaluation, which `plan_first_pass` gave the term."""
        return landscape.evaluate()

    def _term(self, outputs: Any, batch: Any, landscape: Landscape) -> Tensor:
        logits, numbers = logits_of(outputs), landscape.window.sample_index()
        if logits.ndim != 2 or logits.shape[1] > MOST:
            raise ValueError(
                f"SAF keeps the logits of every row, and these have shape {tuple(logits.shape)}: too much for outputs "
                "with a vocabulary. Use MESA, which keeps weights instead."
            )
        classes = {tensor.shape[-1] for tensor in self._state.get("logits", {}).values()} | {logits.shape[1]}
        if len(classes) > 1:
            raise UnfitState(f"SAF keeps logits of {sorted(classes)} classes")
        then, known = self._exchange(numbers, logits.detach().cpu())
        then, known = then.to(logits.device), known.to(logits.device)
        rows = {key: value for key, value in batch.items() if key != "labels"}
        summed = kl_sum({"logits": then[known]}, {"logits": logits[known]}, rows, False, temperature=self.temperature)
        count = window_positions(landscape.window.group[1], shifted=False)
        return self.lam * self.temperature**2 * summed / count.to(summed.device).clamp_min(1)

    def _exchange(self, numbers: list[int], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's logits of `lag` visits ago and whether there are any; the present ones take their place."""
        kept, visits = dict(self._state.get("logits", {})), dict(self._state.get("visits", {}))
        then, known = torch.zeros_like(logits), torch.zeros(len(numbers), dtype=torch.bool)
        for block in {str(number // BLOCK) for number in numbers}:
            fresh = block not in kept
            kept[block] = logits.new_zeros(BLOCK, self.lag, logits.shape[1]) if fresh else kept[block].clone()
            visits[block] = torch.zeros(BLOCK, dtype=torch.long) if fresh else visits[block].clone()
        for row, number in enumerate(numbers):
            block, place = str(number // BLOCK), number % BLOCK
            made = int(visits[block][place])
            known[row] = made >= self.lag
            then[row] = kept[block][place, made % self.lag]
            kept[block][place, made % self.lag] = logits[row]
            visits[block][place] += 1
        self._state.update(logits=kept, visits=visits)
        return then, known


@remembered
def saf(lam: float = 0.3, lag: int = 3, temperature: float = 5.0, interval: int = 1, start: float = 0.0) -> Method:
    """SAF (Du et al., 2022): the loss plus a divergence from each sample's own outputs some visits ago.

    Needs a column `sample_index` in the training data, and more epochs than `lag`.

    Args:
        lam: weight of the divergence; the paper's 0.3.
        lag: how many visits ago; the paper's 2 to 3.
        temperature: divides the logits; the paper's 5.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before; the paper starts after 5 of its many epochs.

    Returns:
        The method, of cost 1; memory: 0 copies, and the stored logits.
    """
    return timed(SAF(lam, lag, temperature), interval, start)
