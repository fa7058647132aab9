"""What is special to Flat-LoRA beside its reference: which noise, where, and when."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_sharp import Constant, Cosine, FlatLoRA, SharpTrainer, flat_lora
from models import causal_rows, mlp_rows, seeded, tiny_llama
from peft_models import frozen, lora_llama, lora_mlp, with_lora
from training import Recorder, build, train

ROWS = causal_rows(40)
METHOD = FlatLoRA(sigma=0.1)


class Looking:
    """The weight of a base layer at each of its forwards."""

    def __init__(self, layer):
        self.base, self.seen, self.streams = layer.get_base_layer(), [], []
        self.before = self.base.weight.detach().clone()
        self.base.register_forward_pre_hook(self.look)

    def look(self, *_):
        self.seen.append(self.base.weight.detach().clone() - self.before)


def wide_model(**settings):
    """A llama whose first linear layer has more entries than are drawn at a time."""
    model = {"dropout": 0.0, "layers": 1, "intermediate_size": 6000, **settings}
    return lora_llama(model=model, target_modules=["gate_proj"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_is_normal_and_in_proportion_to_the_rows_of_the_merged_weight(dtype, tmp_path):
    model = wide_model().to(dtype)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    with torch.no_grad():  # rows of different lengths
        layer.base_layer.weight.mul_(torch.linspace(1, 5, 6000).unsqueeze(1))
    merged = layer.base_layer.weight.detach().double() + layer.get_delta_weight("default").detach().double()
    looking = Looking(layer)
    train(SharpTrainer, model, ROWS, tmp_path, method=METHOD, max_steps=2, gradient_accumulation_steps=2)
    first, second, third, _ = looking.seen
    assert torch.equal(first, second) and not torch.equal(first, third)  # one draw a window
    z = first.double() / (0.1 * merged.norm(dim=1, keepdim=True) / 4)  # 16 inputs
    assert z.numel() == 96_000 and abs(z.mean()) < 0.02 and z.std() == pytest.approx(1, abs=0.02)
    assert (z.std(dim=1) - 1).abs().mean() < 0.2  # 16 draws a row scatter by 0.18
    assert z.pow(4).mean() == pytest.approx(3, abs=0.15)
    columns = torch.corrcoef(z.T) - torch.eye(16)
    assert columns.abs().max() < 0.06


def test_nobody_sees_it_between_the_passes(tmp_path):
    model = lora_llama(model={"dropout": 0.1})
    before, seen = frozen(model), []
    record = Recorder(lambda **_: seen.append(torch.equal(frozen(model), before)))
    record.on_substep_end = lambda *_, **__: seen.append(torch.equal(frozen(model), before))
    settings = {"gradient_accumulation_steps": 3, "max_steps": 2, "callbacks": [record]}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS[:4]}
    train(SharpTrainer, model, ROWS, tmp_path, method=METHOD, **settings)
    assert seen == [True] * 6


def test_the_global_random_stream_is_not_touched(tmp_path):
    ends = []
    for cls, own in ((Trainer, {}), (SharpTrainer, {"method": METHOD})):
        train(cls, lora_llama(model={"dropout": 0.1}), ROWS, tmp_path, **own)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


def test_the_presets_noise_rises_along_half_a_cosine(tmp_path):
    assert flat_lora(0.05) == FlatLoRA(Cosine(0.0, 0.05)) and flat_lora(Constant(0.05)) == FlatLoRA(Constant(0.05))
    model = lora_mlp()
    looking = Looking(model.base_model.model.hidden)
    settings = {"learning_rate": 0.0, "max_steps": 4}
    train(SharpTrainer, model, mlp_rows(40), tmp_path, method=flat_lora(0.2), **settings)
    twin = lora_mlp()
    constant = Looking(twin.base_model.model.hidden)
    train(SharpTrainer, twin, mlp_rows(40), tmp_path, method=flat_lora(Constant(0.2)), **settings)
    shares = [float(a.norm() / b.norm()) for a, b in zip(looking.seen, constant.seen, strict=True)]
    assert shares == pytest.approx([0.0, 0.5 - 0.125**0.5, 0.5, 0.5 + 0.125**0.5], abs=1e-12)


def test_gpt2s_transposed_weights(tmp_path):
    with seeded(0):
        gpt = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model = with_lora(gpt, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        layer.base_layer.weight.mul_(torch.linspace(1, 50, 48))  # (inputs, outputs): long columns
    merged = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    looking = Looking(layer)
    train(SharpTrainer, model, ROWS, tmp_path, method=METHOD, max_steps=4)
    assert all(noise.shape == (16, 48) for noise in looking.seen)
    z = looking.seen[0] / (0.1 * merged.norm(dim=0) / 4)
    assert z.std() == pytest.approx(1, abs=0.1)
    assert z[:, :24].std() == pytest.approx(1, abs=0.15) and z[:, 24:].std() == pytest.approx(1, abs=0.15)


def test_tied_weights_get_one_noise(tmp_path):
    bare = tiny_llama()
    bare.model.layers[1].self_attn.q_proj.weight = bare.model.layers[0].self_attn.q_proj.weight
    model = with_lora(bare, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    before = frozen(model)
    trainer = build(SharpTrainer, model, ROWS, tmp_path, method=METHOD, max_steps=1)
    assert "noise on 3 frozen base weights" in trainer.describe_method()
    trainer.train()
    assert torch.equal(frozen(model), before)


def test_quantised_weights_are_refused_by_name(tmp_path):
    model = lora_llama()
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.default' \(Linear\) are quantised.*use bi_lora"):
        build(SharpTrainer, model, ROWS, tmp_path, method=METHOD)


def test_bad_settings_are_refused():
    for sigma in (-0.1, float("inf"), "a"):
        with pytest.raises(ValueError, match="radius"):
            FlatLoRA(sigma)
