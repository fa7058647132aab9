"""What a step with adapters keeps alive beyond plain LoRA, in copies of the adapters."""

import gc

import pytest
from transformers import Trainer

from doors import build
from hf_sharp import Constant, SharpTrainer, bar, bi_lora, flat_lora, sam
from hf_sharp.recipes.report import LiveTensors
from models import causal_rows
from peft_models import lora_llama
from test_memory import Watch

SIZES = {"dropout": 0.0, "hidden_size": 64, "intermediate_size": 256, "layers": 3}


def peak(folder, method, tokens):
    """Peak bytes of steps 2 to 4, and the bytes of the adapters and of the frozen weights under them."""
    gc.collect()
    model, live = lora_llama(start=False, model=SIZES, r=16), LiveTensors()
    cls, own = (Trainer, {}) if method is None else (SharpTrainer, {"method": method})
    settings = {"per_device_train_batch_size": 1, "max_steps": 4, "logging_steps": 100, "optim": "adamw_torch_fused"}
    trainer = build(cls, model, causal_rows(8, tokens=tokens), folder, callbacks=[Watch(live)], **settings, **own)
    with live:
        for parameter in model.parameters():
            live.track(parameter)
        trainer.train()
    size = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    under = sum(4 * p.numel() for n, p in model.named_parameters() if "base_layer" in n)
    return live.peak, size, under


@pytest.mark.parametrize("tokens", [8, 32])
def test_the_peak_beyond_plain_lora(tokens, tmp_path):
    plain, size, under = peak(tmp_path, None, tokens)
    beyond = {
        name: (peak(tmp_path, method, tokens)[0] - plain) / size
        for name, method in {
            "sam": sam(0.01),
            "bi_lora": bi_lora(rank=16),  # as large as the adapter: itself, its gradient and two moments
            "bar": bar(),
            "flat_lora": flat_lora(Constant(0.05)),  # a copy of the weights under the adapters
        }.items()
    }
    assert beyond["sam"] == pytest.approx(1, abs=0.02)
    assert 2.9 < beyond["bi_lora"] < 4.2
    assert beyond["bar"] < 0.01
    assert beyond["flat_lora"] < under / size + 0.1
