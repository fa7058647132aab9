"""No step waits for the device: every method runs on meta tensors, which have no numbers to wait for.

`item`, `bool`, `float` and copies to the host all raise there. A window of two micro-batches, no measuring.
"""

from contextlib import nullcontext

import pytest
import torch

import hf_sharp._perturbation.noise
import peft_models
from cases import METHODS
from hf_sharp._engine.facts import StepFacts
from hf_sharp._engine.landscape import Landscape
from hf_sharp._engine.random_state import RandomState
from hf_sharp._integrations.stepper import Stepper
from models import mlp_rows, tiny_mlp, windows_of
from toy import ToyHost

DECIDES = ("adaptive",)  # by the gradient's norm: its docstring says that it waits


@pytest.fixture
def on_meta(monkeypatch):
    """What needs a generator on the device, or a stream of its own, is drawn on the host."""
    record = RandomState.record
    monkeypatch.setattr("hf_sharp._engine.tape.RandomState.record", staticmethod(lambda devices: record(set())))
    monkeypatch.setattr(StepFacts, "random", lambda self, tag, device="cpu": torch.Generator())
    monkeypatch.setattr(
        hf_sharp._perturbation.noise,
        "_noise",
        lambda shape, generator, sigma, dtype: torch.empty(shape, dtype=dtype, device="meta"),
    )


@pytest.mark.parametrize("name", peft_models.METHODS)
def test_nor_does_a_step_with_adapters(name, on_meta, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **_: torch.empty(*shape, device=device))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    host = ToyHost(peft_models.lora_mlp().to("meta"))
    host.loss_scale = host.loss_scale.to("meta")
    method = peft_models.METHODS[name]()
    host.added = {n: torch.nn.Parameter(value) for n, value in method.adds(Landscape(host)).items()}
    three_steps(method, host)
    assert all(p.grad is not None for p in host.added.values())


def three_steps(method, host, columns=("x", "labels")):
    stepper = Stepper(method, host)
    rows = [{key: row[key].to("meta") for key in columns} for row in mlp_rows(24)]
    for step, window in enumerate(windows_of(rows, micro=4, accumulate=2)):
        host.step, host.micro_batches = step, len(window)
        stepper.begin_window(window)
        for index, batch in enumerate(window):
            stepper.micro_batch(batch, last=index == 1)
        stepper.before_update()
        assert all(p.grad is not None for p in host.parameters.values())
        for parameter in host.parameters.values():
            parameter.grad = None


def meta_host():
    host = ToyHost(tiny_mlp().to("meta"))
    host.loss_scale = host.loss_scale.to("meta")
    return host


@pytest.mark.parametrize("name", [n for n, case in METHODS.items() if not case.visits and n not in DECIDES])
def test_no_step_waits_for_the_device(name, on_meta):
    three_steps(METHODS[name].method(), meta_host())


@pytest.mark.parametrize("name", DECIDES)
def test_a_method_that_decides_by_a_number_waits_and_says_so(name, on_meta):
    method = METHODS[name].method()
    with pytest.raises(RuntimeError, match="item"):
        three_steps(method, meta_host())
    assert "wait for the device" in __import__(type(method).__module__, fromlist=[""]).__doc__


def test_with_a_scaler_a_step_that_changed_the_state_waits_as_the_scaler_does(on_meta):
    class Scaled(ToyHost):
        skips_overflows = True

    host = Scaled(tiny_mlp().to("meta"))
    host.loss_scale = host.loss_scale.to("meta")
    with pytest.raises(RuntimeError, match="item"):
        three_steps(METHODS["vasso"].method(), host)
    three_steps(METHODS["sam"].method(), host)
