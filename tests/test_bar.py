"""What is special to BAR beside its reference."""

import pytest
import torch

from hf_sharp import BAR, Linear, SharpTrainer, bar
from models import causal_rows, mlp_rows, tiny_llama
from peft_models import lora_llama, lora_mlp, peft, trainables, with_lora
from training import build, train


def imbalance(model):
    """| ||B||^2 - ||A||^2 |, summed over the pairs."""
    named = dict(model.named_parameters())
    ups = [name for name in named if ".lora_B." in name]
    gaps = [named[up].square().sum() - named[up.replace("lora_B", "lora_A")].square().sum() for up in ups]
    return float(torch.stack(gaps).abs().sum().detach())


def test_obar_balances_the_weights(tmp_path):
    ends = []
    for mu in (0.0, 2.0):
        model = lora_llama(start=False)
        train(SharpTrainer, model, causal_rows(40), tmp_path, method=BAR(mu, kind="o"), max_steps=10)
        ends.append(imbalance(model))
    assert ends[1] < 0.7 * ends[0]


def test_the_strength_is_that_of_the_step_times_the_learning_rate(tmp_path):
    """The loss has no gradient, so that only the balancing moves the weights."""

    def nothing(outputs, labels, num_items_in_batch=None):
        return 0.0 * outputs["logits"].sum()

    model = lora_mlp()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    settings = {"compute_loss_func": nothing, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    train(SharpTrainer, model, mlp_rows(8), tmp_path, method=bar(Linear(1.0, 0.0, steps=4), "o"), **settings)
    named = dict(model.named_parameters())
    for up in [n for n in before if "lora_B" in n]:
        x, y = before[up], before[up.replace("lora_B", "lora_A")]
        for k in (1.0 * 0.1, 0.75 * 0.05):  # the learning rate falls to a half
            way = -k if x.norm() >= y.norm() else k
            x, y = x * (1 + way), y * (1 - way)
        torch.testing.assert_close(named[up].detach(), x, rtol=1e-12, atol=0)
        torch.testing.assert_close(named[up.replace("lora_B", "lora_A")].detach(), y, rtol=1e-12, atol=0)


def test_adapters_of_embeddings_and_convolutions_are_pairs_too(tmp_path):
    model = with_lora(tiny_llama(), target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    trainer = build(SharpTrainer, model, causal_rows(8), tmp_path, method=bar())
    assert "balances 3 adapters before each update" in trainer.describe_method()
    before = trainables(model)
    train(SharpTrainer, model, causal_rows(8), tmp_path, method=bar(), max_steps=1)
    assert not torch.equal(before, trainables(model))


def test_a_pair_that_the_loss_does_not_use_is_left_alone(tmp_path):
    model = lora_mlp(model={"unused": True})
    spare = peft.LoraConfig(r=2, target_modules=["spare"])
    model.add_adapter("second", spare)
    model.base_model.set_adapter(["default", "second"])
    unused = [p.detach().clone() for n, p in model.named_parameters() if ".second." in n]
    train(SharpTrainer, model, mlp_rows(40), tmp_path, method=BAR(mu=5.0, kind="o"))
    now = [p.detach() for n, p in model.named_parameters() if ".second." in n]
    assert len(now) == 2 and all(torch.equal(a, b.to(a.dtype)) for a, b in zip(now, unused, strict=True))


def test_16_bit_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"torch.bfloat16 rounds to 1. Keep the adapters in float32"):
        build(SharpTrainer, lora_llama().to(torch.bfloat16), causal_rows(8), tmp_path, method=bar())


def test_bad_settings_are_refused():
    for settings, message in (({"kind": "m"}, "nBAR"), ({"mu": -1.0}, "mu is"), ({"mu": True}, "mu is")):
        with pytest.raises(ValueError, match=message):
            bar(**settings)
