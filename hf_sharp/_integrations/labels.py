"""Whether a model's labels are shifted against its logits, as those of causal language models are."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LOSSES = ("ForCausalLM", "ForConditionalGeneration")


def shifts_labels(model: Any) -> bool:
    """Whether the label of a position is that of the next one.

    Args:
        model: the unwrapped model; adapters may stand around it.

    Returns:
        True for decoder-only language models, by their loss or, where they do not name it, by their class.
    """
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "get_base_model", None)
        if not callable(inner):
            return False
        model = inner()
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    names = {cls.__name__ for cls in type(model).__mro__}  # FSDP2 makes a class of its own from the model's
    return model.loss_type in LOSSES or not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
