"""Every method, every promise of the contract, through the Trainer. There is no exception list."""

import itertools

import pytest
import torch
from transformers import Trainer

import hf_sharp
from cases import METHODS, MOVING, rows_for
from grad_scaler import Scaled
from hf_sharp import Landscape, SharpTrainer
from models import mean_bert, mlp_rows, text_rows, tiny_mlp, windows_of
from references import adamw, entrywise, functional, linear_decay, sgd, trajectory
from training import Recorder, Tripwire, build, exact_logs, same_state, train, weights

every_method = pytest.mark.parametrize("name", METHODS)
every_moving = pytest.mark.parametrize("name", MOVING)


# 1 ---- weights are restored bitwise, also when a pass raises


class Probe:
    """What every forward pass of a run saw: its step, and whether the weights were those of the step's beginning."""

    def __init__(self, trainer):
        self.trainer, self.passes, self.path, self.states = trainer, [], [weights(trainer)], [{}]
        trainer.model.register_forward_pre_hook(self.look)
        trainer.add_callback(Recorder(self.note))

    def look(self, *_):
        self.passes.append((len(self.path) - 1, not torch.equal(weights(self.trainer), self.path[-1])))

    def note(self, **_):
        self.path.append(weights(self.trainer))
        self.states.append(self.trainer.method.state_dict())


@every_moving
@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), ValueError("broken"), RuntimeError("CUDA out of memory.")],
    ids=["ctrl-c", "error", "oom"],
)
def test_an_exception_in_a_shifted_pass_leaves_nothing_behind(name, error, tmp_path):
    probe = probed(name, tmp_path)
    first = next(step for step, moved in probe.passes if moved)
    at = max(index for index, seen in enumerate(probe.passes) if seen == (first, True))
    trainer = four_steps(name, tmp_path)
    model = trainer.model
    pointers = [p.data_ptr() for p in model.parameters()]
    wire = Tripwire(model, at=at + 1, error=error)
    with pytest.raises(type(error)):
        trainer.train()
    assert not torch.equal(wire.shifted, probe.path[first])  # the weights were shifted when it happened
    assert torch.equal(weights(trainer), probe.path[first])
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None for p in model.parameters())
    assert same_state(trainer.method.state_dict(), probe.states[first])


def four_steps(name, folder):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    method, rows = METHODS[name].method(), rows_for(name, mlp_rows(40))
    return build(SharpTrainer, tiny_mlp(dropout=0.3), rows, folder, method=method, **settings)


def probed(name, folder, known={}):  # noqa: B006  one undisturbed training for all errors
    if name not in known:
        known[name] = Probe(four_steps(name, folder))
        known[name].trainer.train()
    return known[name]


# 2 ---- a radius of zero is plain training, and plain training is the host's


@every_method
@pytest.mark.parametrize("accumulate, logging_steps", list(itertools.product((1, 4), (1, 5))))
def test_strength_zero_is_the_trainer_bitwise(name, accumulate, logging_steps, tmp_path):
    w, stream, logs = of_six_steps(name, accumulate, logging_steps, tmp_path)
    options = {"method": METHODS[name].method(0.0)}
    our_w, our_stream, our_logs = six_steps(
        SharpTrainer, rows_for(name, text_rows(64)), accumulate, logging_steps, tmp_path, **options
    )
    assert torch.equal(our_w, w) and torch.equal(our_stream, stream) and our_logs == logs


def six_steps(cls, rows, accumulate, logging_steps, folder, **options):
    steps = {"gradient_accumulation_steps": accumulate, "logging_steps": logging_steps, "max_steps": 6}
    trainer = train(cls, mean_bert(), rows, folder, per_device_train_batch_size=2, **steps, **options)
    return weights(trainer), torch.get_rng_state(), exact_logs(trainer)


def of_six_steps(name, accumulate, logging_steps, folder, known={}):  # noqa: B006  one baseline for all methods
    key = (METHODS[name].visits, accumulate, logging_steps)
    if key not in known:
        known[key] = six_steps(Trainer, rows_for(name, text_rows(64)), accumulate, logging_steps, folder)
    return known[key]


@pytest.mark.parametrize(
    "settings", [{"optim": "sgd"}, {"bf16": True}, {"max_grad_norm": 0.0}], ids=["sgd", "bf16", "no clip"]
)
@pytest.mark.parametrize("method", [None, METHODS["sam"].method(0.0)], ids=["none", "sam"])
def test_the_host_keeps_its_optimizer_precision_and_clipping(settings, method, tmp_path):
    results = []
    for cls, options in ((Trainer, {}), (SharpTrainer, {"method": method})):
        trainer = train(
            cls, mean_bert(), text_rows(32), tmp_path, gradient_accumulation_steps=2, **settings, **options
        )
        results.append((weights(trainer), torch.get_rng_state(), exact_logs(trainer)))
    (w, stream, logs), (our_w, our_stream, our_logs) = results
    assert torch.equal(our_w, w) and torch.equal(our_stream, stream) and our_logs == logs


# 3 ---- the reference's trajectory


def optimizer_and_reference(kind, groups, model, layout):
    decayed = [p for n, p in model.named_parameters() if "bias" not in n]
    others = [p for n, p in model.named_parameters() if "bias" in n]
    lists = [{"params": [*decayed, *others], "weight_decay": 0.1, "lr": 0.05}]
    lr, decay = 0.05, 0.1
    if groups == 2:
        lists = [
            {"params": decayed, "weight_decay": 0.1, "lr": 0.05},
            {"params": others, "weight_decay": 0.0, "lr": 0.02},
        ]
        lr = entrywise(layout, lambda name: 0.02 if "bias" in name else 0.05)
        decay = entrywise(layout, lambda name: 0.0 if "bias" in name else 0.1)
    if kind == "sgd":
        return torch.optim.SGD(lists, momentum=0.9), sgd(lr, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(lists), adamw(lr, weight_decay=decay)


@every_method
@pytest.mark.parametrize(
    "kind, groups", [pytest.param("sgd", 1, marks=pytest.mark.fast), ("sgd", 2), ("adamw", 1), ("adamw", 2)]
)
def test_five_steps_are_the_references(name, kind, groups, tmp_path):
    case, model, rows = METHODS[name], tiny_mlp(seed=1), rows_for(name, mlp_rows(40))
    w0, layout, loss_of = functional(model)

    def loss_fn(w, batch):
        return loss_of(w, {key: value for key, value in batch.items() if key != "sample_index"})

    optimizer, reference = optimizer_and_reference(kind, groups, model, layout)
    path = []
    train(
        SharpTrainer,
        model,
        rows,
        tmp_path,
        method=case.method(),
        optimizers=(optimizer, None),
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        callbacks=[
            Recorder(
                lambda state, model, **_: path.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
            )
        ],
    )
    expected = trajectory(
        case.rule,
        loss_fn,
        w0,
        windows_of(rows, micro=4, accumulate=2),
        reference,
        5,
        layout=layout,
        max_norm=0.5,
        lr_factor=linear_decay(5),
        **case.settings,
    )
    assert len(path) == 5
    for ours, theirs in zip(path, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=case.tolerance)
    plain = trajectory_of_plain((case.visits, kind, groups), loss_fn, w0, rows, reference, layout)
    assert (expected[-1] - plain).abs().max() > 1e-4 or name == "plain"


def trajectory_of_plain(key, loss_fn, w0, rows, optimizer, layout, known={}):  # noqa: B006  one for all methods
    if key not in known:
        settings = {"layout": layout, "max_norm": 0.5, "lr_factor": linear_decay(5)}
        path = trajectory(METHODS["plain"].rule, loss_fn, w0, windows_of(rows, 4, 2), optimizer, 5, **settings)
        known[key] = path[-1]
    return known[key]


# 4 ---- the loss scale does not matter


def scaled_run(name, scale, tmp_path, **hooks):
    model = tiny_mlp(seed=1)
    settings = {"method": METHODS[name].method(), "optimizers": (momentum_sgd(model), None), **hooks}
    trainer = build(SharpTrainer, model, rows_for(name, mlp_rows(40)), tmp_path, **settings)
    scaler = Scaled(scale)(trainer)
    trainer.train()
    return trainer, scaler


def momentum_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


@every_method
def test_the_loss_scale_does_not_change_the_trajectory(name, tmp_path):
    one, _ = scaled_run(name, 1.0, tmp_path)
    many, scaler = scaled_run(name, 2.0**16, tmp_path)
    model = tiny_mlp(seed=1)
    settings = {"method": METHODS[name].method(), "optimizers": (momentum_sgd(model), None)}
    unscaled = train(SharpTrainer, model, rows_for(name, mlp_rows(40)), tmp_path, **settings)
    assert scaler.get_scale() == 2.0**16
    torch.testing.assert_close(weights(many), weights(one), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights(many), weights(unscaled), rtol=0, atol=1e-12)
    start = torch.cat([p.detach().reshape(-1) for p in tiny_mlp(seed=1).parameters()])
    assert (weights(many) - start).abs().max() > 1e-3


# 5 ---- how a window is cut into micro-batches does not matter


@every_method
def test_windows_of_8x1_4x2_and_2x4_agree(name, tmp_path):
    runs = []
    for micro, accumulate in ((8, 1), (4, 2), (2, 4)):
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
        runs.append(
            weights(
                train(
                    SharpTrainer,
                    tiny_mlp(),
                    rows_for(name, mlp_rows(40)),
                    tmp_path,
                    method=METHODS[name].method(),
                    **sizes,
                )
            )
        )
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-12)


# 6 ---- kill and resume in the middle of an epoch


@every_method
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(name, tmp_path):
    settings = {"max_steps": 8, "gradient_accumulation_steps": 2, "save_steps": 3, "save_strategy": "steps"}
    settings |= {"train_sampling_strategy": "random", "per_device_train_batch_size": 2}
    whole = train(
        SharpTrainer,
        mean_bert(),
        rows_for(name, text_rows(24)),
        tmp_path / "a",
        method=METHODS[name].method(),
        **settings,
    )
    torch.manual_seed(99)
    again = build(
        SharpTrainer,
        mean_bert(),
        rows_for(name, text_rows(24)),
        tmp_path / "a",
        method=METHODS[name].method(),
        **settings,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(weights(again), weights(whole))
    assert same_state(again.method.state_dict(), whole.method.state_dict())
    assert exact_logs(again)[-2] == exact_logs(whole)[-2]


# 7 ---- the declared cost is the real one


@every_method
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.fast), 4])
def test_passes_are_what_the_cost_declares(name, accumulate, tmp_path):
    model, case, passes = tiny_mlp(), METHODS[name], []

    def count(module, inputs, keywords):
        share = len(keywords["x"]) / 4  # rows of the micro-batch
        passes.append(share if torch.is_grad_enabled() else share / 3)

    model.register_forward_pre_hook(count, with_kwargs=True)
    settings = {"max_steps": case.steps, "gradient_accumulation_steps": accumulate}
    trainer = train(SharpTrainer, model, rows_for(name, mlp_rows(80)), tmp_path, method=case.method(), **settings)
    made = sum(passes) / accumulate / case.steps
    assert made == pytest.approx(trainer.method.cost, rel=1e-9, abs=case.spread)
    logged = [line["sharp_evaluations"] for line in trainer.state.log_history if "sharp_evaluations" in line]
    assert len(logged) == case.steps and sum(logged) / case.steps == pytest.approx(made, rel=1e-9)


@every_method
def test_what_moves_is_what_the_start_announces(name, tmp_path, monkeypatch):
    shifted, moved = Landscape.shifted, set()

    def watched(landscape, shift):
        epsilon = getattr(shift, "epsilon", shift)
        pairs = zip(landscape.facts.names, epsilon.tensors, strict=True)
        moved.update(n for n, e in pairs if e is not None and e.ne(0).any())
        return shifted(landscape, shift)

    monkeypatch.setattr(Landscape, "shifted", watched)
    trainer = train(SharpTrainer, tiny_mlp(), rows_for(name, mlp_rows(40)), tmp_path, method=METHODS[name].method())
    assert moved == set(trainer.method.perturbed(Landscape(trainer._sharp_host)))
    assert bool(moved) == METHODS[name].moves


# 8 ---- what the loss does not use stays untouched, buffers move once


@every_method
def test_frozen_and_unused_parameters_keep_no_gradient(name, tmp_path):
    model = tiny_mlp(unused=True)
    model.embed.weight.requires_grad_(False)
    frozen, seen = model.embed.weight.clone(), []

    def look(state, model, **_):
        seen.append({n for n, p in model.named_parameters() if p.grad is None})

    train(
        SharpTrainer,
        model,
        rows_for(name, mlp_rows(40)),
        tmp_path,
        method=METHODS[name].method(),
        callbacks=[Recorder(before=look)],
    )
    assert seen == [{"embed.weight", "spare.weight"}] * 5
    assert torch.equal(model.embed.weight, frozen)


@every_method
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_moves_once_with_the_hosts_own_pass(name, momentum, tmp_path):
    """Its statistics are those of three passes, one a micro-batch, at the weights and draws that the host's had."""

    def fresh():
        model = tiny_mlp(norm="batch", dropout=0.2)
        model.norm.momentum = momentum
        return model

    model, seen = fresh(), []

    def look(module, inputs, keywords):
        if torch.is_grad_enabled():
            seen.append((weights_of(model), torch.get_rng_state(), dict(keywords)))

    model.register_forward_pre_hook(look, with_kwargs=True)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 3, "learning_rate": 0.0}
    train(SharpTrainer, model, rows_for(name, mlp_rows(12)), tmp_path, method=METHODS[name].method(), **settings)
    assert model.norm.num_batches_tracked == 3

    def replayed(passes):
        again = fresh().train()
        for values, draws, batch in passes:
            torch.nn.utils.vector_to_parameters(values, again.parameters())
            torch.set_rng_state(draws)
            again(**batch)
        return dict(again.named_buffers())

    windows = [replayed(seen[at : at + 3]) for at in range(len(seen) - 2)]
    mine = dict(model.named_buffers())
    assert any(all(torch.equal(mine[k], theirs[k]) for k in mine) for theirs in windows)
    if not name.startswith(("randomized", "sam_fraction")):  # these shift the host's own pass
        assert all(torch.equal(mine[k], windows[0][k]) for k in mine)


def weights_of(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# 9 ---- zero and infinite gradients


@every_method
def test_a_zero_gradient_gives_no_nan(name, tmp_path):
    model = tiny_mlp()

    def nothing(outputs, labels, num_items_in_batch=None):
        return 0.0 * outputs["logits"].sum()

    trainer = train(
        SharpTrainer,
        model,
        rows_for(name, mlp_rows(40)),
        tmp_path,
        method=METHODS[name].method(),
        compute_loss_func=nothing,
    )
    assert torch.isfinite(weights(trainer)).all()
    values = [v for line in trainer.state.log_history for k, v in line.items() if k.startswith("sharp_")]
    assert all(value == value for value in values)


@every_method
@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_an_infinite_gradient_in_any_pass_skips_the_step_and_loses_nothing(name, which, tmp_path):
    which = min(which, passes_in_two_steps(name, tmp_path))
    model, calls, when = tiny_mlp(seed=1), [], []
    settings = {"method": METHODS[name].method(), "optimizers": (momentum_sgd(model), None), "max_steps": 2}
    trainer = build(SharpTrainer, model, rows_for(name, mlp_rows(40)), tmp_path, **settings)
    scaler = Scaled(2.0**10)(trainer)

    def explode(outputs, labels, num_items_in_batch=None):
        calls.append(1)
        loss = torch.nn.functional.cross_entropy(outputs["logits"], labels)
        if len(calls) == which:
            when.append(len(path))
            handle = model.norm.weight.register_hook(lambda grad: (handle.remove(), grad * torch.inf)[1])
        return loss

    trainer.compute_loss_func = explode
    states, path = [], []

    def look(state, model, **_):
        states.append(trainer.method.state_dict())
        path.append(weights(trainer))

    trainer.add_callback(Recorder(look))
    start = weights(trainer)
    trainer.train()
    step = when[0]
    before = [start, path[0]][step]
    assert torch.equal(path[step], before)  # the step was skipped
    assert torch.isfinite(weights(trainer)).all() and not torch.equal(path[1 - step], [start, path[0]][1 - step])
    assert scaler.get_scale() == 2.0**9  # the scaler saw it, once
    previous = {} if step == 0 else states[0]
    assert same_state(states[step], previous)


def passes_in_two_steps(name, folder, known={}):  # noqa: B006  counted once a method
    if name in known:
        return known[name]
    calls = []

    def count(outputs, labels, num_items_in_batch=None):
        calls.append(1)
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    model = tiny_mlp(seed=1)
    settings = {"method": METHODS[name].method(), "compute_loss_func": count, "max_steps": 2}
    train(
        SharpTrainer, model, rows_for(name, mlp_rows(40)), folder, optimizers=(momentum_sgd(model), None), **settings
    )
    known[name] = len(calls)
    return known[name]


# 10 ---- a method is what its repr says


@pytest.mark.fast
@every_method
def test_the_repr_round_trips(name):
    method = METHODS[name].method()
    assert eval(repr(method), vars(hf_sharp)) == method
