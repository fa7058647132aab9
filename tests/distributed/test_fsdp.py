"""Two processes with sharded parameters (FSDP2 over gloo) do what one process does with whole ones."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from cases import METHODS
from hf_sharp import SharpOptimizer, SharpStep, SharpTrainer, Sum, plain, sam
from models import mlp_rows, tiny_mlp, windows_of
from ranks import results_of
from references import flat
from term_rows import SETTINGS, pairs
from training import train, weights

SIZES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
RESUMED = ("fsam", "looksam", "friendly_sam", "tram_previous")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return results_of("sharded_ranks.py", 2, tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return results_of("hybrid_ranks.py", 4, tmp_path_factory.mktemp("hsdp"))


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_sharded_is_whole(name, sharded, tmp_path):
    if METHODS[name].visits:
        assert "Use MESA" in sharded[name]["refused"]
        return
    one = train(SharpTrainer, tiny_mlp(), mlp_rows(40), tmp_path, method=METHODS[name].method(), **SIZES)
    same(sharded[name]["weights"], weights(one))
    gaps = [line["sharp_gap"] for line in one.state.log_history if "sharp_gap" in line]
    assert sharded[name]["gaps"] == pytest.approx(gaps, rel=1e-6)


@pytest.mark.parametrize("name", ["sam", "tram_previous", "looksam"])
def test_gathered_weights_are_never_stale(name, sharded):
    same(sharded["gathered"][name], sharded[name]["weights"])


def test_an_evaluation_between_steps_changes_nothing(sharded, tmp_path):
    one = train(SharpTrainer, tiny_mlp(), mlp_rows(40), tmp_path, method=sam(0.1), **SIZES)
    same(sharded["evaluated"], weights(one))


@pytest.mark.parametrize("name", RESUMED)
def test_state_is_saved_whole_and_sharded_again(name, sharded, tmp_path):
    settings = {**SIZES, "optim": "sgd", "optim_args": "momentum=0.9"}
    one = train(SharpTrainer, tiny_mlp(), mlp_rows(40), tmp_path, method=METHODS[name].method(), **settings)
    same(sharded["resumed"][name], weights(one))


def test_terms_keep_their_gradients_apart(sharded, tmp_path):
    terms = Sum(forget=sam(0.1), retain=plain(), weights={"retain": 2.0})
    one = train(SharpTrainer, tiny_mlp(), pairs(40), tmp_path, method=terms, **SIZES, **SETTINGS)
    same(sharded["terms"], weights(one))


def test_a_loop_with_shards_is_one_process(sharded):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_mlp()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    sharp = SharpStep(sam(0.1), prepared, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    for window in windows_of(mlp_rows(40), micro=4, accumulate=2):
        for batch in window:
            with accelerator.accumulate(prepared):
                sharp.backward(batch)
                optimizer.step()
                optimizer.zero_grad()
    same(sharded["loop"], flat(model))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_what_no_shard_can_give_is_refused_before_training(sharded):
    assert "per_rank=False" in sharded["refused"]["per_rank"]
    assert "fisher='batch'" in sharded["refused"]["per_sample"]


@pytest.mark.parametrize("name", ["sam", "asam", "fsam", "gsam", "looksam", "randomized_smoothing"])
def test_shards_with_copies_are_whole_through_a_closure(name, hybrid):
    model = tiny_mlp()
    optimizer = SharpOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), METHODS[name].method(), model
    )
    for (batch,) in windows_of(mlp_rows(20), micro=4, accumulate=1):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            return loss

        optimizer.step(closure)
    same(hybrid[name], flat(model))
    assert hybrid["spread"] == 0


def test_what_a_forward_sees_of_shards_is_measured(sharded):
    """float32 shards hold the shift to 1e-6 of it; gathered in bf16, it is there on average, with rounding noise."""
    assert sharded["bf16"]["sharp_component"] == pytest.approx(1, abs=0.02)
    assert sharded["bf16"]["sharp_noise"] > 0.1
