"""Hosts in which a further backward pass cannot be right, refused by name before training."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.utils import is_sagemaker_mp_enabled

from hf_sharp._engine.landscape import Landscape
from hf_sharp._methods.base import Method
from hf_sharp._perturbation.part import Part
from hf_sharp._tensors.shards import sharded

FLAT = "FSDP version 1 keeps its weights in flat parameters. Use FSDP2: fsdp_version: 2 in the accelerate config"
# Trainers, and all classes made from them, that write their own data while they train (TRL 1.0 to 1.16).
GENERATING = (
    *("GRPOTrainer", "RLOOTrainer", "PPOTrainer", "OnlineDPOTrainer", "NashMDTrainer", "XPOTrainer"),
    *("DistillationTrainer", "GKDTrainer", "GOLDTrainer", "MiniLLMTrainer", "SDFTTrainer", "SDPOTrainer"),
    *("A2POTrainer", "AsyncGRPOTrainer", "AsyncDistillationTrainer", "IWOPDTrainer"),
)
# Trainers whose micro-batch is all chosen rows and then all rejected ones, so that its first rows are no part of it.
STACKED = ("DPOTrainer", "RewardTrainer", "TPOTrainer")


def refuse_class(trainer: type[Trainer]) -> None:
    """Refuse, by name, the Trainer classes that write their own data while they train.

    Args:
        trainer: the class.

    Raises:
        ValueError: naming the class and the way out.
    """
    names = _named(trainer, GENERATING)
    if names:
        raise ValueError(
            f"{', '.join(names)} generates its data between steps and cannot repeat a pass over it: the policy that "
            "wrote the answers is not the one at shifted weights. Train offline, with SFT, DPO or reward modelling."
        )


def refuse_part(trainer: Trainer) -> None:
    """Refuse a part of a micro-batch where its rows belong together.

    Args:
        trainer: the Trainer.

    Raises:
        ValueError: naming the class and the way out.
    """
    names = _named(type(trainer), STACKED)
    if names:
        raise ValueError(
            f"A micro-batch of {', '.join(names)} holds chosen and rejected rows that belong together, so no part of "
            "it can be taken. Set gradient_accumulation_steps and use whole micro-batches (fraction=), or a method "
            "that takes no part."
        )


def _named(cls: type, names: Collection[str]) -> list[str]:
    return [base.__name__ for base in cls.__mro__ if base.__name__ in names]


def refuse(trainer: Trainer, method: Method) -> None:
    """Refuse, by name, the hosts in which a second backward pass cannot be right.

    Args:
        trainer: the Trainer.
        method: the method it was given.

    Raises:
        ValueError: naming what stands in the way and the way out.
    """
    args, plugin = trainer.args, getattr(trainer.accelerator, "parallelism_config", None)
    given = (
        type(trainer.optimizer).__name__ if trainer.optimizer is not None else getattr(args.optim, "value", args.optim)
    )
    optimizer, kind = str(given).lower(), trainer.accelerator.distributed_type
    refuse_class(type(trainer))
    reasons = {
        "DeepSpeed makes its optimizer step inside the first backward pass. Use DDP": trainer.is_deepspeed_enabled,
        "SageMaker model parallelism runs forward and backward as one. Use DDP": is_sagemaker_mp_enabled(),
        "on XLA gradients are reduced inside the optimizer step. Train on GPUs or CPUs": kind == DistributedType.XLA,
        FLAT: trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2,
        "the model was sharded when it was loaded. Let FSDP2 shard it, by an accelerate config": any(
            sharded(p) for p in trainer.model.parameters()
        )
        if trainer.model is not None
        else False,
        "context or sequence parallelism shards the window's tensors in place. Train without it": any(
            getattr(plugin, name, False) for name in ("cp_enabled", "sp_enabled")
        ),
        "tensor parallelism is not supported yet. Use DDP": bool(getattr(plugin, "tp_enabled", False)),
        f"the optimizer '{optimizer}' steps inside the backward pass. Use adamw_torch": "lomo" in optimizer
        or "layerwise" in optimizer,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{type(method).__name__} needs further passes over the same window, but {reason}.")
    handler = trainer.accelerator.ddp_handler
    refuse_static_graph(
        method,
        trainer.accelerator.num_processes > 1
        and bool(getattr(args, "ddp_static_graph", False) or getattr(handler, "static_graph", False)),
    )
    if args.n_gpu > 1 and any("parameters" in part.needs for _, part in method.named_parts()):
        raise ValueError(
            f"{type(method).__name__} has parameters of its own, which DataParallel's replicas of the model would not "
            "find. Launch one process a GPU: torchrun or accelerate launch."
        )


def refuse_accelerator(accelerator: Accelerator, method: Method) -> None:
    """Refuse, by name, the ways to distribute a loop in which a second backward pass cannot be right.

    Args:
        accelerator: the loop's.
        method: the method.

    Raises:
        ValueError: naming what stands in the way and the way out.
    """
    kind = accelerator.distributed_type
    reasons = {
        DistributedType.DEEPSPEED: "DeepSpeed makes its optimizer step inside the first backward pass",
        DistributedType.MEGATRON_LM: "Megatron-LM runs forward and backward as one",
        DistributedType.XLA: "on XLA gradients are reduced inside the optimizer step",
    }
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(f"{type(method).__name__} needs further passes over the same window, but {FLAT}.")
    if kind in reasons:
        raise ValueError(
            f"{type(method).__name__} needs further passes over the same window, but {reasons[kind]}. Use DDP."
        )


def check_method(method: Method, landscape: Landscape, way_out: str) -> None:
    """Refuse, before training, a model that a method cannot be right for; every integration asks this.

    Args:
        method: the method.
        landscape: the model's landscape, without data.
        way_out: what to do where there is no trainable parameter.

    Raises:
        ValueError: naming what stands in the way and the way out.
    """
    if not landscape.facts.names:
        raise ValueError(f"There is no trainable parameter, so there is nothing to perturb. {way_out}")
    refuse_complex(landscape.facts.parameters)
    for _, part in method.named_parts():
        part.check(landscape)


def refuse_complex(parameters: Mapping[str, Tensor]) -> None:
    """Refuse trainable complex parameters: products of vectors would need a conjugate, balls and masks an order.

    Args:
        parameters: the trainables by name.

    Raises:
        ValueError: naming the first complex one and the way out.
    """
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise ValueError(
                f"The trainable parameter '{name}' is complex ({parameter.dtype}), for which the methods are not "
                "defined. Keep its real and imaginary parts in a real parameter (torch.view_as_real) and make it "
                "complex in the forward (torch.view_as_complex), or freeze it."
            )


def refuse_line_search(optimizer: Any) -> None:
    """Refuse an optimizer that makes passes of its own, such as LBFGS: it cannot step on a gradient that it is given.

    Args:
        optimizer: a torch optimizer.

    Raises:
        ValueError: naming it and the way out.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(optimizer).__name__} calls the closure itself, several times a step, and so cannot step on a "
            "method's gradient. Use an optimizer that steps on the gradient it finds, such as SGD or AdamW."
        )


def refuse_static_graph(method: Method, static: bool) -> None:
    """Refuse passes that DDP does not reduce where it was told that all its passes are alike.

    Args:
        method: the method.
        static: whether DDP has `static_graph=True`.

    Raises:
        ValueError: naming the part and the way out.
    """
    for _, part in method.named_parts():
        if static and part.apart:
            raise ValueError(
                f"{type(part).__name__} with per_rank=True or fraction= makes passes whose gradients DDP does not "
                "reduce, which it cannot do with static_graph=True (an INTERNAL ASSERT of torch). Leave static_graph "
                "(ddp_static_graph of TrainingArguments) out, or per_rank and fraction."
            )


WANTED = {
    "names": "the parameters' names",
    "modules": "the model's modules",
    "outputs": "the model's outputs",
    "rows": "the rows of the batch",
    "window": "all micro-batches of the window before the first is passed through",
    "terms": "a loss of named terms",
    "index": "the numbers of the rows",
    "parameters": "a place in the optimizer for parameters of its own",
    "update": "calls right before and after the optimizer's update",
    "length": "the number of training steps",
    "warmup": "the length of the learning rate's warm-up",
    "ranks": "gradients before they are reduced over ranks",
}
WAYS_OUT = {  # of needs that do not hang on how an integration meets the data
    "length": "Give it as total_steps= of SharpStep or steps= of the schedule, or use SharpTrainer",
    "warmup": "Give it as warmup_steps= of SharpStep or steps= of ZeroDuringWarmup, or use SharpTrainer",
    "ranks": "Use SharpTrainer, SharpStep or per_rank=False",
    "parameters": "A closure cannot average their gradients over processes: use SharpTrainer or SharpStep",
}


def refuse_needs(method: Method, provided: Collection[str], way_out: str) -> None:
    """Refuse a method that needs what an integration cannot give.

    Args:
        method: the method.
        provided: what the integration can give, keys of `WANTED`.
        way_out: why, and what to do about a need that has no way out of its own.

    Raises:
        ValueError: naming the part, or the schedule among its settings, and what it needs.
    """
    for _, part in method.named_parts():
        for owner, needs in ((part, part.needs), *_needs_of_schedules(part)):
            missing = sorted(need for need in needs if need not in provided)
            if missing:
                said = dict.fromkeys(WAYS_OUT.get(need, way_out) for need in missing)
                wanted = " and ".join(WANTED[need] for need in missing)
                raise ValueError(f"{type(owner).__name__} needs {wanted}. {'. '.join(said)}.")


def _needs_of_schedules(part: Part) -> Iterator[tuple[Any, Collection[str]]]:
    """The schedules among a part's settings, each with its needs."""
    for setting in fields(part):
        value = getattr(part, setting.name)
        if callable(value) and not isinstance(value, Part):
            yield value, getattr(value, "needs", ())
