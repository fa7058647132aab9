"""What a step with adapters keeps alive beyond plain LoRA, in copies of the adapters."""

import pytest

from hf_sharp import Constant, bar, bi_lora, flat_lora, sam
from memory import peak_bytes
from models import causal_rows
from peft_models import lora_llama

SIZES = {"dropout": 0.0, "hidden_size": 64, "intermediate_size": 256, "layers": 3}


def measured(folder, method, tokens):
    """Peak bytes of steps 2 to 4, and the bytes of the adapters and of the frozen weights under them."""
    model = lora_llama(start=False, model=SIZES, r=16)
    peak = peak_bytes(model, method, causal_rows(8, tokens=tokens), folder)
    size = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    under = sum(4 * p.numel() for n, p in model.named_parameters() if "base_layer" in n)
    return peak, size, under


@pytest.mark.parametrize("tokens", [8, 32])
def test_the_peak_beyond_plain_lora(tokens, tmp_path):
    plain, size, under = measured(tmp_path, None, tokens)
    beyond = {
        name: (measured(tmp_path, method, tokens)[0] - plain) / size
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
