"""Tiny models with adapters, and one setting for each method made for them: the twin of `models` and `cases`."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sharp import BAR, BiLoRA, Constant, FlatLoRA, Linear
from models import seeded, tiny_llama, tiny_mlp

peft = pytest.importorskip("peft")
RANK, SCALING = 2, 2.0
METHODS = {  # made with a strength; 0 is plain training
    "bi_lora": lambda strength=1.0: BiLoRA(rho=0.05 * strength, rank=3),
    "nbar": lambda strength=1.0: BAR(mu=2.0 * strength, kind="n"),
    "obar": lambda strength=1.0: BAR(mu=Linear(3.0 * strength, 1.0 * strength), kind="o"),
    "flat_lora": lambda strength=1.0: FlatLoRA(sigma=Constant(0.2 * strength)),
}


def with_lora(model: Any, seed: int = 5, start: bool = True, **settings: Any) -> Any:
    """A model with LoRA of rank 2 and scaling 2; B is drawn too unless `start` is False, so that all of it matters."""
    options = {"r": RANK, "lora_alpha": RANK * SCALING, **settings}
    dtype = next(model.parameters()).dtype
    with seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).to(dtype)
        if start:
            for name, parameter in adapted.named_parameters():
                if ".lora_B." in name:
                    torch.nn.init.normal_(parameter, std=0.2)
    return adapted


def lora_mlp(start: bool = True, model: dict[str, Any] | None = None, **settings: Any) -> Any:
    """TinyMLP with LoRA on its two linear layers, float64."""
    return with_lora(tiny_mlp(**(model or {})), start=start, target_modules=["hidden", "head"], **settings)


def lora_llama(start: bool = True, model: dict[str, Any] | None = None, **settings: Any) -> Any:
    """tiny_llama with LoRA on all linear layers but the head, float32."""
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return with_lora(tiny_llama(**(model or {})), start=start, **options)


def trainables(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def added(trainer: Any) -> Tensor:
    """The method's own parameters, laid end to end."""
    return torch.cat([torch.empty(0), *(p.detach().reshape(-1) for p in trainer._sharp_host.added.values())])


def frozen(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if not p.requires_grad])
