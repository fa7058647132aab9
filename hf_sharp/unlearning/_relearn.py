"""The relearning attack: fine-tune an unlearned model on a few rows, and watch what it was to forget come back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hf_sharp.unlearning._encoding import Example, pad
from hf_sharp.unlearning._evaluation.likelihood import score, summary

Measure = Callable[[nn.Module], Mapping[str, float]]


def relearn(
    model: nn.Module,
    forget_samples: Sequence[Example],
    steps: int,
    lr: float,
    *,
    batch_size: int | None = 4,
    measure: Measure | Mapping[str, Sequence[Example]] | None = None,
    measure_at: Collection[int] | None = None,
    seed: int = 0,
    weight_decay: float = 0.0,
    trains: str = "all",
) -> list[dict[str, float]]:
    """Attack by relearning: fine-tune a copy on samples, measuring on the way (Fan et al., 2025, section 3).

    The copy learns by AdamW with a constant learning rate on the mean cross-entropy of the samples' labels, dropout as
    in training, batches in a random order that begins anew when all samples were seen. Fan et al. take 20, 40 or 60
    rows in batches of 4, once. Other rows of what was forgotten attack too, and rows that have nothing to do with it:
    ``forget_samples`` are whatever examples you give.

    The model is not changed in a bit; mode, gradients and the random streams neither. The copy is one of everything,
    under PEFT of the base model too. 16-bit weights are attacked in float32, since otherwise small steps round away
    and the model looks more robust than it is. Memory: four times the copy's trained weights, in float32.

    Args:
        model: a causal language model, not wrapped for several devices.
        forget_samples: examples of `Encoder`, with ``input_ids`` and ``labels``.
        steps: number of optimizer steps.
        lr: learning rate.
        batch_size: samples a step; None takes all.
        measure: what is recorded: a function of the model in evaluation mode, or sets of examples by name, or None for
            the samples themselves. Of sets, `summary` is recorded: ``<name>_probability`` and so on.
        measure_at: the steps after which to measure, 0 being before the attack; None measures after each.
        seed: of the order and of dropout.
        weight_decay: of AdamW.
        trains: "all" weights, as whoever has them could, or only those "trainable" in the model, such as adapters.

    Returns:
        One record a measurement: ``step`` and what was measured, in the order of the steps.

    Raises:
        ValueError: if the settings make no attack, or the loss is no longer finite.
    """
    _check(model, forget_samples, steps, lr, batch_size, trains)
    recorded = _measure(measure, forget_samples)
    times = set(range(steps + 1) if measure_at is None else measure_at)
    if not times or not times <= set(range(steps + 1)):
        raise ValueError(f"measure_at has steps from 0 to {steps}; got {sorted(times)}.")
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        attacked, weights = _copy(model, trains)
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
        curve = [{"step": 0, **recorded(attacked)}] if 0 in times else []
        batches = _batches(forget_samples, batch_size or len(forget_samples), seed)
        for step in range(1, max(times) + 1):
            batch = {key: value.to(device) for key, value in next(batches).items()}
            loss = attacked.train()(**batch).loss
            _check_loss(loss.detach(), step, lr)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in times:
                curve.append({"step": step, **recorded(attacked)})
    return curve


def _check(
    model: nn.Module, samples: Sequence[Example], steps: int, lr: float, batch_size: int | None, trains: str
) -> None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(f"relearn copies the model itself, not {type(model).__name__} around it: give model.module.")
    if not samples:
        raise ValueError("An attack needs samples.")
    if steps < 0 or (batch_size is not None and batch_size < 1) or not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"No attack is made of steps={steps}, lr={lr}, batch_size={batch_size}.")
    if trains not in ("all", "trainable"):
        raise ValueError(f"trains is all or trainable; got {trains!r}.")
    fixed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if fixed and trains == "all":
        raise ValueError(
            f"{fixed[0]} is quantized and cannot be trained. Load the model in 16 or 32 bits, or attack what can be "
            "trained with trains='trainable'."
        )
    if trains == "trainable" and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing in the model is trainable, so trains='trainable' attacks nothing.")


def _check_loss(loss: Tensor, step: int, lr: float) -> None:
    if not torch.isfinite(loss):
        raise ValueError(f"The loss of the relearning attack is {float(loss)} at step {step}; lr={lr} is too large.")


def _copy(model: nn.Module, trains: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy that shares nothing with the model, and the parameters of it that are attacked."""
    attacked = copy.deepcopy(model)
    attacked.zero_grad(set_to_none=True)
    if all(p.is_floating_point() and p.dtype != torch.float64 for p in attacked.parameters()):
        attacked = attacked.float()
    if trains == "all":
        attacked.requires_grad_(True)
    return attacked, [p for p in attacked.parameters() if p.requires_grad]


def _batches(samples: Sequence[Example], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end; the last of a pass over the samples may be smaller."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(samples), generator=draw).tolist()
        for start in range(0, len(order), size):
            yield pad([samples[i] for i in order[start : start + size]], 0)


def _measure(measure: Measure | Mapping[str, Sequence[Example]] | None, samples: Sequence[Example]) -> Measure:
    """What is recorded, as a function of the model in evaluation mode."""
    if isinstance(measure, Mapping):
        sets = {f"{name}_": examples for name, examples in measure.items()}
    elif measure is None:
        sets = {"": samples}
    else:

        def by_function(model: nn.Module) -> Mapping[str, float]:
            with torch.no_grad():
                return measure(model.eval())

        return by_function

    def by_sets(model: nn.Module) -> Mapping[str, float]:
        found = {prefix: summary(score(model, examples)) for prefix, examples in sets.items()}
        return {f"{prefix}{key}": value for prefix, numbers in found.items() for key, value in numbers.items()}

    return by_sets
