"""The tiny models are the references' twins, seeded, and go through transformers.Trainer."""

import math

import pytest
import torch

import models
from models import TinyMLP, batch_of, mlp_rows, text_rows, tiny_bert, tiny_mlp, windows_of
from references import (
    adamw,
    entrywise,
    flat,
    functional,
    layout_of,
    linear_decay,
    mlp_loss,
    mlp_shapes,
    plain,
    trajectory,
    window_gradient,
)

SHAPES = mlp_shapes()
LAYOUT = layout_of(SHAPES)


def equal(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_the_module_and_the_pure_function_are_twins(norm):
    model = tiny_mlp(norm=norm, seed=5)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == SHAPES
    batch = batch_of(mlp_rows(6))
    loss = model(**batch)["loss"]
    loss.backward()
    equal(mlp_loss(SHAPES, norm)(flat(model), batch), loss.detach())
    gradient = window_gradient(mlp_loss(SHAPES, norm), flat(model), [batch])
    equal(gradient, torch.cat([p.grad.reshape(-1) for p in model.parameters()]))


def test_functional_takes_trainables_only_and_leaves_the_model_alone():
    model = tiny_bert(dropout=0.0, float64=True)
    model.bert.embeddings.requires_grad_(False)
    before = flat(model)
    w, layout, loss_fn = functional(model)
    assert list(layout) == [name for name, p in model.named_parameters() if p.requires_grad]
    batch = batch_of(text_rows(4))
    gradient = window_gradient(loss_fn, w, [batch])
    assert all(p.grad is None for p in model.parameters()) and torch.equal(flat(model), before)
    model(**batch).loss.backward()
    equal(gradient, torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad]))


def test_functional_counts_a_tied_tensor_once():
    model = TinyMLP(vocab=8, width=3, hidden=8, classes=8).double()
    model.embed.weight = model.head.weight
    model.hidden = torch.nn.Linear(8, 8).double()
    w, layout, loss_fn = functional(model)
    assert "head.weight" not in layout and w.numel() == sum(p.numel() for p in model.parameters())
    batch = batch_of(mlp_rows(6, vocab=8, classes=8))
    gradient = window_gradient(loss_fn, w, [batch])
    model(**batch)["loss"].backward()
    equal(gradient, torch.cat([p.grad.reshape(-1) for p in model.parameters()]))


def test_builders_are_seeded_and_leave_the_stream_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(flat(tiny_bert(seed=2)), flat(tiny_bert(seed=2)))
    assert not torch.equal(flat(tiny_mlp(seed=2)), flat(tiny_mlp(seed=3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert flat(tiny_mlp()).dtype == torch.float64 and math.isfinite(flat(tiny_mlp()).sum())


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "mlp"])
@pytest.mark.parametrize("float64", [True, False])
def test_every_tiny_model_has_a_loss_and_dropout_only_if_asked(kind, float64):
    model = getattr(models, f"tiny_{kind}")(float64=float64, dropout=0.0)
    noisy = getattr(models, f"tiny_{kind}")(float64=float64, dropout=0.5)
    rows = {
        "bert": lambda: text_rows(4),
        "vit": lambda: models.image_rows(4, float64=float64),
        "llama": lambda: models.causal_rows(4, ragged=True),
        "mlp": lambda: mlp_rows(4),
    }[kind]()
    batch = batch_of(rows)
    precision = torch.float64 if float64 else torch.float32
    assert next(model.parameters()).dtype == precision
    if kind != "llama":  # transformers computes the loss of causal models in float32
        assert model(**batch)["loss"].dtype == precision
    assert torch.equal(model.train()(**batch)["loss"], model(**batch)["loss"])
    assert not torch.equal(noisy.train()(**batch)["loss"], noisy(**batch)["loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_transformers_trainer_follows_the_plain_trajectory(tmp_path, accumulate):
    from transformers import Trainer, TrainingArguments

    model, rows = tiny_mlp(seed=4), mlp_rows(16)
    windows = windows_of(rows, micro=4 // accumulate, accumulate=accumulate)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=4,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=0.5,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    decay = entrywise(LAYOUT, lambda name: 0.0 if "bias" in name or "norm" in name else 0.1)
    expected = trajectory(
        plain,
        mlp_loss(SHAPES),
        flat(model),
        windows,
        adamw(0.01, weight_decay=decay),
        steps=4,
        layout=LAYOUT,
        max_norm=0.5,
        lr_factor=linear_decay(4),
    )
    Trainer(model=model, args=args, train_dataset=rows).train()
    equal(flat(model), expected[-1])
