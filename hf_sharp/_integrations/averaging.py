"""`WeightAveraging`: the mean of the weights along training, evaluated and saved in place of the last ones.

    equal:        a_n = a_{n-1} + (w_n - a_{n-1}) / n                (SWA; Izmailov et al., 2018)
    exponential:  a_n = decay a_{n-1} + (1 - decay) w_n,  a_1 = w_1

w_n are the weights after every `every`-th optimizer step from `start` on. In the unlearning of Fan et al. (ICML 2025)
it is the smoothing that costs no pass: their code takes the equal mean from step 100 of 125, every 5 steps, in bf16
and of all tensors; here it is in float32 or better and of the trainable parameters, the others being the same. Buffers
are left as they are. Memory: one such copy of the trainables; while the mean stands in the model, one of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_sharp._checks import check_count
from hf_sharp._tensors.shards import gathered, placed
from hf_sharp._tensors.vector import wide

FILE_NAME = "weight_average.safetensors"


class WeightAveraging(TrainerCallback):
    """Keeps a mean of the weights, for any Trainer; give it last among the callbacks.

    The mean stands in the model whenever the Trainer evaluates or saves in training, and when training has ended; the
    next step goes on from the weights themselves. A checkpoint's model is the mean, and the weights lie beside it in
    `weight_average.safetensors`, from which a resumed run takes both.

    Args:
        start: the first step whose weights count: a number of steps, or a share of training below 1.
        every: how many steps lie between those that count.
        decay: how much of the old mean a step keeps; None for the equal mean.

    Raises:
        ValueError: if a setting cannot be right.

    Example:
        >>> WeightAveraging(start=100, every=5)
        WeightAveraging(start=100, every=5, decay=None)
    """

    def __init__(self, start: float = 0.8, every: int = 5, decay: float | None = None) -> None:
        whole, share = isinstance(start, int) and start >= 0, isinstance(start, float) and 0 <= start < 1
        if isinstance(start, bool) or not (whole or share):
            raise ValueError(f"start is a number of steps, or a share of training in [0, 1); got {start!r}.")
        check_count(every, "every")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay is a share in (0, 1), or None for the equal mean; got {decay!r}.")
        self.start, self.every, self.decay = start, every, decay
        self.count = 0
        self._mean: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # while the mean stands in the model

    def __repr__(self) -> str:
        return f"WeightAveraging(start={self.start}, every={self.every}, decay={self.decay})"

    # --- the Trainer's events ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start afresh, or where the checkpoint was."""
        self.count, self._mean, self._weights = 0, {}, {}
        first = self._first(state)
        if state.is_hyper_param_search:
            raise ValueError(f"{self!r} has no place in a hyperparameter search: average in the runs that follow it.")
        if first >= state.max_steps:
            raise ValueError(f"{self!r} begins at step {first}, and training ends with step {state.max_steps}.")
        if state.global_step >= first and state.global_step > 0:
            self._read(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE_NAME, kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the weights themselves."""
        self._leave(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's weights into the mean; let it be evaluated and saved."""
        self._leave(kwargs["model"])
        first = self._first(state)
        if state.global_step >= first and (state.global_step - first) % self.every == 0:
            self._take(kwargs["model"])
        if control.should_evaluate or control.should_save:
            self._enter(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the mean be evaluated and saved."""
        if control.should_evaluate or control.should_save:
            self._enter(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the mean and the weights beside the checkpoint."""
        if self.count:
            tensors = self._gathered(kwargs["model"])
            if args.should_save:
                path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE_NAME
                half = path.with_suffix(".half")  # so that a file of this name is a whole one
                save_file(tensors, half, metadata={"format": "pt", "count": str(self.count)})
                half.replace(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the mean in the model, unless the best checkpoint, which is one too, was put there."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._enter(kwargs["model"])
        self._weights = {}

    # --- the mean ----------------------------------------------------------------------------------------------------

    def _first(self, state: Any) -> int:
        steps = round(self.start * state.max_steps) if isinstance(self.start, float) else self.start
        return max(steps, 1)  # the weights before the first step are not the result of any

    @torch.no_grad()
    def _take(self, model: nn.Module) -> None:
        self.count += 1
        if self.count == 1:
            self._mean = {name: wide(p.detach()).clone() for name, p in _trainables(model)}
            return
        share = 1 / self.count if self.decay is None else 1 - self.decay
        for name, parameter in _trainables(model):
            self._mean[name].lerp_(wide(parameter.detach()), share)

    @torch.no_grad()
    def _enter(self, model: nn.Module) -> None:
        if not self.count or self._weights:
            return
        self._weights = {name: p.detach().clone() for name, p in _trainables(model)}
        for name, parameter in _trainables(model):
            parameter.copy_(self._mean[name])

    @torch.no_grad()
    def _leave(self, model: nn.Module) -> None:
        if self._weights:
            for name, parameter in _trainables(model):
                parameter.copy_(self._weights[name])
            self._weights = {}

    # --- what is written and read ------------------------------------------------------------------------------------

    def _gathered(self, model: nn.Module) -> dict[str, Tensor]:
        weights = self._weights or {name: p.detach() for name, p in _trainables(model)}
        tensors = {f"mean/{name}": tensor for name, tensor in self._mean.items()}
        tensors |= {f"weights/{name}": tensor for name, tensor in weights.items()}
        return {name: tensor.contiguous() for name, tensor in gathered(tensors).items()}

    @torch.no_grad()
    def _read(self, path: Path, model: nn.Module) -> None:
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: this run resumes after {self!r} began, and a checkpoint's model is the mean and "
                "not the weights to go on from. Resume from a checkpoint in output_dir that was saved with it."
            )
        with safe_open(path, framework="pt") as file:
            self.count = int(file.metadata()["count"])
            for name, parameter in _trainables(model):
                self._mean[name] = placed(file.get_tensor(f"mean/{name}"), parameter).clone()  # no window on the file
                parameter.copy_(placed(file.get_tensor(f"weights/{name}"), parameter))


def _trainables(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
