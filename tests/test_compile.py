"""Shifts happen in the weights' own memory: nothing is compiled again, and activations are recomputed at the shift."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch._dynamo.testing import CompileCounterWithBackend

from cases import METHODS, MOVING, rows_for
from hf_sharp import SharpStep, SharpTrainer, fsam, gam, mesa, plain, sam, sam_on, tram
from models import mlp_rows, text_rows, tiny_bert, tiny_mlp, windows_of
from references import flat
from training import Recorder, build, train, weights

SETTINGS = {
    "sam": lambda: sam(0.1),
    "fsam": lambda: fsam(0.1, every=2),
    "sam_on": lambda: sam_on(0.1),
    "gam": lambda: gam(0.1),
}


@pytest.fixture(autouse=True)
def fresh_state():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def in_a_loop(method, compiler=None):
    """Weights after four steps in a loop, and how many graphs there were after each."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model = Accelerator(cpu=True), tiny_mlp(seed=1)
    used = model if compiler is None else torch.compile(model, backend=compiler)
    used, optimizer = accelerator.prepare(used, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5))
    sharp = SharpStep(method, used, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    graphs = []
    for window in windows_of(mlp_rows(16), micro=4, accumulate=1):
        sharp.backward(window[0])
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(0 if compiler is None else compiler.frame_count)
    return flat(model), graphs


@pytest.mark.parametrize("name", SETTINGS)
def test_a_compiled_model_in_a_loop_is_compiled_as_often_as_without_a_method(name):
    without = CompileCounterWithBackend("aot_eager")
    in_a_loop(plain(), without)
    torch._dynamo.reset()
    compiled, graphs = in_a_loop(SETTINGS[name](), CompileCounterWithBackend("aot_eager"))
    assert graphs == [without.frame_count] * 4 and without.frame_count > 0
    eager, _ = in_a_loop(SETTINGS[name]())
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-12)  # float64; kernels may add in another order


@pytest.mark.parametrize("name", MOVING)
def test_the_weights_stay_where_they_are_in_memory_while_they_are_shifted(name, tmp_path):
    model = tiny_mlp(seed=1)
    trainer = build(SharpTrainer, model, rows_for(name, mlp_rows(40)), tmp_path, method=METHODS[name].method())
    places, path, shifted = [p.data_ptr() for p in model.parameters()], [weights(trainer)], []

    def look(*_):
        if torch.is_grad_enabled():  # a look at other weights calls the model with other tensors in place of its own
            assert [p.data_ptr() for p in model.parameters()] == places
            shifted.append(not torch.equal(weights(trainer), path[-1]))

    model.register_forward_pre_hook(look)
    trainer.add_callback(Recorder(lambda **_: path.append(weights(trainer))))
    trainer.train()
    assert any(shifted) and len(path) == 6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["sam", "fsam", "sam_on"])
def test_activation_checkpointing_changes_nothing(name, reentrant, tmp_path, recwarn):
    def run(**settings):
        model = tiny_bert(dropout=0.1, float64=True)
        model.accepts_loss_kwargs = False
        return weights(train(SharpTrainer, model, text_rows(40), tmp_path, method=SETTINGS[name](), **settings))

    whole = run(gradient_accumulation_steps=2)
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = run(gradient_accumulation_steps=2, **settings)
    torch.testing.assert_close(checkpointed, whole, rtol=0, atol=1e-12)
    said = [str(w.message) for w in recwarn if "needs the full backward" in str(w.message)]
    assert len(said) == (name == "sam_on" and reentrant)


def test_the_note_at_the_start_says_which_pass_is_not_compiled(tmp_path):
    for method, said in (
        (mesa(), "MESA compares, its only one"),
        (tram(), "TRAM compares, its first one"),
        (sam(), ""),
    ):
        trainer = build(SharpTrainer, tiny_mlp(), mlp_rows(8), tmp_path, method=method)
        assert "torch_compile" not in trainer.describe_method()
        trainer.args.torch_compile = True
        assert said in trainer.describe_method() and ("torch_compile" in trainer.describe_method()) == bool(said)
