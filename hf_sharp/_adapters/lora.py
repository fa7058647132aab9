"""The LoRA layers of a PEFT model, W' = W + s B A, and the refusal of those to which a method does not apply."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_sharp._engine.landscape import Landscape


class LoraLinear(NamedTuple):
    """A linear layer with a trainable LoRA adapter.

    Attributes:
        name: of the adapter in this layer: the layer's in the model, and the adapter's.
        layer: PEFT's layer.
        down: the module of A, with a weight of (rank, inputs).
        up: the module of B, with a weight of (outputs, rank).
        scaling: s.
    """

    name: str
    layer: Any
    down: nn.Linear
    up: nn.Linear
    scaling: float


def lora_linears(model: nn.Module, who: str) -> list[LoraLinear]:
    """The linear layers of a model that have an active adapter which is trained.

    Args:
        model: a PEFT model.
        who: the method, for its errors.

    Returns:
        One entry a layer, for the first such adapter.

    Raises:
        ValueError: if there is none, or an adapter is of another kind.
    """
    found = []
    for name, layer in _lora_layers(model):
        for adapter in layer.active_adapters:
            adapted = {**layer.lora_A, **layer.lora_embedding_A}
            if adapter not in adapted or not all(p.requires_grad for p in _parameters(adapted[adapter])):
                continue
            _refuse_kind(name, layer, adapter, who)
            pair = (layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter])
            found.append(LoraLinear(f"{name}.{adapter}", layer, *pair))
            break
    if not found:
        raise ValueError(
            f"{who} is for LoRA adapters, and this model has none that is active and trained: wrap it with "
            "get_peft_model(model, LoraConfig(...)) of PEFT, or use sam."
        )
    return found


def refuse_shards(landscape: Landscape, who: str) -> None:
    """Refuse a model whose parameters are spread over ranks.

    Args:
        landscape: the model's.
        who: the method, for the error.

    Raises:
        ValueError: under FSDP.
    """
    if landscape.facts.sharded:
        raise ValueError(f"{who} does not work with sharded parameters (FSDP). Use DDP, or bar or sam, which do.")


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if find_spec("peft") is None:
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _parameters(pair_half: Any) -> list[Tensor]:
    return list(pair_half.parameters()) if isinstance(pair_half, nn.Module) else [pair_half]


def _refuse_kind(name: str, layer: Any, adapter: str, who: str) -> None:
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    base, reason = layer.get_base_layer(), None
    linear = adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)
    if isinstance(layer, MultiheadAttention | ParamWrapper) or not (linear or isinstance(base, nn.Linear)):
        reason = f"is a {type(base).__name__}. Choose target_modules among the linear layers"
    elif not linear:
        reason = f"has an adapter of another kind ({type(layer).__name__}). Use plain LoRA"
    elif adapter in layer.lora_variant:
        reason = f"has a variant of LoRA ({type(layer.lora_variant[adapter]).__name__}). Use plain LoRA"
    if reason is not None:
        raise ValueError(f"{who} is defined for plain LoRA on linear layers, and '{name}' {reason}, or use sam.")
