"""The engine's verbs one by one, on the smallest host."""

import random
from collections import namedtuple

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_sharp import FirstPass, ParamVector
from hf_sharp._engine import rows
from hf_sharp._engine.evaluation import Shift
from hf_sharp._engine.landscape import Landscape
from hf_sharp._engine.resources import Resources
from hf_sharp._integrations import accelerate_host
from models import batch_of, mlp_rows, tiny_mlp, windows_of
from references import functional, window_gradient
from toy import ToyHost, flat, opened

WINDOW = windows_of(mlp_rows(12), micro=4, accumulate=3)[0]


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def direction(model, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return ParamVector(torch.randn(p.shape, dtype=p.dtype, generator=draw) for p in model.parameters())


# ---- evaluate


def test_evaluate_is_loss_and_gradient_over_the_whole_window():
    model = tiny_mlp()
    w0, _, loss_fn = functional(model)
    landscape, _ = opened(model, WINDOW)
    here = landscape.evaluate()
    close(here.loss, torch.stack([loss_fn(w0, batch) for batch in WINDOW]).mean())
    close(flat(here.grad, model), window_gradient(loss_fn, w0, WINDOW))
    assert all(p.grad is None for p in model.parameters())
    again = landscape.evaluate()
    assert torch.equal(flat(again.grad, model), flat(here.grad, model)) and landscape.evaluations == 2


class Drawing(nn.Module):
    """Draws from all three streams, and moves a buffer in place, another by assignment, and a counter."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, **batch):
        noise = random.random() + numpy.random.rand() + torch.rand(()).item()
        self.mean.add_(noise)
        self.count.add_(1)
        self.last = torch.rand(2)
        out = self.inner(**batch)
        return {"loss": out["loss"] * (1 + noise), "logits": out["logits"]}


def streams():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_later_evaluations_repeat_the_draws_and_leave_streams_and_buffers_alone():
    model = Drawing(tiny_mlp(dropout=0.5))
    landscape, _ = opened(model, WINDOW)
    after, buffers = streams(), {k: v.clone() for k, v in model.named_buffers()}
    here, again = landscape.evaluate(), landscape.evaluate()
    assert torch.equal(here.loss, again.loss) and torch.equal(flat(here.grad, model), flat(again.grad, model))
    landscape.forward(lambda outputs, batch: outputs["logits"].sum())
    landscape.evaluate(fraction=0.3)
    list(landscape.row_gradients(3))
    assert streams() == after
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers()) and model.count == 3


def test_the_first_evaluation_draws_as_one_plain_backward():
    plain, ours = Drawing(tiny_mlp(dropout=0.5)), Drawing(tiny_mlp(dropout=0.5))
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(5)
    for batch in WINDOW:
        (plain(**batch)["loss"] / 3).backward()
    expected = streams()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(5)
    landscape, _ = opened(ours, WINDOW)
    here = landscape.evaluate()
    landscape.evaluate()
    assert streams() == expected
    assert torch.equal(flat(here.grad, ours), torch.cat([p.grad.reshape(-1) for p in plain.parameters()]))


def test_a_large_integer_buffer_that_moves_is_refused_by_name():
    model = tiny_mlp()
    model.register_buffer("table", torch.zeros(5000, dtype=torch.long))
    model.register_forward_pre_hook(lambda *_: (model.table.add_(1), None)[1])
    with pytest.raises(RuntimeError, match=r"table'\]"):
        opened(model, WINDOW)


def test_a_part_of_a_window_is_whole_micro_batches_with_the_same_draws():
    model = tiny_mlp(dropout=0.5)
    landscape, host = opened(model, WINDOW)
    landscape.evaluate()
    host.calls.clear()
    part = landscape.evaluate(fraction=0.34)
    assert host.calls == [4] and landscape.evaluations == pytest.approx(1 + 1 / 3)
    solo = tiny_mlp(dropout=0.5)
    torch.manual_seed(0)  # as at the start of this test: the first micro-batch's own masks
    solo(**WINDOW[0])["loss"].backward()
    close(flat(part.grad, model), torch.cat([p.grad.reshape(-1) for p in solo.parameters()]))
    landscape.evaluate(fraction=0.6)
    assert host.calls == [4, 4, 4]


def test_a_part_of_one_micro_batch_is_its_first_rows():
    model = tiny_mlp()
    batch = batch_of(mlp_rows(8))
    w0, _, loss_fn = functional(model)
    landscape, host = opened(model, [batch])
    part = landscape.evaluate(fraction=0.25)
    assert host.calls == [8, 2] and landscape.evaluations == 0.25
    close(flat(part.grad, model), window_gradient(loss_fn, w0, [{k: v[:2] for k, v in batch.items()}]))
    here = landscape.evaluate()  # the first evaluation was kept
    close(flat(here.grad, model), window_gradient(loss_fn, w0, [batch]))


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction):
    landscape, _ = opened(tiny_mlp(), WINDOW)
    with pytest.raises(ValueError, match="fraction"):
        landscape.evaluate(fraction=fraction)


def test_only_gives_the_subset_and_nothing_else():
    model = tiny_mlp()
    w0, layout, loss_fn = functional(model)
    landscape, _ = opened(model, WINDOW)
    landscape.evaluate()
    touched = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: touched.append(name))
    part = landscape.evaluate(only=["norm.weight", "hidden.bias"])
    assert set(touched) == {"norm.weight", "hidden.bias"}  # the other weight gradients were not computed
    full = window_gradient(loss_fn, w0, WINDOW)
    for name, tensor in zip(landscape.facts.names, part.grad.tensors, strict=True):
        if name in ("norm.weight", "hidden.bias"):
            close(tensor.reshape(-1), full[layout[name]])
        else:
            assert tensor is None


def test_an_empty_subset_and_one_without_gradient_are_errors():
    model = tiny_mlp(unused=True)
    landscape, _ = opened(model, WINDOW)
    landscape.evaluate()
    with pytest.raises(ValueError, match="no gradient to take"):
        landscape.evaluate(only=[])
    with pytest.raises(ValueError, match="no gradient to take"):
        landscape.evaluate(only=["nobody"])
    with pytest.raises(RuntimeError, match="No gradient came"):
        landscape.evaluate(only=["spare.weight"])


def test_a_sparse_gradient_is_refused_by_name():
    model = tiny_mlp()
    model.embed.sparse = True
    landscape, _ = opened(model, WINDOW)
    with pytest.raises(ValueError, match=r"'embed.weight' is sparse"):
        landscape.evaluate()


def test_parameters_outside_the_optimizer_get_the_last_evaluations_gradient_once():
    model = tiny_mlp()
    landscape, _ = opened(model, WINDOW, frozen=("head.bias",))
    landscape.evaluate()
    first = model.head.bias.grad.clone()
    last = landscape.evaluate()
    landscape.hand_over(last)
    assert "head.bias" not in landscape.facts.names and torch.equal(model.head.bias.grad, first)


# ---- shifted, at, forward, opening


def test_a_shift_adds_epsilon_in_place_and_restores_bitwise():
    model = tiny_mlp().float()
    before = [p.detach().clone() for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    landscape, _ = opened(model, WINDOW)
    epsilon = direction(model)
    epsilon.tensors[0] = None
    with landscape.shifted(epsilon):
        for p, old, e in zip(model.parameters(), before, epsilon.tensors, strict=True):
            assert torch.equal(p, old if e is None else old + e)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_shifts_nest():
    model = tiny_mlp()
    before = flat(ParamVector(model.parameters()), model).detach().clone()
    landscape, _ = opened(model, WINDOW)
    one, two = direction(model, 1), direction(model, 2)
    with landscape.shifted(one):
        with landscape.shifted(two):
            close(flat(landscape.weights, model), before + flat(one, model) + flat(two, model))
        close(flat(landscape.weights, model), before + flat(one, model))
    assert torch.equal(flat(landscape.weights, model), before)


def test_at_puts_the_weights_where_they_are_told_exactly():
    model = tiny_mlp()
    w0, _, loss_fn = functional(model)
    landscape, _ = opened(model, WINDOW)
    landscape.evaluate()
    target = direction(model)
    with landscape.at(target):
        assert torch.equal(flat(landscape.weights, model), flat(target, model))
        there = landscape.evaluate()
    assert torch.equal(flat(landscape.weights, model), w0)
    close(flat(there.grad, model), window_gradient(loss_fn, flat(target, model), WINDOW))


@pytest.mark.parametrize("moment", ["clone", "move", "restore"])
def test_an_interrupt_while_shifting_or_restoring_restores(moment, monkeypatch):
    from hf_sharp._engine import mover as engine
    from hf_sharp._engine import weights as shift

    model = tiny_mlp()
    before = flat(ParamVector(model.parameters()), model).detach().clone()
    landscape, _ = opened(model, WINDOW)
    landscape.evaluate()

    def half_of(function):
        def interrupted(targets, sources):
            monkeypatch.undo()
            function(targets[:3], sources[:3])
            raise KeyboardInterrupt

        return interrupted

    if moment == "clone":
        monkeypatch.setattr(shift, "_empty", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    elif moment == "move":
        monkeypatch.setattr(engine, "move_", half_of(engine.move_))
    else:
        monkeypatch.setattr(shift, "copy_", half_of(shift.copy_))
    epsilon = direction(model)
    with pytest.raises(KeyboardInterrupt), landscape.shifted(epsilon):
        pass
    monkeypatch.undo()
    assert torch.equal(flat(landscape.weights, model), before)


def test_an_outer_autocast_region_sees_the_shift():
    model = tiny_mlp().float()
    landscape, _ = opened(model, WINDOW)
    epsilon = direction(model)
    casts = ("hidden.weight", "head.weight")  # autocast caches its casts of these; the others are used in float32
    epsilon.tensors = [t if n in casts else None for n, t in zip(landscape.facts.names, epsilon.tensors, strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        here = landscape.evaluate()
        first = landscape.evaluate()
        with landscape.shifted(epsilon):
            there = landscape.evaluate()
        back = landscape.evaluate()
    assert not torch.equal(there.loss, first.loss) and torch.equal(back.loss, first.loss)
    with torch.no_grad():
        for p, e in zip(model.parameters(), epsilon.tensors, strict=True):
            if e is not None:
                p.add_(e)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = torch.stack([model(**batch)["loss"].detach() for batch in WINDOW]).mean()
    close(there.loss, fresh, 1e-6)
    assert here.loss.dtype == first.loss.dtype


def test_forward_gives_outputs_without_gradients_reduced_over_the_window():
    model = tiny_mlp(dropout=0.5)
    landscape, _ = opened(model, WINDOW)
    here = landscape.evaluate()
    losses = landscape.forward(
        lambda outputs, batch: torch.stack([outputs["loss"], torch.tensor(float(len(batch["labels"])))])
    )
    assert not losses.requires_grad and losses[1] == 12
    close(losses[0] / 3, here.loss)  # the same dropout


def test_an_opening_shift_is_where_the_first_evaluation_is_made_and_never_stays_on():
    model = tiny_mlp()
    w0, _, loss_fn = functional(model)
    host = ToyHost(model)
    host.micro_batches = 3
    landscape = Landscape(host, WINDOW)
    epsilon = direction(model)
    landscape.plan = FirstPass(shift=epsilon)
    for batch in WINDOW:
        landscape.first_pass(batch)
        assert torch.equal(flat(landscape.weights, model), w0)
    there = landscape.evaluate()
    close(flat(there.grad, model), window_gradient(loss_fn, w0 + flat(epsilon, model), WINDOW))
    assert landscape.evaluations == 1


def test_asking_for_more_than_was_opened_is_an_error():
    host = ToyHost(tiny_mlp())
    landscape = Landscape(host, WINDOW[:1])
    landscape.plan = FirstPass(only=["norm.weight"])
    landscape.first_pass(WINDOW[0])
    with pytest.raises(RuntimeError, match="planned"):
        landscape.evaluate()


def test_a_model_that_changes_its_inputs_is_refused_when_a_pass_is_repeated():
    model = tiny_mlp()
    window = [{key: value.clone() for key, value in WINDOW[0].items()}]
    model.register_forward_pre_hook(lambda m, a, kw: (kw["x"].add_(1).remainder_(11), None)[1], with_kwargs=True)
    landscape, _ = opened(model, window)
    landscape.evaluate()
    with pytest.raises(RuntimeError, match="changes its inputs in place"):
        landscape.evaluate()


def test_a_gradient_that_a_subset_loses_is_noticed_in_the_full_pass():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x, labels):
            hidden = checkpoint(self.block, x.clone().requires_grad_(), use_reentrant=True)
            return {"loss": nn.functional.cross_entropy(self.head(self.norm(hidden)), labels)}

    host = ToyHost(Inner())
    landscape = Landscape(host, [{"x": torch.randn(6, 4), "labels": torch.arange(6) % 3}])
    landscape.plan = FirstPass(only=["block.1.weight", "norm.weight"])
    landscape.first_pass(landscape.window.batches[0])
    landscape.evaluate(only=landscape.plan.only)
    landscape.evaluate()
    assert any("block.1.weight" in str(call) for call in host.calls)


# ---- facts, rows, hand-over


def test_rows_are_counted_by_what_most_tensors_share():
    text = {"position_ids": torch.zeros(1, 8), "input_ids": torch.zeros(4, 8), "labels": torch.zeros(4)}
    assert rows.count(text) == 4 and rows.part(text, slice(2))["position_ids"].shape == (1, 8)
    pair = namedtuple("Pair", "x labels")(torch.zeros(5, 2), torch.zeros(5))
    assert rows.count(pair) == 5 and rows.part(pair, slice(1, 3)).labels.shape == (2,)
    assert rows.part([torch.zeros(3), ["a", "b", "c"], 7], slice(1))[1] == ["a"]
    with pytest.raises(ValueError, match="no tensor with rows"):
        rows.count({"x": 3, "y": torch.zeros(())})


def test_facts_are_the_hosts_and_private_generators_repeat():
    model = tiny_mlp()
    host = ToyHost(model, scale=8.0)
    facts = Landscape(host).facts
    known = (facts.step, facts.total_steps, facts.warmup_steps, facts.lr, facts.lr_max)
    assert known == (0, 10, 2, 0.05, 0.1) and facts.loss_scale == 8
    state = torch.get_rng_state()
    draws = [torch.rand(3, generator=ToyHost(tiny_mlp()).facts().random(tag)) for tag in ("a", "a", "b")]
    host.step = 1
    later = torch.rand(3, generator=host.facts().random("a"))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], later)
    assert torch.equal(torch.get_rng_state(), state)


def test_row_gradients_are_single_rows_in_evaluation_mode():
    model = tiny_mlp(dropout=0.5, norm="batch")
    landscape, _ = opened(model, WINDOW)
    landscape.evaluate()
    model.norm.eval()  # a mode that must survive
    grads = list(landscape.row_gradients(6))
    assert len(grads) == 6 and model.training and not model.norm.training
    assert landscape.evaluations == pytest.approx(1.5)
    copy = tiny_mlp(dropout=0.5, norm="batch")
    copy.load_state_dict(model.state_dict())
    copy.eval()
    for index, grad in enumerate(grads):
        row = {k: v[index % 4 : index % 4 + 1] for k, v in WINDOW[index // 4].items()}
        copy.zero_grad()
        copy(**row)["loss"].backward()
        close(flat(grad, model), torch.cat([p.grad.reshape(-1) for p in copy.parameters()]))


def test_taking_a_gradient_twice_is_an_error():
    landscape, _ = opened(tiny_mlp(), WINDOW)
    here = landscape.evaluate()
    here.donate()
    with pytest.raises(RuntimeError, match="donated"):
        _ = here.grad


def test_what_is_measured_agrees_with_its_definition():
    model = tiny_mlp()
    w0, _, loss_fn = functional(model)
    landscape, _ = opened(model, WINDOW, measuring=True, scale=16.0)
    here = landscape.evaluate()
    g = flat(here.grad, model) / 16
    epsilon = here.grad.scale(0.05 / here.grad.norm())
    slope = here.grad.dot(epsilon)
    e = flat(epsilon, model)
    with landscape.shifted(Shift(epsilon, slope)):
        landscape.evaluate()
    gs = window_gradient(loss_fn, w0 + e, WINDOW)
    mean = lambda w: torch.stack([loss_fn(w, batch) for batch in WINDOW]).mean()  # noqa: E731
    expected = {
        "sharp_gap": mean(w0 + e) - mean(w0),
        "sharp_cos": gs @ e / (gs.norm() * e.norm()),
        "sharp_kappa": (gs @ e - g @ e) / (e @ e),
        "sharp_component": torch.ones((), dtype=torch.float64),
        "sharp_noise": torch.zeros((), dtype=torch.float64),
    }
    assert landscape.metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(landscape.metrics[name].double(), value, rtol=1e-9, atol=1e-12)


def test_the_realised_shift_of_bf16_weights_is_measured():
    model = nn.Linear(300, 300).to(torch.bfloat16)
    host = ToyHost(model)
    landscape = Landscape(host, measuring=True, resources=Resources(host, rounding="nearest"))
    epsilon = ParamVector(1e-5 * torch.ones_like(p) for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with landscape.shifted(epsilon):
        real = torch.cat(
            [(p.detach().double() - b.double()).reshape(-1) for p, b in zip(model.parameters(), before, strict=True)]
        )
    e = torch.cat([t.double().reshape(-1) for t in epsilon.tensors])
    torch.testing.assert_close(landscape.metrics["sharp_component"].double(), real @ e / (e @ e), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        landscape.metrics["sharp_noise"].double(), (real - e).norm() / e.norm(), rtol=1e-3, atol=1e-3
    )
    assert landscape.metrics["sharp_component"] < 0.5


def test_what_is_sent_as_one_is_of_one_kind_and_at_most_a_bucket(monkeypatch):
    monkeypatch.setattr(accelerate_host, "BUCKET", 32)
    a, b, c = (torch.ones(n) for n in (4, 4, 1))
    large, half = torch.ones(9), torch.ones(2, dtype=torch.bfloat16)
    found = accelerate_host.buckets([a, b, c, large, half, half])
    assert [[id(t) for t in bucket] for bucket in found] == [
        [id(a), id(b)],
        [id(c)],
        [id(large)],
        [id(half), id(half)],
    ]
    assert accelerate_host.buckets([]) == []


def test_old_names_still_work_and_say_the_new_one():
    landscape, _ = opened(tiny_mlp(), WINDOW, step=3)
    old = {"step": 3, "total_steps": 10, "lr": 0.05, "batches": landscape.window.batches}
    for name, value in old.items():
        with pytest.warns(DeprecationWarning, match=rf"Landscape\.{name} is called .*{name} now"):
            assert getattr(landscape, name) == value
    here = landscape.evaluate()
    with pytest.warns(DeprecationWarning, match="Evaluation.take is called donate now"):
        vector = here.take()
    assert vector.donated
    with pytest.raises(AttributeError, match="'Landscape' object has no attribute 'nonsense'"):
        _ = landscape.nonsense


def test_a_donated_vector_is_used_once_and_its_memory_is_the_users():
    model = tiny_mlp()
    landscape, _ = opened(model, WINDOW)
    e = landscape.evaluate().donate()
    with landscape.shifted(e):
        pass
    with pytest.raises(RuntimeError, match="donated and has been used"), landscape.shifted(e):
        pass


def test_a_part_honours_hooks():
    model = tiny_mlp()
    w0, _, loss_fn = functional(model)
    landscape, _ = opened(model, WINDOW)
    landscape.evaluate()
    part = landscape.evaluate(
        0.34, add=lambda outputs, _: 10 * outputs["loss"], reduce=lambda outputs, _: outputs["loss"].detach()
    )
    close(flat(part.grad, model), 11 * window_gradient(loss_fn, w0, WINDOW[:1]))
    close(part.reduced, loss_fn(w0, WINDOW[0]))


def test_a_term_needs_a_window():
    with pytest.raises(ValueError, match="no window yet"):
        _ = Landscape(ToyHost(tiny_mlp()))["forget"]
