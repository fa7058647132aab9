"""Two processes over gloo do what one process does on the same rows."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from cases import METHODS
from hf_sharp import SAM, Perturbation, SharpOptimizer, SharpStep, SharpTrainer, VaSSO, fsam, vasso
from models import mlp_rows, tiny_mlp, windows_of
from ranks import results_of
from references import flat, functional, sgd, window_gradient
from training import train, weights


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return results_of("two_ranks.py", 2, tmp_path_factory.mktemp("ddp"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_are_one_process(name, two_ranks, tmp_path):
    if METHODS[name].visits:
        assert "Use MESA" in two_ranks[name]["refused"]
        return
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one = train(SharpTrainer, tiny_mlp(), mlp_rows(40), tmp_path, method=METHODS[name].method(), **sizes)
    torch.testing.assert_close(two_ranks[name]["weights"], weights(one), rtol=0, atol=1e-12)
    assert two_ranks[name]["spread"] == 0
    gaps = [line["sharp_gap"] for line in one.state.log_history if "sharp_gap" in line]
    assert two_ranks[name]["gaps"] == pytest.approx(gaps, rel=1e-6)


@pytest.mark.distributed
def test_the_per_sample_mask_is_the_same_on_both_ranks(two_ranks):
    assert two_ranks["per_sample"]["spread"] == 0


@pytest.mark.distributed
def test_a_loop_on_two_ranks_is_one_process(two_ranks):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_mlp()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    sharp = SharpStep(vasso(0.1), prepared, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    for window in windows_of(mlp_rows(40), micro=4, accumulate=2):
        for batch in window:
            with accelerator.accumulate(prepared):
                sharp.backward(batch)
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(two_ranks["loop"]["weights"], flat(model), rtol=0, atol=1e-12)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.distributed
def test_a_closure_on_two_ranks_is_one_process(two_ranks):
    model = tiny_mlp()
    optimizer = SharpOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), vasso(0.1), model)
    for window in windows_of(mlp_rows(40), micro=8, accumulate=1):

        def closure(batch=window[0]):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(two_ranks["closure"]["weights"], flat(model), rtol=0, atol=1e-12)


@pytest.mark.distributed
def test_an_ascent_for_each_rank_is_the_mean_of_their_sam_gradients(two_ranks):
    """The reference: SAM on each rank's rows by itself, the gradients averaged, momentum SGD."""
    w, _, loss_fn = functional(tiny_mlp())
    update, memory = sgd(0.05, momentum=0.9), {}
    for window in windows_of(mlp_rows(40), micro=4, accumulate=2):
        grads = []
        for rank in range(2):
            own = [{key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()} for batch in window]
            g = window_gradient(loss_fn, w, own)
            grads.append(window_gradient(loss_fn, w + 0.1 * g / g.norm(), own))
        w = update(w, (grads[0] + grads[1]) / 2, memory)
    torch.testing.assert_close(two_ranks["per_rank"]["weights"], w, rtol=0, atol=1e-12)


@pytest.mark.distributed
def test_an_ascent_for_each_rank_reduces_nothing(two_ranks):
    counts = two_ranks["reductions"]
    assert counts["per_rank"] == counts["plain"] > 0 and counts["sam"] == 2 * counts["plain"]


def test_a_memory_that_would_differ_is_refused():
    for make in (lambda: SAM(fsam().perturbation, per_rank=True), lambda: VaSSO(Perturbation(0.1), per_rank=True)):
        with pytest.raises(ValueError, match="from rank to rank"):
            make()
