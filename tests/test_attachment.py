"""What a method may have in the optimizer, in each integration: its own parameters, and a call before each update."""

import copy
import itertools
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from grad_scaler import Scaled
from hf_sharp import Every, FirstPass, Method, Plain, SharpOptimizer, SharpStep, SharpTrainer, Sum, sam
from models import mlp_rows, tiny_mlp, windows_of
from references import flat
from training import Recorder, arguments, build, train, weights

ROWS = mlp_rows(48)
WINDOWS = windows_of(ROWS, micro=4, accumulate=1)
START = torch.tensor([0.25, 0.0, -0.5], dtype=torch.float64)


@dataclass(frozen=True)
class Offset(Method):
    """Ascends by an offset of its own to the logits, shrinks the head before each update and moves it after."""

    ahead = True
    needs = frozenset({"modules", "names", "parameters", "update"})
    cost = 1.0

    def adds(self, landscape):
        return {"offset": START}

    def plan_first_pass(self, landscape):
        @contextmanager
        def moved():
            hook = landscape.modules["head"].register_forward_hook(
                lambda m, i, out: out + landscape.facts.added["offset"]
            )
            try:
                yield
            finally:
                hook.remove()

        return FirstPass(within=moved)

    def gradient(self, landscape):
        here = landscape.evaluate()
        landscape.facts.added["offset"].grad.neg_()
        head = landscape.weights.tensors[landscape.facts.names.index("head.weight")]
        return here.with_update(lambda: head.mul_(0.9), lambda: head.add_(0.01))


def by_hand(steps=5):
    """The same written out, one micro-batch a step."""
    model, path = tiny_mlp(seed=1), []
    offset = torch.nn.Parameter(START.clone())
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}, {"params": [offset], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    for window in WINDOWS[:steps]:
        optimizer.zero_grad()
        logits = model(window[0]["x"])["logits"] + offset
        torch.nn.functional.cross_entropy(logits, window[0]["labels"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        offset.grad.neg_()
        with torch.no_grad():
            model.head.weight.mul_(0.9)
        optimizer.step()
        with torch.no_grad():
            model.head.weight.add_(0.01)
        path.append((flat(model), offset.detach().clone(), float(norm)))
    return path


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def trainer_of(folder, model=None, **others):
    model = tiny_mlp(seed=1) if model is None else model
    settings = {"optimizers": (adam(model), None), "lr_scheduler_type": "constant", "max_grad_norm": 0.3}
    return build(SharpTrainer, model, ROWS, folder, **{"method": Offset(), **settings, **others})


def own(integration):
    return integration._attachment.parameters["offset"].detach().clone()


def own_of(trainer):
    return trainer._sharp_attachment.parameters["offset"].detach().clone()


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_trainer_updates_both_and_clips_the_model_alone(tmp_path):
    trainer, path = trainer_of(tmp_path), []
    trainer.add_callback(Recorder(lambda **_: path.append((weights(trainer), own_of(trainer)))))
    trainer.train()
    for (w, offset), (their_w, their_offset, _) in zip(path, by_hand(), strict=True):
        torch.testing.assert_close(w, their_w, rtol=0, atol=1e-12)
        torch.testing.assert_close(offset, their_offset, rtol=0, atol=1e-12)
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert logged == pytest.approx([norm for *_, norm in by_hand()], rel=1e-9)
    assert (path[-1][1] - START).abs().max() > 0.1


def test_the_loop_and_the_optimizer_do_the_same():
    def loss_of(model, batch):
        return model(**batch)["loss"]

    accelerator = Accelerator(cpu=True)
    model = tiny_mlp(seed=1)
    prepared, optimizer = accelerator.prepare(model, adam(model))
    sharp = SharpStep(Offset(), prepared, optimizer, accelerator, loss_of)
    closed = tiny_mlp(seed=1)
    closing = SharpOptimizer(adam(closed), Offset(), closed)
    for window in WINDOWS[:5]:
        sharp.backward(window[0])
        accelerator.clip_grad_norm_(prepared.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()

        def closure(batch=window[0]):
            closing.zero_grad()
            loss = loss_of(closed, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(closed.parameters(), 0.3)
            return loss

        closing.step(closure)
    expected, offset, _ = by_hand()[-1]
    for ours, integration in ((flat(model), sharp), (flat(closed), closing)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(own(integration), offset, rtol=0, atol=1e-12)


def test_the_model_and_what_is_saved_of_it_know_nothing(tmp_path):
    trainer = trainer_of(tmp_path)
    names, hooks = list(trainer.model.state_dict()), len(trainer.model.head._forward_hooks)
    trainer.train()
    assert list(trainer.model.state_dict()) == names and len(trainer.model.head._forward_hooks) == hooks == 0
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_a_skipped_update_moves_nothing(tmp_path):
    for fused in (False, True):
        model = tiny_mlp(seed=1)
        optimizers = (torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused), None)
        trainer = trainer_of(tmp_path, model, max_steps=2, optimizers=optimizers)
        scaler, path = Scaled(2.0**10)(trainer), [(weights(trainer), START)]

        def explode(module, inputs, output, path=path):
            return output * (torch.inf if len(path) == 2 else 1.0)

        hook = model.norm.register_forward_hook(explode)
        trainer.add_callback(Recorder(lambda path=path, t=trainer, **_: path.append((weights(t), own_of(t)))))
        trainer.train()
        hook.remove()
        assert scaler.get_scale() == 2.0**9
        assert torch.equal(path[1][0], path[2][0]) and torch.equal(path[1][1], path[2][1])
        assert not torch.equal(path[0][0], path[1][0]) and not torch.equal(path[0][1], path[1][1])


def test_a_step_that_is_left_out_does_not_repeat_the_last_gradient(tmp_path):
    trainer, path = trainer_of(tmp_path, method=Every(2, Offset()), optimizers=(None, None), optim="sgd"), []
    trainer.add_callback(Recorder(lambda **_: path.append((own_of(trainer), trainer.model.head.weight.norm()))))
    trainer.train()
    offsets = [START, *(o for o, _ in path)]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(offsets)]
    assert moved == [True, False, True, False, True]


def test_a_failed_pass_leaves_no_gradient(tmp_path):
    model = tiny_mlp(seed=1)
    closing = SharpOptimizer(adam(model), Offset(), model)
    calls = []

    def closure():
        model(**WINDOWS[0][0])["loss"].backward()
        calls.append(closing._host.added["offset"].grad is not None)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        closing.step(closure)
    assert calls == [True] and closing._host.added["offset"].grad is None
    assert not model.head._forward_hooks


def test_an_update_that_never_came_is_forgotten():
    accelerator = Accelerator(cpu=True)
    model = tiny_mlp(seed=1)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    broken = []

    def loss_of(model, batch):
        if broken:
            raise ValueError("broken")
        return model(**batch)["loss"]

    sharp = SharpStep(Offset(), prepared, optimizer, accelerator, loss_of)
    sharp.backward(WINDOWS[0][0])
    broken.append(1)
    with pytest.raises(ValueError, match="broken"):
        sharp.backward(WINDOWS[1][0])
    before = flat(model)
    optimizer.step()
    assert torch.equal(flat(model), before)


def test_an_optimizer_that_steps_twice_has_what_belongs_to_the_update_once():
    accelerator = Accelerator(cpu=True)
    model = tiny_mlp(seed=1)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    sharp = SharpStep(Offset(), prepared, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    head = model.head.weight.detach().clone()
    for window in WINDOWS[:2]:
        sharp.backward(window[0])
        head = head * 0.9 + 0.01
        for _ in range(2):
            optimizer.step()
            torch.testing.assert_close(model.head.weight.detach(), head, rtol=0, atol=1e-14)


def test_windows_of_one_that_nobody_announced_add_up(tmp_path):
    def gradient_of(windows):
        trainer = trainer_of(tmp_path)
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        for window in windows:
            trainer.training_step(trainer.model, window[0])
        return trainer._sharp_host.added["offset"].grad

    apart = gradient_of(WINDOWS[:1]) + gradient_of(WINDOWS[1:2])
    torch.testing.assert_close(gradient_of(WINDOWS[:2]), apart, rtol=0, atol=1e-14)


def test_a_resumed_training_goes_on_with_them(tmp_path):
    settings = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "optimizers": (None, None)}
    whole = trainer_of(tmp_path / "a", **settings)
    whole.train()
    again = trainer_of(tmp_path / "a", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(weights(again), weights(whole)) and torch.equal(own_of(again), own_of(whole))
    for method in (None, sam()):
        with pytest.raises(ValueError, match=r"parameters of its own: 1 \(such as offset\); this one: none"):
            trainer_of(tmp_path / "b", **{**settings, "method": method}).train(
                resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3")
            )
    plain = trainer_of(tmp_path / "c", **{**settings, "method": None})
    plain.train()
    with pytest.raises(ValueError, match="parameters of its own: none; this one: 1"):
        trainer_of(tmp_path / "d", **settings).train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-3"))


def test_a_second_training_starts_them_afresh(tmp_path):
    trainer, starts = trainer_of(tmp_path, max_steps=2), []
    record, moments = Recorder(), []

    def look(*_, **__):
        starts.append(own_of(trainer))
        moments.append(trainer._sharp_host.added["offset"] in trainer.optimizer.optimizer.state)

    record.on_train_begin = look
    trainer.add_callback(record)
    trainer.train()
    ended = own_of(trainer)
    trainer.train()
    assert torch.equal(starts[0], START) and torch.equal(starts[1], START) and not torch.equal(ended, START)
    assert len(trainer.optimizer.param_groups) == 2 and moments == [False, False]


def test_state_dicts_hold_them():
    model = tiny_mlp(seed=1)
    first = SharpOptimizer(adam(model), Offset(), model)

    def run(optimizer, model, windows):
        for window in windows:

            def closure(batch=window[0]):
                optimizer.zero_grad()
                loss = model(**batch)["loss"]
                loss.backward()
                return loss

            optimizer.step(closure)

    run(first, model, WINDOWS[:3])
    other = tiny_mlp(seed=2)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    second = SharpOptimizer(adam(other), Offset(), other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, model, WINDOWS[3:6])
    run(second, other, WINDOWS[3:6])
    assert torch.equal(flat(model), flat(other)) and torch.equal(own(first), own(second))
    with pytest.raises(ValueError, match="none; this one: 1"):
        second.load_state_dict(adam(other).state_dict())


def test_names_and_learning_rates_of_the_optimizer_are_kept():
    model = tiny_mlp()
    named = torch.optim.SGD(model.named_parameters(), lr=0.3, weight_decay=0.5)
    SharpOptimizer(named, Offset(), model)
    assert named.param_groups[1]["param_names"] == ["offset"]
    assert named.param_groups[1]["lr"] == 0.3 and named.param_groups[1]["weight_decay"] == 0.0


def test_a_scheduler_that_has_counted_the_groups_is_refused(tmp_path):
    model = tiny_mlp()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="Make the scheduler afterwards"):
        SharpOptimizer(optimizer, Offset(), model)
    with pytest.raises(ValueError, match="Make the scheduler afterwards"):
        trainer_of(tmp_path, model, optimizers=(optimizer, scheduler)).train()


def test_several_replicas_in_one_process_are_refused(tmp_path, monkeypatch):
    settings = arguments(tmp_path)
    monkeypatch.setattr(type(settings), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process a GPU"):
        SharpTrainer(tiny_mlp(), settings, train_dataset=ROWS, method=Offset())


def test_one_term_of_a_sum_cannot_have_it():
    with pytest.raises(ValueError, match="'forget' alone"):
        Sum(forget=Offset(), retain=Plain())


def test_a_method_without_any_leaves_the_optimizer_alone(tmp_path):
    trainer = train(SharpTrainer, tiny_mlp(), ROWS, tmp_path, method=sam())
    assert len(trainer.optimizer.param_groups) == 2 and "added/offset" not in str(list(tmp_path.rglob("*")))
