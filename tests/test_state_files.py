"""State that does not fit the model is refused before any step, whatever is wrong with it; nothing in it is run."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from hf_sharp import (
    Adaptive,
    After,
    Every,
    SharpConfig,
    SharpOptimizer,
    SharpStep,
    SharpTrainer,
    friendly_sam,
    fsam,
    looksam,
    mesa,
    saf,
    sam,
    tram,
    vasso,
)
from hf_sharp._integrations.states import read_state
from models import mlp_rows, tiny_mlp, windows_of
from training import build

ROWS = [{**row, "sample_index": torch.tensor(index % 8)} for index, row in enumerate(mlp_rows(24))]
WINDOWS = windows_of(ROWS, micro=4, accumulate=1)
METHODS = {
    "fsam": lambda: fsam(0.05, keep=0.3, every=4),
    "friendly_sam": lambda: friendly_sam(0.05),
    "looksam": lambda: looksam(0.05, every=5),
    "mesa": lambda: mesa(),
    "vasso": lambda: vasso(0.05),
    "saf": lambda: saf(lag=1),
    "tram": lambda: tram(),
}
SIX = [name for name in METHODS if name != "tram"]


def loss_of(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "sample_index"})["loss"]


def step_of(method, seed=0):
    accelerator = Accelerator(cpu=True)
    model = tiny_mlp(seed=seed)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    return SharpStep(method, model, optimizer, accelerator, loss_of, total_steps=9), optimizer


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def good():
    """What each method keeps after two steps."""
    states = {}
    for name, make in METHODS.items():
        sharp, optimizer = step_of(make())
        for window in WINDOWS[:2]:
            sharp.backward(window[0])
            optimizer.step()
            optimizer.zero_grad()
        states[name] = copy.deepcopy(sharp.state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return states


def tensors(state):
    return [key for key, value in state.items() if isinstance(value, torch.Tensor)]


def floats(state):
    return [key for key in tensors(state) if state[key].is_floating_point()]


def first(change):
    """One tensor of the state is changed."""
    return lambda state: {**state, tensors(state)[0]: change(state[tensors(state)[0]])}


def spoilt(number):
    """One entry of the first floating tensor, or of the first that is made floating, is such a number."""

    def change(state):
        key = (floats(state) or tensors(state))[0]
        tensor = state[key].clone() if floats(state) else state[key].double()
        tensor.view(-1)[-1] = number
        return {**state, key: tensor}

    return change


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


def nameless(state):
    """The state as a file has it that does not say how many tensors there were."""
    return {key: value for key, value in state.items() if not key.endswith("/")}


def moved(state):
    """The tensors under the names of another model."""
    return {key.replace("head.", "classifier.").replace("/0", "/x"): value for key, value in state.items()}


TAMPERED = {
    "a tensor is missing": lambda s: without(s, tensors(s)[0]),
    "the last tensor is missing": lambda s: without(s, tensors(s)[-1]),
    "all tensors are missing": lambda s: without(s, *tensors(s)),
    "nothing is left": lambda s: {key: s[key] for key in ("step", "method")},
    "an unknown tensor": lambda s: {**s, tensors(s)[0].rsplit("/", 1)[0] + "/nobody": s[tensors(s)[0]]},
    "an unknown entry": lambda s: {**s, ":nothing/head.weight": torch.ones(2)},
    "an unknown part": lambda s: {**s, "other:mask/head.weight": torch.ones(2)},
    "an unknown number": lambda s: {**s, ":number": 3},
    "another model's names": moved,
    "another model's names, uncounted": lambda s: nameless(moved(s)),
    "NaN": spoilt(float("nan")),
    "infinity": spoilt(float("inf")),
    "a dimension more": first(lambda t: t[None]),
    "a dimension less": first(lambda t: t.reshape(-1)[:-1]),
    "transposed or longer": first(lambda t: torch.cat([t, t])),
    "empty": first(lambda t: t[:0]),
    "a scalar": first(lambda t: t.reshape(-1)[0]),
    "complex": first(lambda t: t.to(torch.complex64)),
    "bytes": first(lambda t: t.to(torch.uint8)),
    "half, or no counts": lambda s: {k: v.half() if k in tensors(s) else v for k, v in s.items()},
    "a number for a tensor": first(lambda t: 1.0),
    "a list for a tensor": first(lambda t: [1.0]),
    "text for a tensor": first(lambda t: "__import__('os').abort()"),
    "one value and several": lambda s: {tensors(s)[0].rsplit("/", 1)[0]: 1.0, **s},
    "more tensors were counted": lambda s: {k: v + 1 if k.endswith("/") else v for k, v in s.items()},
    "the count is text": lambda s: {k: "two" if k.endswith("/") else v for k, v in s.items()},
    "the step is negative": lambda s: {**s, "step": -1},
    "the step is text": lambda s: {**s, "step": "2"},
    "the step is no whole number": lambda s: {**s, "step": float("nan")},
}


@pytest.mark.parametrize("name", METHODS)
def test_what_was_saved_is_taken(name, good):
    for state in (good[name], nameless(good[name])):
        sharp, _ = step_of(METHODS[name]())
        sharp.load_state_dict(state)
        again = sharp.state_dict()
        assert again.keys() == good[name].keys()
        assert all(torch.equal(torch.as_tensor(again[k]), torch.as_tensor(good[name][k])) for k in tensors(again))
        assert again["step"] == 2


@pytest.mark.parametrize("what", TAMPERED)
@pytest.mark.parametrize("name", SIX)
def test_a_state_that_does_not_fit_is_refused(name, what, good):
    sharp, _ = step_of(METHODS[name]())
    before = sharp.state_dict()
    with pytest.raises(ValueError, match=r"saved state"):
        sharp.load_state_dict(TAMPERED[what](good[name]))
    assert sharp.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", ["friendly_sam", "fsam", "vasso"])
def test_the_optimizer_refuses_it_too(name, good):
    model = tiny_mlp()
    optimizer = SharpOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), METHODS[name](), model)
    base, own = optimizer.base.state_dict(), without(good[name], "method")
    optimizer.load_state_dict({**base, "sharp": own})
    kept = copy.deepcopy(optimizer.state_dict()["sharp"])
    assert kept.keys() == own.keys()
    for change in (moved, spoilt(float("nan")), TAMPERED["the step is text"]):
        with pytest.raises(ValueError, match="saved state"):
            optimizer.load_state_dict({**base, "sharp": change(own)})
        assert optimizer.state_dict()["sharp"].keys() == kept.keys()


def test_numbers_are_looked_at():
    for bad in (float("nan"), -1.0, "1", True, [1.0], None):
        sharp, _ = step_of(Adaptive(sam(0.05)))
        with pytest.raises(ValueError, match=r"':mu' is"):
            sharp.load_state_dict({"step": 1, "method": repr(sharp.method), ":mu": bad, ":var": 0.0})
    with pytest.raises(ValueError, match="':var' is missing"):
        sharp.load_state_dict({"step": 1, "method": repr(sharp.method), ":mu": 1.0})


def test_a_method_that_has_not_begun_to_keep_anything_goes_on():
    for method in (After(0.9, friendly_sam(0.05)), Every(5, looksam(0.05, every=2))):
        sharp, _ = step_of(method)
        state = sharp.state_dict()
        sharp.load_state_dict(state)
        with pytest.raises(ValueError, match="it holds nothing of what"):
            sharp.load_state_dict(nameless(state))


def test_a_resized_parameter_is_named():
    for name in ("fsam", "friendly_sam", "looksam", "mesa", "vasso", "tram"):
        sharp, optimizer = step_of(METHODS[name]())
        sharp.backward(WINDOWS[0][0])
        optimizer.zero_grad()
        model = sharp._host.model
        model.head.weight.data = torch.cat([model.head.weight.data] * 2)
        model.head.bias.data = torch.cat([model.head.bias.data] * 2)
        with pytest.raises(ValueError, match=r"shape \(3, \d+\) for head.weight, which has the shape \(6, \d+\) now"):
            sharp.backward(WINDOWS[1][0])
        sharp.method.reset()
        sharp.backward(WINDOWS[1][0])
        assert model.head.weight.grad.shape == model.head.weight.shape


# --- files -----------------------------------------------------------------------------------------------------------


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "content",
    ["cut", "pickle", "zeros", "nothing", "deep", "nan", "text"],
)
def test_a_file_that_cannot_be_read_is_said_to_be_so(content, tmp_path):
    path, ran = tmp_path / "sharp_state.safetensors", tmp_path / "ran"
    save_file({":mean/head.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    data = path.read_bytes()
    if content == "deep":
        save_file({}, path, metadata={":refreshed": "[" * 200_000})
    elif content == "nan":
        save_file({}, path, metadata={":refreshed": "{not json"})
    elif content == "text":
        path.write_text("not a file of tensors")
    else:
        others = {"cut": data[:-5], "pickle": pickle.dumps(Trap(ran)), "zeros": bytes(len(data)), "nothing": b""}
        path.write_bytes(others[content])
    with pytest.raises(ValueError, match="Resume from another checkpoint"):
        read_state(path, "cpu")
    assert not ran.exists()


def test_a_config_that_cannot_be_read_is_said_to_be_so(tmp_path):
    path = tmp_path / "sharp_config.json"
    for text in ("[" * 200_000, '{"a":' * 200_000, "{", "[]", '"sam"', "", "\0", '{"repr": "x", "settings": [1]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"sharp_config\.json"):
            SharpConfig.from_json_file(path)


def test_a_checkpoint_with_such_files_is_refused_before_any_step(tmp_path, good):
    trainer = build(
        SharpTrainer, tiny_mlp(seed=0), ROWS, tmp_path, method=friendly_sam(0.05), save_strategy="steps", save_steps=1
    )
    trainer.args.max_steps = 1
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    file, state = checkpoint / "sharp_state.safetensors", read_state(checkpoint / "sharp_state.safetensors", "cpu")
    assert state[":mean/"] == len(tensors(state))
    numbers = {"format": "pt", **{key: json.dumps(value) for key, value in state.items() if key.endswith("/")}}
    for change in (moved, spoilt(float("nan")), TAMPERED["a tensor is missing"]):
        changed = {key: value for key, value in change(state).items() if isinstance(value, torch.Tensor)}
        for metadata in ({"format": "pt"}, numbers):
            save_file(changed, file, metadata=metadata)
            again = build(SharpTrainer, tiny_mlp(seed=0), ROWS, tmp_path, method=friendly_sam(0.05))
            steps = []
            again.model.register_forward_pre_hook(lambda *_, steps=steps: steps.append(1))
            with pytest.raises(ValueError, match="saved state"):
                again.train(resume_from_checkpoint=str(checkpoint))
            assert not steps
