"""Training as the tests use it: one call that trains a tiny model on rows in their order, and callbacks that watch."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sharp._integrations.trainer import SharpMixin
from models import Rows

ARGUMENTS = {field.name for field in fields(TrainingArguments)}


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "learning_rate": 0.05,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    given = defaults | settings
    if "train_sampling_strategy" not in ARGUMENTS:  # transformers 5.0: see `build`
        given.pop("train_sampling_strategy")
    if "activation_checkpointing" not in ARGUMENTS:  # transformers 5.0 has the name before
        given = {key.replace("activation_ch", "gradient_ch"): value for key, value in given.items()}
    return TrainingArguments(str(folder), **given)


def build(cls: type[Trainer], model: Any, rows: Rows, folder: Any, **settings: Any) -> Trainer:
    """A Trainer; settings that are the Trainer's own are `method`, `optimizers`, `callbacks` and the like."""
    own = {
        "method",
        "rounding",
        "check_repeats",
        "optimizers",
        "callbacks",
        "compute_loss_func",
        "eval_dataset",
        "data_collator",
        "model_init",
    }
    given = {name: settings.pop(name) for name in own & set(settings)}
    if issubclass(cls, SharpMixin):  # one pass more, which tests that count passes do not want
        given.setdefault("check_repeats", False)
    trainer = cls(model=model, args=arguments(folder, **settings), train_dataset=rows, **given)
    in_order = settings.get("train_sampling_strategy", "sequential") == "sequential"
    if in_order and "train_sampling_strategy" not in ARGUMENTS:
        trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(dataset)
    return trainer


def train(cls: type[Trainer], model: Any, rows: Rows, folder: Any, **settings: Any) -> Trainer:
    trainer = build(cls, model, rows, folder, **settings)
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


def exact_logs(trainer: Trainer) -> list[dict[str, Any]]:
    """What a training logged, but for its clock and our own metrics: what two equal trainings share bit by bit."""
    skip = ("runtime", "per_second", "flos", "sharp_")
    return [{k: v for k, v in line.items() if not any(s in k for s in skip)} for line in trainer.state.log_history]


def same_state(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states of a method hold the same under the same names."""
    return mine.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(other[k])) for k in mine
    )


class Recorder(TrainerCallback):
    """Calls a function at the end of every optimizer step, or before it."""

    def __init__(self, end: Callable[..., None] | None = None, before: Callable[..., None] | None = None):
        self.end, self.before = end, before

    def on_step_end(self, args, state, control, **kwargs):
        if self.end:
            self.end(state=state, **kwargs)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.before:
            self.before(state=state, **kwargs)


class Tripwire:
    """A forward pre-hook that counts the model's forward passes and raises at a chosen one."""

    def __init__(self, model: torch.nn.Module, at: int | None = None, error: BaseException | None = None):
        self.count, self.at, self.error = 0, at, error
        self.model = model
        model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1
        if self.count == self.at:
            self.shifted = torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])
            raise self.error
