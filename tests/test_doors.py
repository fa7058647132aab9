"""The three doors: the same weights on the same batches for every method whose needs they provide."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from cases import METHODS
from hf_sharp import (
    MSAM,
    SAM,
    Linear,
    Perturbation,
    SharpOptimizer,
    SharpStep,
    SharpTrainer,
    asam,
    bi_lora,
    fsam,
    msam,
    sam,
    sam_on,
    tram,
    vasso,
)
from hf_sharp._integrations.refusals import refuse_accelerator
from models import batch_of, mlp_rows, text_rows, tiny_bert, tiny_mlp, windows_of
from references import flat
from training import build, train, weights

pytestmark = pytest.mark.fast

ROWS = mlp_rows(48)


def data(name):
    if not METHODS[name].visits:
        return ROWS
    return [{**ROWS[i % 8], "sample_index": torch.tensor(i % 8)} for i in range(len(ROWS))]


def loss_of(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "sample_index"})["loss"]


def momentum_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01)


def by_trainer(method, rows, accumulate, tmp_path, steps=5):
    model = tiny_mlp(seed=1)  # no dropout: the Trainer's data loader moves the random stream
    settings = {"max_steps": steps, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.3}
    settings |= {"lr_scheduler_type": "constant", "optimizers": (momentum_sgd(model), None), "method": method}
    return weights(train(SharpTrainer, model, rows, tmp_path, **settings))


def by_loop(method, rows, accumulate, steps=5, scaler=None, **settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = tiny_mlp(seed=1)
    optimizer = momentum_sgd(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    sharp = SharpStep(method, model, optimizer, accelerator, loss_of, total_steps=steps, warmup_steps=0, **settings)
    torch.manual_seed(42)
    model.train()
    for window in windows_of(rows, micro=4, accumulate=accumulate)[:steps]:
        for batch in window:
            with accelerator.accumulate(model):
                sharp.backward(batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
    return flat(model), sharp


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# ---- the loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_the_loop_gives_the_trainers_weights(name, accumulate, tmp_path):
    needs = set().union(*(part.needs for _, part in METHODS[name].method().named_parts()))
    if accumulate > 1 and needs & {"window", "terms"}:
        with pytest.raises(ValueError, match="one by one"):
            by_loop(METHODS[name].method(), data(name), accumulate)
        return
    ours, _ = by_loop(METHODS[name].method(), data(name), accumulate)
    theirs = by_trainer(METHODS[name].method(), data(name), accumulate, tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_loops_loss_and_metrics(tmp_path):
    _, sharp = by_loop(sam(0.1), ROWS, 2, measure_every=1)
    assert {"sharp_gap", "sharp_cos", "sharp_component"} <= set(sharp.metrics)
    assert sharp.metrics["sharp_evaluations"] == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = tiny_mlp(seed=1)
    prepared, optimizer = accelerator.prepare(model, momentum_sgd(model))
    batch = batch_of(ROWS[:4])
    loss = SharpStep(sam(0.1), prepared, optimizer, accelerator, loss_of).backward(batch)
    assert torch.equal(loss, loss_of(model.train(), batch).detach()) and not loss.requires_grad


@pytest.mark.parametrize("name", ["vasso", "fsam", "looksam", "tram_previous", "msam"])
def test_a_checkpointed_loop_goes_on_bitwise(name, tmp_path):
    def run(split):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        model = tiny_mlp(seed=1, dropout=0.2)
        model, optimizer = accelerator.prepare(model, momentum_sgd(model))
        sharp = SharpStep(METHODS[name].method(), model, optimizer, accelerator, loss_of, warmup_steps=0)
        accelerator.register_for_checkpointing(sharp)
        torch.manual_seed(3)
        for index, window in enumerate(windows_of(ROWS, micro=4, accumulate=1)[:8]):
            if index == 4 and split == "save":
                accelerator.save_state(str(tmp_path / "state"))
            if index < 4 and split == "load":
                continue
            if index == 4 and split == "load":
                accelerator.load_state(str(tmp_path / "state"))
            sharp.backward(window[0])
            optimizer.step()
            optimizer.zero_grad()
        return flat(model)

    assert torch.equal(run("save"), run("load"))


def test_what_cannot_be_right_is_refused():
    accelerator = Accelerator(cpu=True)
    model = tiny_mlp()
    plain = momentum_sgd(model)
    prepared, optimizer = accelerator.prepare(model, plain)
    with pytest.raises(ValueError, match="prepare returned"):
        SharpStep(sam(), prepared, plain, accelerator, loss_of)
    with pytest.raises(ValueError, match="a Method"):
        SharpStep("sam", prepared, optimizer, accelerator, loss_of)
    sharp = SharpStep(sam(), prepared, optimizer, accelerator, lambda model, batch: model(**batch))
    with pytest.raises(ValueError, match="one loss"):
        sharp.backward(batch_of(ROWS[:4]))
    with pytest.raises(ValueError, match="did not call the model"):
        SharpStep(
            tram(), prepared, optimizer, accelerator, lambda model, batch: torch.zeros((), requires_grad=True)
        ).backward(batch_of(ROWS[:4]))


def test_an_infinite_gradient_in_the_loop_skips_the_step(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = tiny_mlp(seed=1)
    prepared, optimizer = accelerator.prepare(model, momentum_sgd(model))
    assert optimizer.scaler is scaler
    method = vasso(0.1)
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = loss_of(model, batch)
        return value * torch.inf if len(calls) == 4 else value  # the second pass of the second step

    sharp = SharpStep(method, prepared, optimizer, accelerator, loss)
    path, states = [], []
    for window in windows_of(ROWS, micro=4, accumulate=1)[:3]:
        sharp.backward(window[0])
        optimizer.step()
        optimizer.zero_grad()
        path.append(flat(model))
        states.append(method.state_dict())
    assert torch.equal(path[1], path[0]) and not torch.equal(path[2], path[1])
    assert all(torch.equal(states[1][key], states[0][key]) for key in states[0])
    assert scaler.get_scale() == 2.0**9 and torch.isfinite(path[2]).all()


# ---- the optimizer ----------------------------------------------------------------------------------------------


def by_closure(method, steps=5, prepare=False, model_given=True):
    model = tiny_mlp(seed=1, dropout=0.2)
    optimizer = SharpOptimizer(momentum_sgd(model), method, model if model_given else None)
    assert isinstance(optimizer, torch.optim.Optimizer)
    used = optimizer
    if prepare:
        accelerator = Accelerator(cpu=True)
        model, used = accelerator.prepare(model, optimizer)
    torch.manual_seed(42)
    model.train()
    losses = []
    for window in windows_of(ROWS, micro=4, accumulate=1)[:steps]:

        def closure(batch=window[0]):
            used.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        losses.append(used.step(closure))
    return flat(model), optimizer, losses


@pytest.mark.parametrize("name", METHODS)
def test_the_optimizer_gives_the_loops_weights(name):
    needs = set().union(*(part.needs for _, part in METHODS[name].method().named_parts()))
    refusals = {"length": "number of training steps", "ranks": "per_rank=False", "": "A closure hides the data"}
    missing = {"warmup"} if name == "msam" else needs - {"names", "modules"}
    if missing:
        refusals["warmup"] = "length of the learning rate's warm-up"
        with pytest.raises(ValueError, match=refusals.get(min(missing), refusals[""])):
            SharpOptimizer(momentum_sgd(tiny_mlp()), METHODS[name].method(), tiny_mlp())
        return
    ours, *_ = by_closure(METHODS[name].method())
    model = tiny_mlp(seed=1, dropout=0.2)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    prepared, plain = accelerator.prepare(model, momentum_sgd(model))
    sharp = SharpStep(METHODS[name].method(), prepared, plain, accelerator, loss_of)
    torch.manual_seed(42)
    for window in windows_of(ROWS, micro=4, accumulate=1)[:5]:
        sharp.backward(window[0])
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(ours, flat(model), rtol=0, atol=1e-12)


def test_the_optimizer_passes_prepare():
    ours, *_ = by_closure(sam(0.1))
    prepared, *_ = by_closure(sam(0.1), prepare=True)
    assert torch.equal(ours, prepared)


def test_schedulers_and_groups_are_the_bases():
    model = tiny_mlp()
    base = momentum_sgd(model)
    optimizer = SharpOptimizer(base, sam())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    optimizer.step(lambda: loss_of(model, batch_of(ROWS[:4])).backward())
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.025
    extra = torch.nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [extra]})
    assert base.param_groups[1]["params"] == [extra]


def test_the_state_dict_keeps_moments_and_memory():
    model = tiny_mlp(seed=1)
    optimizer = SharpOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), vasso(0.1), model)

    def steps(optimizer, model, windows):
        for window in windows:

            def closure(batch=window[0]):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)

    windows = windows_of(ROWS, micro=4, accumulate=1)
    steps(optimizer, model, windows[:3])
    other = tiny_mlp(seed=2)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again = SharpOptimizer(torch.optim.AdamW(other.parameters(), lr=0.05), vasso(0.1), other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, model, windows[3:6])
    steps(again, other, windows[3:6])
    assert torch.equal(flat(model), flat(other))
    base = torch.optim.AdamW(other.parameters(), lr=0.05)
    again.load_state_dict(base.state_dict())  # a checkpoint from before this library
    assert again.state_dict()["sharp"] == {"step": 0, ":direction/": 0}


def test_a_step_without_a_closure_says_once_that_it_is_plain(recwarn):
    model = tiny_mlp(seed=1)
    optimizer = SharpOptimizer(momentum_sgd(model), sam())
    optimizer.step()  # as checkpoints do when they create state
    loss_of(model, batch_of(ROWS[:4])).backward()
    with pytest.warns(UserWarning, match="SAM had no part"):
        optimizer.step()
    optimizer.step()
    assert len(recwarn) == 0


def test_fp16_scaling_with_a_closure_is_refused():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = tiny_mlp(seed=1)
    model, optimizer = accelerator.prepare(model, SharpOptimizer(momentum_sgd(model), sam()))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch_of(ROWS[:4]))
        accelerator.backward(loss)
        return loss

    before = flat(model)
    accelerator.backward(loss_of(model, batch_of(ROWS[:4])))
    with pytest.raises(ValueError, match="fp16 gradient scaling"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


def test_names_are_asked_for_where_a_method_goes_by_them():
    model = tiny_mlp()
    for method in (sam_on(), fsam()):
        with pytest.raises(ValueError, match="Pass model="):
            SharpOptimizer(momentum_sgd(model), method)
    named = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    SharpOptimizer(named, asam())
    with pytest.raises(ValueError, match="before accelerator"):
        SharpOptimizer(Accelerator(cpu=True).prepare(momentum_sgd(model)), sam())


def test_autocast_around_a_closure_sees_the_shift():
    """Inside one autocast region casts of weights are cached; a shift must not read the old ones."""
    losses = []
    model = tiny_bert(dropout=0.0).train()
    batch = batch_of(text_rows(4))
    optimizer = SharpOptimizer(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), sam(5.0), model)

    def closure():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
    assert abs(losses[1] - losses[0]) > 1e-2


@pytest.mark.parametrize(
    ("method", "known", "message"),
    [
        (lambda: sam(0.1, start=0.5), {"warmup_steps": 2}, "After needs the number of training steps. Give it as tot"),
        (lambda: msam(), {"total_steps": 9}, "ZeroDuringWarmup needs the length of the learning .* Give it as warm"),
        (lambda: SAM(Perturbation(Linear(1.0, 0.0))), {}, "Linear needs the number of training steps. Give it as tot"),
    ],
)
def test_what_is_not_known_of_the_training_is_asked_for_before_it_begins(method, known, message):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(base := tiny_mlp(), momentum_sgd(base))
    with pytest.raises(ValueError, match=message):
        SharpStep(method(), model, optimizer, accelerator, loss_of, **known)
    with pytest.raises(ValueError, match=message):
        SharpOptimizer(momentum_sgd(base), method(), base)
    SharpStep(method(), model, optimizer, accelerator, loss_of, total_steps=9, warmup_steps=2)


def test_the_optimizer_refuses_an_ascent_for_each_rank():
    model = tiny_mlp()
    with pytest.raises(ValueError, match=r"SAM needs gradients before they are reduced over ranks\. Use SharpTrainer"):
        SharpOptimizer(momentum_sgd(model), sam(0.1, per_rank=True), model)


def test_the_optimizer_refuses_parameters_of_its_own_on_several_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = tiny_mlp()
    with pytest.raises(ValueError, match=r"BiLoRA needs a place in the optimizer .* cannot average their gradients"):
        SharpOptimizer(momentum_sgd(model), bi_lora(0.1), model)


def test_msam_works_with_a_radius_that_needs_no_schedule():
    ours, *_ = by_closure(MSAM(Perturbation(0.2)))
    plain, *_ = by_closure(METHODS["plain"].method())
    assert (ours - plain).abs().max() > 1e-4
    assert msam() != MSAM(Perturbation(0.2))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"])
def test_the_loop_refuses_by_name_what_it_cannot_do(kind):
    stand_in = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    with pytest.raises(ValueError, match=r"Use (DDP|FSDP2)"):
        refuse_accelerator(stand_in, sam())


def test_an_error_in_a_closure_leaves_nothing_behind():
    model = tiny_mlp(seed=1)
    before, calls = flat(model), []
    optimizer = SharpOptimizer(momentum_sgd(model), sam(0.1))

    def closure():
        loss_of(model, batch_of(ROWS[:4])).backward()
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before) and all(p.grad is None for p in model.parameters())


def test_a_name_or_a_preset_that_was_not_called_is_answered_with_what_to_write():
    model = tiny_mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, base)
    for method in ("sam", sam):
        with pytest.raises(ValueError, match=r"Call the preset, or .*build\(\)"):
            SharpOptimizer(base, method)
        with pytest.raises(ValueError, match=r"Call the preset, or .*build\(\)"):
            SharpStep(method, prepared, optimizer, accelerator, lambda m, batch: m(**batch)["loss"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copied_optimizer_goes_on_with_copied_parameters(copied):
    """As torch's own: together with the model it keeps hold of the model's parameters; alone it has copies."""

    def run(optimizer, model, windows):
        for window in windows:

            def closure(batch=window[0]):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)

    windows = windows_of(ROWS, micro=4, accumulate=1)
    for given in (True, False):
        model = tiny_mlp(seed=1)
        optimizer = SharpOptimizer(momentum_sgd(model), vasso(0.1), model if given else None)
        run(optimizer, model, windows[:3])
        twin, again = copied((model, optimizer))
        assert type(again) is SharpOptimizer and again.method == optimizer.method
        assert all(a is b for a, b in zip(again.param_groups[0]["params"], twin.parameters(), strict=True))
        before = flat(model)
        run(again, twin, windows[3:6])
        assert torch.equal(flat(model), before) and not torch.equal(flat(twin), before)
        run(optimizer, model, windows[3:6])
        assert torch.equal(flat(twin), flat(model))
        mine, theirs = optimizer.state_dict()["sharp"], again.state_dict()["sharp"]
        assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"] == 6
        alone = copied(optimizer)
        assert not {id(p) for p in alone.param_groups[0]["params"]} & {id(p) for p in model.parameters()}
        if given:
            run(alone, alone._host.model, windows[6:7])
            run(optimizer, model, windows[6:7])
            assert torch.equal(flat(alone._host.model), flat(model))


def test_an_optimizer_that_makes_its_own_passes_is_refused():
    model = tiny_mlp()
    with pytest.raises(ValueError, match="LBFGS calls the closure itself"):
        SharpOptimizer(torch.optim.LBFGS(model.parameters()), sam(), model)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="LBFGS calls the closure itself"):
        SharpStep(sam(), prepared, optimizer, accelerator, loss_of)


def test_the_trainer_refuses_it_before_any_step(tmp_path):
    model, calls = tiny_mlp(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="LBFGS calls the closure itself"):
        train(
            SharpTrainer, model, ROWS, tmp_path, method=sam(), optimizers=(torch.optim.LBFGS(model.parameters()), None)
        )
    assert not calls


def test_the_warning_of_a_step_without_a_closure_points_at_the_line_that_made_it():
    for wrap in ("no", "scheduler", "accelerate"):
        model = tiny_mlp(seed=1)
        optimizer = stepping = SharpOptimizer(momentum_sgd(model), sam())
        if wrap == "scheduler":  # it puts a function of its own around `step`
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        if wrap == "accelerate":
            stepping = Accelerator(cpu=True).prepare(optimizer)
        loss_of(model, batch_of(ROWS[:4])).backward()
        with pytest.warns(UserWarning, match="SAM had no part") as said:
            stepping.step()
        assert said[0].filename == __file__, wrap


class Turned(torch.nn.Module):
    """A complex weight, trained or not, and a real one."""

    def __init__(self, trained=True):
        super().__init__()
        self.turn = torch.nn.Parameter(torch.ones(6, dtype=torch.complex64), requires_grad=trained)
        self.real = torch.nn.Parameter(torch.ones(6))

    def forward(self, x=None, labels=None):
        return {"loss": ((x.float() * self.real) * self.turn).abs().square().mean()}


def test_complex_parameters_are_refused_by_name_when_built(tmp_path):
    accelerator = Accelerator(cpu=True)
    rows = [{"x": torch.ones(6), "labels": torch.tensor(0)} for _ in range(8)]

    def builds(trained):
        model = Turned(trained)
        trainable = [p for p in model.parameters() if p.requires_grad]
        base = torch.optim.SGD(trainable, lr=0.1)
        return [
            lambda: SharpOptimizer(base, sam(), model),
            lambda: SharpStep(sam(), *accelerator.prepare(model, base), accelerator, loss_of),
            lambda: build(SharpTrainer, model, rows, tmp_path, method=sam(), max_steps=2),
        ]

    for make in builds(trained=True):
        with pytest.raises(ValueError, match=r"'turn' is complex \(torch\.complex64\).*view_as_real"):
            make()
    *_, trainer = [make() for make in builds(trained=False)]
    trainer.train()
    assert trainer.state.global_step == 2
    optimizer = SharpOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), sam())
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]})


def test_clipping_in_mid_window_is_said_once_and_other_changes_are_refused():
    def loop(change):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny_mlp(seed=1)
        prepared, optimizer = accelerator.prepare(model, momentum_sgd(model))
        sharp = SharpStep(sam(0.05), prepared, optimizer, accelerator, loss_of)
        for batch in [b for window in windows_of(ROWS, micro=4, accumulate=2)[:2] for b in window]:
            with accelerator.accumulate(prepared):
                sharp.backward(batch)
                change(accelerator, prepared)
                optimizer.step()
                optimizer.zero_grad()

    with pytest.warns(UserWarning, match="clipped between two micro-batches") as said:
        loop(lambda accelerator, model: accelerator.clip_grad_norm_(model.parameters(), 0.1))
    assert len(said) == 1
    changes = {
        "all of them": lambda _, model: [p.grad.add_(1.0) for p in model.parameters()],
        "one of them": lambda _, model: model.hidden.weight.grad.add_(1.0),
        "one is dropped": lambda _, model: model.hidden.weight.grad.zero_(),
        "longer": lambda _, model: [p.grad.mul_(2.0) for p in model.parameters()],
    }
    for change in changes.values():
        with pytest.raises(RuntimeError, match="changed between two micro-batches"):
            loop(change)
