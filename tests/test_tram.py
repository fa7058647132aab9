"""TRAM: its direction, its radius, what it compares with, and that nothing else is touched."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

from hf_sharp import (
    TRAM,
    Landscape,
    NoisyInputs,
    PretrainedWeights,
    PreviousWeights,
    SharpTrainer,
    tram,
)
from models import (
    batch_of,
    causal_rows,
    image_rows,
    mlp_rows,
    text_rows,
    tiny_bert,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    windows_of,
)
from toy import ToyHost, flat
from training import Recorder, build, train, weights

WINDOW = windows_of(mlp_rows(8), micro=4, accumulate=2)[0]


def step(method, model, window, measuring=False):
    host = ToyHost(model)
    host.micro_batches = len(window)
    landscape = Landscape(host, window, measuring)
    landscape.plan = method.plan_first_pass(landscape)
    for batch in window:
        landscape.first_pass(batch)
    shifts = []
    shifted = landscape.shifted

    def watched(shift):
        shifts.append(flat(shift.epsilon, model).clone())
        return shifted(shift)

    landscape.shifted = watched
    grad = flat(landscape.first.grad, model).clone()
    there = method.gradient(landscape)
    return grad, shifts[-1], there.metrics["sharp_radius"]


def test_the_direction_is_w_squared_times_g():
    model = tiny_mlp(seed=1)
    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    grad, epsilon, radius = step(TRAM(NoisyInputs(0.5)), model, WINDOW)
    direction = w**2 * grad
    torch.testing.assert_close(epsilon / epsilon.norm(), direction / direction.norm(), rtol=1e-12, atol=1e-15)
    present = w != 0  # layer norm's bias starts as zero and does not move
    length = (epsilon[present] / w[present].abs()).norm()
    torch.testing.assert_close(length, radius, rtol=1e-12, atol=0)


def test_it_flips_with_the_sign_of_the_loss():
    class Negated(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def get_input_embeddings(self):
            return self.model.get_input_embeddings()

        def forward(self, **batch):
            outputs = self.model(**batch)
            return {**outputs, "loss": -outputs["loss"]}

    model = tiny_mlp(seed=1)
    _, epsilon, radius = step(TRAM(NoisyInputs(0.5)), model, WINDOW)
    _, other, same = step(TRAM(NoisyInputs(0.5)), Negated(copy.deepcopy(model)), WINDOW)
    assert torch.equal(epsilon, -other) and torch.equal(radius, same) and epsilon.norm() > 0


@pytest.mark.parametrize("kl", ["forward", "reverse", "symmetric"])
def test_the_radius_is_the_divergence_between_two_steps(kl, tmp_path):
    """Computed again from saved weights, for a causal model with labels of unequal length."""
    rows, path = causal_rows(24, ragged=True), []
    model = tiny_llama(dropout=0.0)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    trainer = build(SharpTrainer, model, rows, tmp_path, method=tram("previous", kl=kl, scale=3.0), **settings)
    trainer.add_callback(Recorder(lambda **_: path.append(copy.deepcopy(model.state_dict()))))
    start = copy.deepcopy(model.state_dict())
    trainer.train()
    radii = [line["sharp_radius"] for line in trainer.state.log_history if "sharp_radius" in line]
    assert len(radii) == 3 and radii[0] == 0.0
    other = tiny_llama(dropout=0.0).train()
    batch = batch_of(rows[8:16])

    def log_p(state):
        other.load_state_dict(state)
        with torch.no_grad():
            logits = other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        marks = batch["labels"][:, 1:] != -100
        return F.log_softmax(logits[:, :-1].double(), dim=-1)[marks]

    before, now = log_p(start), log_p(path[0])
    forward = (before.exp() * (before - now)).sum(-1).mean()
    reverse = (now.exp() * (now - before)).sum(-1).mean()
    expected = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kl]
    assert radii[1] == pytest.approx(3.0 * float(expected), rel=1e-4) and radii[1] > 0


def test_the_divergence_measures_the_model_and_not_dropout(tmp_path):
    """At a learning rate of zero both sides are the same model, and only their dropout could differ."""
    for reference in ("previous", "pretrained"):
        settings = {"method": tram(reference), "learning_rate": 0.0, "gradient_accumulation_steps": 2, "max_steps": 3}
        trainer = train(SharpTrainer, tiny_bert(dropout=0.5), text_rows(24), tmp_path, **settings)
        assert [line["sharp_radius"] for line in trainer.state.log_history if "sharp_radius" in line] == [0.0] * 3


@pytest.mark.parametrize("make", [(tiny_bert, text_rows), (tiny_vit, image_rows), (tiny_llama, causal_rows)])
def test_noise_leaves_inputs_and_model_alone(make, tmp_path):
    model, rows = make[0](dropout=0.1), make[1](24)
    kept = copy.deepcopy(rows)
    trainer = train(
        SharpTrainer, model, rows, tmp_path, method=tram("noise", sigma=0.5), gradient_accumulation_steps=2
    )
    assert all(torch.equal(row[key], old[key]) for row, old in zip(rows, kept, strict=True) for key in row)
    assert not model.get_input_embeddings()._forward_hooks
    radii = [line["sharp_radius"] for line in trainer.state.log_history if "sharp_radius" in line]
    assert len(radii) == 5 and min(radii) > 0


def test_a_model_without_input_embeddings_is_refused(tmp_path):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_mlp()

        def forward(self, x, labels=None):
            return self.inner(x, labels)

    for method in (tram("noise"), tram("fisher")):
        with pytest.raises(ValueError, match="get_input_embeddings"):
            build(SharpTrainer, Bare(), mlp_rows(4), tmp_path, method=method)


def test_outputs_without_logits_are_refused(tmp_path):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_mlp()

        def forward(self, x, labels=None):
            return {"loss": self.inner(x, labels)["loss"], "hidden": x.float()}

    with pytest.raises(ValueError, match="'logits'"):
        train(SharpTrainer, Other(), mlp_rows(8), tmp_path, method=tram("previous"))


def test_the_first_weights_of_an_adapter_are_the_model_without_it(tmp_path):
    peft = pytest.importorskip("peft")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
    config = peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_llama(dropout=0.0), config)
    rows = causal_rows(24)
    method = TRAM(PretrainedWeights())
    settings = {"max_steps": 3, "learning_rate": 0.1}
    trainer = train(SharpTrainer, model, rows, tmp_path, method=method, **settings)
    kept = trainer.method.reference._state["weights"]
    assert all("lora" in name for name in kept)
    batch = batch_of(rows[:4])
    with torch.no_grad(), model.disable_adapter():
        expected = model(**batch).logits
    landscape = Landscape(trainer._sharp_host, [batch])
    with trainer._sharp_host.watched():
        model(**batch)
    torch.testing.assert_close(landscape.outputs_at(batch, landscape.facts.vector(kept)).logits, expected)
    assert not torch.equal(landscape.outputs_at(batch).logits, expected)


def test_state_is_one_copy_of_the_trainables(tmp_path):
    for reference, copies in ((PreviousWeights(), 1), (PretrainedWeights(), 1), (NoisyInputs(), 0)):
        model = tiny_mlp()
        trainer = train(SharpTrainer, model, mlp_rows(40), tmp_path, method=TRAM(reference))
        kept = sum(t.numel() for t in trainer.method.state_dict().values())
        assert kept == copies * weights(trainer).numel()
