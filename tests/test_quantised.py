"""Adapters on 8-bit and 4-bit base weights of bitsandbytes, where it is installed (it runs on CPUs too)."""

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_sharp import SharpTrainer, bar, bi_lora, flat_lora, sam
from models import batch_of, causal_rows, tiny_llama
from peft_models import added, peft, trainables, with_lora
from training import build, train

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
BITS = {"4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8 bits": {"load_in_8bit": True}}
ROWS = causal_rows(40)
KINDS = {"4 bits": "Linear4bit", "8 bits": "Linear8bitLt"}


@pytest.fixture(params=BITS)
def quantised(request, tmp_path):
    """A function that makes the same small model with quantised linear layers and LoRA on them."""
    tiny_llama(dropout=0.0, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def make():
        config = BitsAndBytesConfig(**BITS[request.param])
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = with_lora(model, start=False, target_modules="all-linear", task_type="CAUSAL_LM")
        assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == KINDS[request.param]
        return model

    return make


def everything_else(model):
    """All frozen tensors and buffers bit by bit, quantisation states too."""
    tensors = [p.detach() for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    tensors += [t for n, t in model.state_dict().items() if "quant" in n or "absmax" in n or "SCB" in n]
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("method", [sam(0.05), bi_lora(1.0), bar()], ids=["sam", "bi_lora", "bar"])
def test_adapters_train_and_the_base_stays(method, quantised, tmp_path):
    ends = []
    for chosen in (None, method):
        model = quantised()
        before, started = everything_else(model), trainables(model)
        trainer = train(SharpTrainer, model, ROWS, tmp_path / "run", method=chosen, learning_rate=1e-2)
        after = everything_else(model)
        assert len(before) > 20 and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        ends.append(trainables(model))
        assert torch.isfinite(ends[-1]).all() and not torch.equal(ends[-1], started)
    assert not torch.equal(*ends)
    if method == bi_lora(1.0):
        assert added(trainer).norm() > 0.1


def test_the_auxiliary_is_in_the_passes_and_gone_outside(quantised, tmp_path):
    model, batch = quantised(), batch_of(ROWS[:4])
    trainer = train(SharpTrainer, model, ROWS, tmp_path / "run", method=bi_lora(5.0), learning_rate=5e-2)
    seen = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    plain = quantised()
    other = train(SharpTrainer, plain, ROWS, tmp_path / "run", method=None, learning_rate=5e-2)
    assert seen[0] == other.state.log_history[0]["loss"] and seen[1] != other.state.log_history[1]["loss"]
    twin = quantised()
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" in n}, strict=False)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, twin.eval()(**batch).logits)


def test_flat_lora_is_refused_by_name(quantised, tmp_path):
    with pytest.raises(ValueError, match=r"\((Linear4bit|Linear8bitLt)\) are quantised.*use bi_lora"):
        build(SharpTrainer, quantised(), ROWS, tmp_path / "run", method=flat_lora())
