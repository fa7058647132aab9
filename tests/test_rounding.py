"""Shifts where a forward sees 16 bits: right on average, measured as the forward sees them, bitwise undone."""

import pytest
import torch

from hf_sharp import Landscape, ParamVector, SharpTrainer, sam
from hf_sharp._engine.resources import Resources
from hf_sharp._engine.rounding import cast_by_autocast, stochastic
from models import mlp_rows, text_rows, tiny_bert, tiny_mlp
from toy import ToyHost
from training import build, train, weights

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.0200001, -0.02003, 3e-7, -5e-8, 0.99999, 60000.5])
def test_the_mean_is_the_number_and_the_values_its_neighbours(dtype, value):
    rounded = stochastic(torch.full((200_000,), value), dtype, torch.Generator().manual_seed(0))
    assert rounded.dtype == dtype and len(rounded.unique()) == 2
    low, high = rounded.float().unique().tolist()
    assert low <= value <= high and torch.tensor(value).to(dtype).float() in (low, high)
    error = (high - low) / 2 / 200_000**0.5
    assert abs(rounded.double().mean() - value) < 4 * error


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_format_holds_stays(dtype):
    exact = torch.cat(
        [torch.randn(1000).to(dtype), torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf], dtype=dtype)]
    )
    again = stochastic(exact.float(), dtype, torch.Generator().manual_seed(0))
    assert torch.equal(again, exact)
    assert stochastic(torch.tensor([torch.nan]), dtype, torch.Generator()).isnan().all()


class Big(torch.nn.Module):
    """One matrix, as large as is wanted."""

    def __init__(self, entries, dtype, grid=None):
        super().__init__()
        self.matrix = torch.nn.Linear(entries // 1000, 1000, bias=False)
        with torch.no_grad():
            draw = torch.randn(self.matrix.weight.shape, generator=torch.Generator().manual_seed(0)).mul_(0.02)
            self.matrix.weight = torch.nn.Parameter((draw if grid is None else draw.to(grid)).to(dtype))

    def forward(self, x):
        return {"loss": self.matrix(x).float().mean()}


class Autocast(ToyHost):
    autocast = torch.bfloat16


def realised(host, epsilon, rounding="stochastic"):
    landscape = Landscape(host, measuring=True, resources=Resources(host, rounding))
    before = [p.detach().clone() for p in host.parameters.values()]
    with landscape.shifted(ParamVector([epsilon])):
        pass
    assert all(torch.equal(p, b) for p, b in zip(host.parameters.values(), before, strict=True))
    return float(landscape.metrics["sharp_component"]), float(landscape.metrics["sharp_noise"])


@pytest.mark.parametrize("rho", [0.05, 0.01])
@pytest.mark.parametrize("case", ["bf16 weights", "fp16 weights", "fp32 copy under autocast", "fp32 under autocast"])
def test_the_component_is_within_five_percent(case, rho):
    dtype = {"bf16 weights": torch.bfloat16, "fp16 weights": torch.float16}.get(case, torch.float32)
    model = Big(10_000_000, dtype, torch.bfloat16 if "copy" in case else None)
    host = (Autocast if "autocast" in case else ToyHost)(model)
    epsilon = torch.randn(model.matrix.weight.shape, generator=torch.Generator().manual_seed(1))
    epsilon = (epsilon * (rho / epsilon.norm())).to(dtype)
    component, noise = realised(host, epsilon)
    assert abs(component - 1) < 0.05
    lost, _ = realised(host, epsilon, "nearest")
    if case in ("bf16 weights", "fp32 copy under autocast"):
        assert lost < 0.9 and noise > 1  # what the other choice loses, and what this one costs


def test_large_models_keep_the_component():
    model = Big(100_000_000, torch.bfloat16)
    epsilon = torch.randn(model.matrix.weight.shape, generator=torch.Generator().manual_seed(1))
    epsilon = (epsilon * (0.05 / epsilon.norm())).bfloat16()
    component, noise = realised(ToyHost(model), epsilon)
    assert abs(component - 1) < 0.05 and noise > 2


def test_draws_are_private_and_the_same_in_a_step_run_again():
    model = Big(1_000_000, torch.bfloat16)
    epsilon = torch.full_like(model.matrix.weight, 1e-6)
    stream, seen = torch.get_rng_state(), []
    for step in (0, 0, 1):
        host = ToyHost(model)
        host.step = step
        landscape = Landscape(host)
        for _ in range(2):
            with landscape.shifted(ParamVector([epsilon])):
                seen.append(model.matrix.weight.detach().clone())
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[4])


def test_autocast_casts_linear_layers_and_no_tables():
    model = tiny_bert()
    cast = cast_by_autocast(model.modules())
    names = {name for name, p in model.named_parameters() if id(p) in cast}
    assert "classifier.weight" in names and not any("embeddings" in name or "LayerNorm" in name for name in names)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_bf16_training_runs_and_restores(rounding, tmp_path):
    settings = {"method": sam(0.05), "rounding": rounding, "max_steps": 3, "learning_rate": 0.0}
    model = tiny_bert(dropout=0.0).bfloat16()
    model.accepts_loss_kwargs = False
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()
    trainer = train(SharpTrainer, model, text_rows(24), tmp_path, **settings)
    assert torch.equal(weights(trainer), before)
    components = [line["sharp_component"] for line in trainer.state.log_history if "sharp_component" in line]
    assert len(components) == 3


def test_an_unknown_rounding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rounding is one of stochastic, nearest"):
        build(SharpTrainer, tiny_mlp(), mlp_rows(8), tmp_path, method=sam(), rounding="up")


def test_the_forward_sees_the_shift_under_autocast(tmp_path):
    """An fp32 copy of bf16 weights: the loss moves along the gradient as far as the slope says."""
    model = tiny_bert(dropout=0.0, hidden_size=64, intermediate_size=256).bfloat16().float()
    model.accepts_loss_kwargs = False
    settings = {"method": sam(0.5), "bf16": True, "max_steps": 1, "learning_rate": 0.0}
    trainer = train(SharpTrainer, model, text_rows(16), tmp_path, **settings)
    line = trainer.state.log_history[0]
    assert abs(line["sharp_component"] - 1) < 0.1 and line["sharp_gap"] > 0
