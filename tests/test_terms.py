"""A loss of named terms: batches that are dicts of batches, a method for each term."""

import pytest
import torch

import hf_sharp
import references
from hf_sharp import Plain, SharpTrainer, Sum, sam, vasso
from models import causal_rows, mlp_rows, tiny_llama, tiny_mlp
from references import functional, linear_decay, sgd, trajectory, window_gradient
from term_rows import SETTINGS, collate, pairs
from training import Recorder, Tripwire, build, train, weights

BOTH = {"forget": 0.5, "retain": 2.0}


def run(method, tmp_path, model=None, rows=None, **settings):
    model = tiny_mlp(seed=1) if model is None else model
    rows = pairs(40) if rows is None else rows
    return train(SharpTrainer, model, rows, tmp_path, method=method, **SETTINGS, **settings)


def dense(grad_forget, grad_retain, rows, steps=5, accumulate=2):
    """The float64 trajectory of 0.5 rule(forget) + 2 rule(retain), SGD with momentum."""
    model = tiny_mlp(seed=1)
    w, layout, loss_fn = functional(model)
    states = ({}, {})

    def rule(grad_fn, w, layout, state, step):
        window = windows[step]
        parts = [[batch[term] for batch in window] for term in BOTH]
        terms = [
            each(lambda v, part=part: window_gradient(loss_fn, v, part), w, layout, kept, step)
            for each, part, kept in zip((grad_forget, grad_retain), parts, states, strict=True)
        ]
        return sum(weight * g for weight, g in zip(BOTH.values(), terms, strict=True))

    windows = [
        [collate(rows[at : at + 4]) for at in range(start, start + 4 * accumulate, 4)]
        for start in range(0, steps * 4 * accumulate, 4 * accumulate)
    ]
    optimizer = sgd(0.05, momentum=0.9)
    lr = linear_decay(steps)
    return trajectory(rule, loss_fn, w, windows, optimizer, steps, layout=layout, max_norm=1.0, lr_factor=lr)


def momentum_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def test_each_term_follows_its_own_method(tmp_path):
    def smooth(*args):
        return references.sam(*args, rho=0.1)

    model = tiny_mlp(seed=1)
    method = Sum(forget=sam(0.1), retain=Plain(), weights=BOTH)
    path = []
    settings = {"optimizers": (momentum_sgd(model), None), "gradient_accumulation_steps": 2}
    look = Recorder(lambda state, model, **_: path.append(references.flat(model)))
    run(method, tmp_path, model, callbacks=[look], **settings)
    for ours, theirs in zip(path, dense(smooth, references.plain, pairs(40)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    plain = dense(references.plain, references.plain, pairs(40))
    assert (path[-1] - plain[-1]).abs().max() > 1e-4


def test_plain_terms_are_one_joint_backward(tmp_path):
    class Joint(torch.nn.Module):
        accepts_loss_kwargs = False

        def __init__(self):
            super().__init__()
            self.inner = tiny_mlp(seed=1)

        def forward(self, forget, retain):
            terms = [self.inner(**part)["loss"] for part in (forget, retain)]
            return {"loss": 0.5 * terms[0] + 2.0 * terms[1]}

    settings = {"gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    ours = run(Sum(forget=Plain(), retain=Plain(), weights=BOTH), tmp_path, **settings)
    theirs = train(SharpTrainer, Joint(), pairs(40), tmp_path, method=None, **SETTINGS, **settings)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-12)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_windows_agree_with_ragged_tokens(tmp_path):
    """Each term is normalised over its own tokens in the window, however it is cut."""
    runs = []
    for micro, accumulate in ((4, 1), (2, 2), (1, 4)):
        model, rows = tiny_llama(dropout=0.0), pairs(24, causal_rows, ragged=True)
        rows[0]["retain"]["labels"][:5] = -100
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "max_steps": 3}
        runs.append(weights(run(Sum(forget=sam(0.05), retain=Plain()), tmp_path, model, rows, optim="sgd", **sizes)))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=2e-6)  # float32


def test_passes_metrics_and_state_of_terms(tmp_path):
    model = tiny_mlp(seed=1, dropout=0.2)
    wire = Tripwire(model)
    method = Sum(forget=vasso(0.05, theta=0.5), retain=Plain())
    trainer = run(method, tmp_path, model, max_steps=3, gradient_accumulation_steps=2)
    assert wire.count == 3 * 2 * (2 + 1) and method.cost == 1.5
    last = trainer.state.log_history[-2]
    assert last["sharp_evaluations"] == 1.5 and last["sharp_gap_forget"] != 0 and "sharp_gap_retain" not in last
    assert {key.split("/")[0] for key in method.state_dict()} == {"forget:direction"}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}

    def make():
        return Sum(forget=vasso(0.05, theta=0.5), retain=Plain())

    whole = run(make(), tmp_path, tiny_mlp(dropout=0.3), **settings)
    own = {"method": make(), **SETTINGS, **settings}
    again = build(SharpTrainer, tiny_mlp(dropout=0.3), pairs(40), tmp_path, **own)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(again), weights(whole))


def test_an_error_in_a_terms_second_pass_leaves_nothing_behind(tmp_path):
    model = tiny_mlp(seed=1)
    before = references.flat(model)
    own = {"method": Sum(forget=sam(0.1), retain=Plain()), **SETTINGS}
    trainer = build(SharpTrainer, model, pairs(40), tmp_path, **own)
    wire = Tripwire(model, at=3, error=ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        trainer.train()
    assert not torch.equal(wire.shifted, before) and torch.equal(references.flat(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_without_the_term_is_named(tmp_path):
    with pytest.raises(ValueError, match="no term 'retain' in this batch, which has x, labels"):
        train(SharpTrainer, tiny_mlp(), mlp_rows(8), tmp_path, method=Sum(retain=Plain()))


def test_the_repr_round_trips():
    method = Sum(forget=sam(0.1), retain=Plain(), weights={"retain": 2.0})
    assert eval(repr(method), vars(hf_sharp)) == method
