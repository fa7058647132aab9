"""A method that a user writes, and what is said where something is missing in it."""

from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from hf_sharp import Every, FirstPass, Method, Perturbation, SharpOptimizer, SharpStep, SharpTrainer
from models import batch_of, mlp_rows, tiny_mlp
from training import build

ROWS = mlp_rows(8)


@dataclass(frozen=True)
class NoCost(Method):
    perturbation: Perturbation = field(default_factory=lambda: Perturbation(0.05))

    def gradient(self, landscape):
        return landscape.evaluate()


@dataclass(frozen=True)
class Old(Method):
    cost = 1.0

    def start(self, landscape):
        del landscape
        return FirstPass()

    def gradient(self, landscape):
        return landscape.evaluate()


class NoInit(Method):
    cost = 1.0

    def __init__(self, rho):
        self.rho = rho

    def gradient(self, landscape):
        return landscape.evaluate()


class Hidden(Method):
    cost = 2.0

    def __init__(self, rho):
        super().__init__()
        self.inner = Perturbation(rho)

    def gradient(self, landscape):
        return landscape.evaluate()


@dataclass(frozen=True)
class NoRule(Method):
    cost = 1.0


class Counting(Method):
    cost = 1.0

    def __init__(self):
        super().__init__()
        self.n = 0

    def gradient(self, landscape):
        self.n += 1
        return landscape.evaluate()


@dataclass(frozen=True)
class Frozen(Method):
    cost = 1.0
    n: int = 0

    def gradient(self, landscape):
        self.n += 1
        return landscape.evaluate()


@dataclass(frozen=True)
class Beginning(Method):
    cost = 1.0

    def begin(self, landscape):
        self.__dict__["last"] = landscape.facts.step

    def gradient(self, landscape):
        return landscape.evaluate()


@dataclass(frozen=True)
class Right(Method):
    """All as it should be; what is computed once from the settings may be kept."""

    remembers = True
    cost = 1.0
    rho: float = 0.1

    @cached_property
    def half(self):
        return self.rho / 2

    def gradient(self, landscape):
        self._state["n"] = self._state.get("n", 0) + 1
        self._state["half"] = self.half
        return landscape.evaluate()


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer(method, folder):
    return build(SharpTrainer, tiny_mlp(), ROWS, folder, method=method, max_steps=2)


def closure_step(method, _):
    model = tiny_mlp()
    optimizer = SharpOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, model)

    def closure():
        optimizer.zero_grad()
        loss = model(**batch_of(ROWS))["loss"]
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def loop_step(method, _):
    accelerator = Accelerator(cpu=True)
    model = tiny_mlp()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    sharp = SharpStep(method, prepared, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    for _ in range(2):
        sharp.backward(batch_of(ROWS))
        optimizer.zero_grad()


WAYS = [lambda method, folder: trainer(method, folder).train(), closure_step, loop_step]


@pytest.mark.parametrize("run", WAYS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NoCost, r"NoCost says no cost \(it is None\)\. Write `cost = 2\.0` in the class"),
        (
            lambda: NoInit(0.1),
            r"NoInit\.__init__ leaves _state unset\. Write @dataclass\(frozen=True\) above the class",
        ),
        (lambda: Hidden(0.1), r"Hidden holds a Perturbation in self\.inner, .* `inner: Perturbation`"),
        (Old, r"Old\.start is never called.*plan_first_pass"),
        (NoRule, r"NoRule has no gradient\. Write `def gradient\(self, landscape\):`"),
        (Counting, r"Counting changes self\.n .* self\._state\['n'\] = self\._state\.get\('n', 0\) \+ 1"),
        (Frozen, r"Frozen changes self\.n .* self\._state\['n'\]"),
        (Beginning, r"Beginning changes self\.last .* self\._state\['last'\]"),
    ],
)
def test_what_is_missing_is_said_with_what_to_write(make, message, run, tmp_path):
    with pytest.raises(TypeError, match=message):
        run(make(), tmp_path)


def test_what_can_be_known_is_said_when_the_trainer_is_built(tmp_path):
    for make in (NoCost, lambda: NoInit(0.1), lambda: Hidden(0.1), NoRule, lambda: Every(2, NoCost.__new__(NoCost))):
        with pytest.raises(TypeError, match="Write"):
            trainer(make(), tmp_path)


@pytest.mark.parametrize("run", WAYS)
def test_a_method_that_is_right_trains(run, tmp_path):
    method = Right()
    run(method, tmp_path)
    assert method.state_dict() == {":n": 2, ":half": 0.05}
