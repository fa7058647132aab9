"""Weights that a forward sees through a quantiser: shifts are measured as they arrive, and looking moves nothing."""

import warnings

import pytest
import torch
from torch.nn.utils.parametrize import register_parametrization

from hf_sharp import ParamVector, SharpTrainer, sam
from toy import opened
from training import train, weights

SIZE = 0.01  # of a quantiser's step


def steps(weight):
    return (weight / SIZE).round() * SIZE


class Steps(torch.nn.Module):
    """A quantiser that gradients pass through as if it were not there."""

    def forward(self, weight):
        return weight + (steps(weight) - weight).detach()


class Watching(Steps):
    """The same with state and draws of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls += 1
        torch.rand(1)
        return super().forward(weight)


class Rigid(torch.autograd.Function):
    """A quantiser whose backward has no derivative of its own."""

    @staticmethod
    def forward(ctx, weight):
        return steps(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


class Once(torch.nn.Module):
    def forward(self, weight):
        return Rigid.apply(weight)


class Bent(torch.nn.Module):
    """Smooth: twice the shift is what should arrive, and all but its square does."""

    def forward(self, weight):
        return 2 * weight + 0.001 * weight.square()


class Net(torch.nn.Module):
    """One linear layer and a loss; the weight is seen through a function, if one is given."""

    def __init__(self, function=None, layer=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(40, 30, bias=False).double() if layer is None else layer
        if function is not None:
            register_parametrization(self.inner, "weight", function, unsafe=True)

    def forward(self, x, labels=None):
        logits = self.inner(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    @property
    def weight(self):
        return next(iter(self.parameters()))


def random_shift(length, dtype=torch.float64):
    draw = torch.randn(30, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (length * draw / draw.norm()).to(dtype)


def batch(dtype=torch.float64):
    draw = torch.randn(4, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return {"x": draw.to(dtype), "labels": torch.arange(4)}


def measured(model, shift, given=None, measuring=True):
    landscape, _ = opened(model, [given or batch()], measuring=measuring)
    landscape.evaluate()
    with landscape.shifted(ParamVector([shift.clone()])):
        landscape.evaluate()
    return landscape.metrics.get("sharp_component"), landscape.metrics.get("sharp_noise")


@pytest.mark.parametrize("make", [Steps, Watching, Once])
def test_a_quantised_weight_is_measured_as_the_forward_sees_it(make):
    model, shift = Net(make()), random_shift(0.05)
    before = model.weight.detach().clone()
    component, noise = measured(model, shift)
    real = steps(before + shift) - steps(before)
    assert float(component) == pytest.approx(float((real * shift).sum() / shift.square().sum()), rel=1e-9)
    assert float(noise) == pytest.approx(float((real - shift).norm() / shift.norm()), rel=1e-9)
    assert noise > 1 and torch.equal(model.weight, before)


def test_looking_moves_neither_state_nor_draws():
    ends = []
    for measuring in (False, True):
        model = Net(Watching())
        torch.manual_seed(1)
        measured(model, random_shift(0.05), measuring=measuring)
        ends.append((float(model.inner.parametrizations.weight[0].calls), float(torch.rand(()))))
    assert ends[0] == ends[1]


def test_a_smooth_function_of_a_weight_loses_nothing():
    component, noise = measured(Net(Bent()), random_shift(0.05))
    assert float(component) == pytest.approx(1.0, abs=1e-4) and noise < 1e-4


def test_the_fake_quantiser_of_a_module_is_measured():
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import FakeQuantize, MinMaxObserver, QConfig

    settings = {"observer": MinMaxObserver, "quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
    quantiser = FakeQuantize.with_args(qscheme=torch.per_tensor_symmetric, **settings)
    layer = Linear(40, 30, bias=False, qconfig=QConfig(activation=torch.nn.Identity, weight=quantiser))
    model, shift = Net(layer=layer), random_shift(0.005, torch.float32)
    before = model.weight.detach().clone()
    component, noise = measured(model, shift, batch(torch.float32))

    def quantised(weight, largest):
        size = largest / 127.5
        return (weight / size).round().clamp(-128, 127) * size

    largest = before.abs().max()  # of all that the observer has seen: it keeps the larger
    later = torch.maximum(largest, (before + shift).abs().max())
    real = quantised(before + shift, later) - quantised(before, largest)
    # An entry or two may fall to the other side of a rounding: the quantiser divides in float32 otherwise than here.
    assert float(noise) == pytest.approx(float((real - shift).norm() / shift.norm()), rel=0.05)
    assert noise > 2 and 0.5 < component < 1.5


def run(folder, model, **settings):
    rows = [{"x": batch()["x"][i % 4].to(model.weight.dtype), "labels": torch.tensor(i % 4)} for i in range(12)]
    settings = {"max_steps": 2, "optim": "sgd", "method": sam(0.005), **settings}
    return train(SharpTrainer, model, rows, folder, **settings)


def test_the_trainer_names_the_quantiser_and_trains_on_as_it_would(tmp_path):
    with pytest.warns(UserWarning, match=r"rounds away in weights that pass through Steps\. Use a larger rho"):
        looked = run(tmp_path, Net(Steps()))
    assert looked.state.log_history[0]["sharp_noise"] > 2
    unlooked = run(tmp_path, Net(Steps()), logging_steps=500)
    assert torch.equal(weights(looked), weights(unlooked))


def test_under_autocast_the_warning_names_the_format_of_the_casts(tmp_path):
    with pytest.warns(UserWarning, match=r"of torch\.bfloat16, to which the forward casts them\. Use adapt"):
        run(tmp_path, Net().float(), bf16=True, method=sam(0.0002))
    with pytest.warns(UserWarning, match=r"in weights of torch\.bfloat16\. Use float32 weights"):
        run(tmp_path, Net().bfloat16(), method=sam(0.0002))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, Net(), method=sam(0.05))
