"""A repeated pass begins where the first one began, and leaves everything as the first passes left it."""

import contextlib
import copy
import functools
import gc
import pickle
import random
import sys
import time
import types
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_sharp._engine.state import ForwardState
from hf_sharp._engine.walk import LARGEST
from hf_sharp._engine.watched import SMALL
from hf_sharp._tensors.shards import sharded


class Holder(nn.Module):
    """A module with one attribute and one trainable weight."""

    def __init__(self, value=None):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.x = value


def state_of(model, **roots):
    return ForwardState({"model": model, **roots}, lambda: list(model.parameters()))


def trainable_of(*models):
    return lambda: [p for model in models for p in model.parameters() if p.requires_grad]


def look(value):
    """What can be seen of a value, bit by bit."""
    return pickle.dumps(value)


# ---- three micro-batches, each kind of content: arithmetic gives the right values


class Slotted:
    __slots__ = ("count", "later")

    def __init__(self):
        self.count = 0


@dataclass
class Average:
    """An exponential average of a user's own."""

    value: torch.Tensor = field(default_factory=lambda: torch.zeros(2))
    seen: list = field(default_factory=list)

    def update(self, x):
        self.value = self.value * 0.5 + x
        self.seen.append(float(x))


class Memory(list):
    def append(self, item):
        raise AssertionError("a class of one's own may do anything here")


def in_place(o, i):
    o.x.mul_(0.5).add_(i + 1)


KINDS = {  # what the attribute holds at first, what pass number i does, what to look at
    "a number": (lambda: 7, lambda o, i: setattr(o, "x", 10 * o.x + i), lambda x: x),
    "a text": (lambda: "a", lambda o, i: setattr(o, "x", o.x + str(i)), lambda x: x),
    "a list": (lambda: [1], lambda o, i: o.x.append(i), list),
    "an entry of a list": (lambda: [1, 2, 3], lambda o, i: o.x.__setitem__(i, 1000 + i), list),
    "a list replaced": (lambda: [1], lambda o, i: setattr(o, "x", [*o.x, i]), list),
    "a list replaced, then moved": (
        lambda: [1],
        lambda o, i: setattr(o, "x", [*o.x, 9]) if i == 1 else o.x.append(i),
        list,
    ),
    "a dict": (lambda: {"a": 1}, lambda o, i: o.x.update({"a": 2 * i + 2, f"b{i}": i}), dict),
    "keys that go": (lambda: dict.fromkeys(range(9)), lambda o, i: o.x.pop(next(iter(o.x))), list),
    "a set": (lambda: {1}, lambda o, i: o.x.add(i + 5), sorted),
    "a counter": (lambda: Counter("aab"), lambda o, i: o.x.update("abc"), dict),
    "an ordered dict": (lambda: OrderedDict.fromkeys("abcd"), lambda o, i: o.x.move_to_end("abc"[i]), list),
    "a deque that drops": (lambda: deque([1, 2], maxlen=2), lambda o, i: o.x.append(i + 5), list),
    "lists in a defaultdict": (
        lambda: defaultdict(list, loss=[1.0]),
        lambda o, i: (o.x["loss"].append(i), o.x[f"new{i}"].append(i)),
        dict,
    ),
    "a list in a tuple": (lambda: (1, ([2],)), lambda o, i: o.x[1][0].append(i), lambda x: x),
    "a list in a named tuple": (lambda: namedtuple("Pair", "a b")([1], 2), lambda o, i: o.x.a.append(i), tuple),
    "an array": (lambda: np.zeros(3), lambda o, i: o.x.__setitem__(i, i + 1.0), lambda x: x.tolist()),
    "a small tensor in place": (lambda: torch.zeros(2), in_place, torch.Tensor.tolist),
    "a large tensor in place": (lambda: torch.zeros(2 * SMALL), in_place, lambda x: x[:2].tolist()),
    "through .data": (lambda: torch.zeros(2), lambda o, i: o.x.data.add_(i + 1), torch.Tensor.tolist),
    "a tensor assigned": (lambda: torch.zeros(2), lambda o, i: setattr(o, "x", o.x + i + 1), torch.Tensor.tolist),
    "a tensor in a dict": (lambda: {"m": torch.ones(1)}, lambda o, i: o.x["m"].mul_(i + 2), lambda x: x["m"].item()),
    "a complex tensor": (lambda: torch.zeros(1, dtype=torch.cfloat), in_place, lambda x: x.item()),
    "a resized tensor": (lambda: torch.zeros(1), lambda o, i: o.x.resize_(i + 2).fill_(i), torch.Tensor.tolist),
    "an object": (Average, lambda o, i: o.x.update(i + 1), lambda x: (x.value.tolist(), list(x.seen))),
    "an object in place": (Average, lambda o, i: o.x.value.mul_(0.5).add_(i + 1), lambda x: x.value.tolist()),
    "an object with slots": (
        Slotted,
        lambda o, i: (setattr(o.x, "count", o.x.count + 1), setattr(o.x, "later", i)),
        lambda x: (x.count, getattr(x, "later", None)),
    ),
    "a list of a class of one's own": (lambda: Memory([1]), lambda o, i: list.append(o.x, i), list),
    "a namespace": (lambda: SimpleNamespace(n=0), lambda o, i: setattr(o.x, "n", o.x.n + i + 1), lambda x: x.n),
    "a UserDict": (lambda: UserDict(a=[]), lambda o, i: o.x["a"].append(i), lambda x: list(x["a"])),
    "an object behind its method": (lambda: Average().update, lambda o, i: o.x(i), lambda x: list(x.__self__.seen)),
    "a list in a partial": (
        lambda: functools.partial(print, [1]),
        lambda o, i: o.x.args[0].append(i),
        lambda x: list(x.args[0]),
    ),
    "Python's generator": (lambda: random.Random(1), lambda o, i: o.x.random(), lambda x: x.getstate()),
    "torch's generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda o, i: torch.rand(3, generator=o.x),
        lambda x: x.get_state().tolist(),
    ),
    "NumPy's generator": (
        lambda: np.random.default_rng(1),
        lambda o, i: o.x.random(),
        lambda x: x.bit_generator.state["state"]["state"],
    ),
    "NumPy's old generator": (
        lambda: np.random.RandomState(1),
        lambda o, i: o.x.rand(),
        lambda x: [part.tolist() if isinstance(part, np.ndarray) else part for part in x.get_state()],
    ),
    "a hidden module": (
        lambda: [nn.BatchNorm1d(1)],
        lambda o, i: o.x[0].train()(torch.tensor([[0.0], [2.0 * i + 2]])),
        lambda x: x[0].running_mean.tolist(),
    ),
}


def places():
    yield "module", lambda make: (owner := Holder(make()), state_of(owner))
    yield (
        "trainer",
        lambda make: (
            owner := SimpleNamespace(x=make()),
            ForwardState({"model": (m := Holder()), "trainer": owner}, lambda: list(m.parameters())),
        ),
    )


@pytest.mark.filterwarnings("ignore:.*resize:UserWarning")
@pytest.mark.parametrize("place", ["module", "trainer"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_begins_where_its_first_began(kind, place):
    make, move, see = KINDS[kind]
    owner, state = dict(places())[place](make)
    begins, changes, objects = [], [], []
    for i in range(3):
        begins.append(copy.deepcopy(see(owner.x)))
        objects.append(owner.x)
        before = state.record()
        move(owner, i)
        changes.append(state.changes(before))
        assert changes[-1], "the pass moved something"
    end, held = copy.deepcopy(see(owner.x)), owner.x
    assert len({repr(value) for value in [*begins, end]}) == 4, "every pass begins from another value"
    for order in ([0, 1, 2], [2, 0, 1], [1]):
        with state.kept():
            for i in order:
                state.rewind(changes[i:])
                assert see(owner.x) == begins[i] and owner.x is objects[i]
                move(owner, i)
                assert see(owner.x) == (end if i == 2 else begins[i + 1])
            assert state._open
        assert see(owner.x) == end and owner.x is held
    with pytest.raises(KeyboardInterrupt), state.kept():
        move(owner, 2)
        raise KeyboardInterrupt
    assert see(owner.x) == end and owner.x is held


class Centred(nn.Module):
    """y = w x - m, and m becomes w x / 2: in a buffer, or in an attribute, replaced or in place."""

    def __init__(self, way):
        super().__init__()
        self.w, self.way = nn.Parameter(torch.tensor(2.0)), way
        if way == "buffer":
            self.register_buffer("m", torch.tensor(0.0))
        else:
            self.m = torch.tensor(0.0)

    def forward(self, x):
        y = self.w * x - self.m
        m = self.w.detach() * x / 2
        if self.way == "in place":
            self.m.copy_(m)
        else:
            self.m = m
        return y.square()


@pytest.mark.parametrize("way", ["buffer", "attribute", "in place"])
def test_the_gradient_at_a_shifted_weight(way):
    """At x = 1, 2 it has m = 0, 1 with w = 2. The gradients 2 (w x - m) x are 4 and 12 at w = 2, 6 and 20 at w = 3."""
    model = Centred(way)
    state, changes = state_of(model), []

    def gradient(x):
        model.w.grad = None
        model(x).backward()
        return model.w.grad.item()

    for x, right in ((1.0, 4.0), (2.0, 12.0)):
        before = state.record()
        assert gradient(x) == right
        changes.append(state.changes(before))
    with state.kept():
        with torch.no_grad():
            model.w.add_(1)
        for i, (x, right) in enumerate(((1.0, 6.0), (2.0, 20.0))):
            state.rewind(changes[i:])
            assert gradient(x) == right
        with torch.no_grad():
            model.w.sub_(1)
    assert model.w.item() == 2 and model.m.item() == 2


# ---- modules: buffers, frozen parameters, attributes that come and go


def test_a_buffer_in_place_replaced_and_moved_again_goes_back_to_each_pass():
    """The case that one copy a buffer cannot do: 1, doubled in place, replaced by +10, doubled, all by hand."""
    model = Holder()
    model.register_buffer("b", torch.ones(1))
    first, state, changes = model.b, state_of(model), []

    def move(i):
        if i == 1:
            model.b = model.b + 10
        else:
            model.b.mul_(2)

    values = [1.0, 2.0, 12.0, 24.0]
    for i in range(3):
        before = state.record()
        move(i)
        changes.append(state.changes(before))
    second = model.b
    with state.kept():
        for i in (0, 1, 2, 1, 0, 0):
            state.rewind(changes[i:])
            assert model.b.item() == values[i] and model.b is (first if i < 2 else second)
            move(i)
            assert model.b.item() == values[i + 1]
    assert model.b is second and model.b.item() == 24.0
    assert first.item() == 2.0, "what the model no longer holds is as the first passes left it, too"


def test_batch_norm_statistics_and_a_counter():
    """Means 1 and 3 with momentum 0.5 give 0.5 and 1.75; the count is an integer buffer of one entry."""
    model = nn.Sequential(nn.BatchNorm1d(1, momentum=0.5))
    state, changes, batches = state_of(model), [], [torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [4.0]])]
    for batch in batches:
        before = state.record()
        model(batch)
        changes.append(state.changes(before))
    norm = model[0]
    with state.kept():
        for i, mean in ((0, 0.0), (1, 0.5)):
            state.rewind(changes[i:])
            assert norm.running_mean.item() == mean and norm.num_batches_tracked.item() == i
            model(batches[i])
    assert norm.running_mean.item() == 1.75 and norm.num_batches_tracked.item() == 2


def test_spectral_norm_begins_from_the_same_vectors():
    model = nn.utils.spectral_norm(nn.Linear(4, 3))
    state, x = state_of(model), torch.randn(2, 4)
    u = model.weight_u.clone()
    before = state.record()
    first = model(x)
    changes = [state.changes(before)]
    left = model.weight_u.clone()
    with state.kept():
        state.rewind(changes)
        assert torch.equal(model.weight_u, u) and torch.equal(model(x), first)
    assert torch.equal(model.weight_u, left) and not torch.equal(left, u)


def test_frozen_parameters_moved_in_the_forward_go_back():
    model = Holder()
    model.teacher = nn.Linear(100, 100).requires_grad_(False)
    start = model.teacher.weight.clone()
    state, changes = ForwardState({"model": model}, trainable_of(model)), []
    for _ in range(2):
        before = state.record()
        with torch.no_grad():
            model.teacher.weight.mul_(2)
        changes.append(state.changes(before))
    with state.kept():
        for i in (0, 1):
            state.rewind(changes[i:])
            assert torch.equal(model.teacher.weight, start * 2**i)
    assert torch.equal(model.teacher.weight, start * 4)


def test_frozen_parameters_that_do_not_move_are_copied_once():
    model = Holder()
    model.teacher = nn.Linear(100, 100).requires_grad_(False)
    state = ForwardState({"model": model}, trainable_of(model))
    copies = []
    for _ in range(3):
        before = state.record()
        copies.append([seen.name for seen in before.tensors if seen.copy is not None])
        assert not state.changes(before)
        assert not before.tensors and not before.names and not before.contents
    assert copies == [["model.teacher.weight", "model.teacher.bias"], [], []]


def test_a_tensor_beyond_the_budget_is_lost_once_with_a_warning_and_copied_from_then_on(monkeypatch):
    monkeypatch.setattr("hf_sharp._engine.watched.LEAST", 1000)
    model = Holder(torch.zeros(2 * SMALL))
    state = state_of(model)
    before = state.record()
    model.x.add_(1)
    with pytest.warns(UserWarning, match=r"changes \['model\.x'\] in place.*register_buffer"):
        state.changes(before)
    before = state.record()
    model.x.add_(1)
    changes = [state.changes(before)]
    with state.kept():
        state.rewind(changes)
        assert model.x.unique().tolist() == [1.0]
    assert model.x.unique().tolist() == [2.0]


def test_a_large_integer_buffer_that_moves_is_an_error():
    model = Holder()
    model.register_buffer("table", torch.zeros(SMALL + 1, dtype=torch.int32))
    state = state_of(model)
    before = state.record()
    assert all(seen.copy is None for seen in before.tensors)
    model.table.add_(1)
    with pytest.raises(RuntimeError, match=r"\['model\.table'\] of over 4096 entries.*floating-point buffer"):
        state.changes(before)
    with pytest.raises(RuntimeError, match=r"model\.table"), state.kept():
        model.table.add_(1)
    with pytest.raises(KeyError), state.kept():
        model.table.add_(1)
        raise KeyError


def test_attributes_deleted_and_made_by_a_pass():
    model = Holder([1])
    model.register_buffer("b", torch.ones(1))
    model.register_buffer("c", torch.ones(1))
    kept, names = model.x, list(vars(model))
    state = state_of(model)
    before = state.record()
    del model.x, model.b
    model.new = 3
    model.register_buffer("d", torch.zeros(1))
    changes = [state.changes(before)]
    with state.kept():
        state.rewind(changes)
        assert model.x is kept and list(vars(model)) == names[:-1] + names[-1:]
        assert list(dict(model.named_buffers())) == ["b", "c"]
        del model.x
    assert "x" not in vars(model) and model.new == 3 and list(dict(model.named_buffers())) == ["c", "d"]


def test_modules_made_by_a_pass_and_new_ones_between_passes_are_found():
    model = Holder()
    state = state_of(model)
    before = state.record()
    model.late = nn.BatchNorm1d(1)
    changes = [state.changes(before)]
    with state.kept():
        state.rewind(changes)
        assert not any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    before = state.record()
    model.late(torch.tensor([[1.0], [3.0]]))
    assert state.changes(before)


def test_buffers_and_lists_held_twice_go_back_once():
    model, shared, log = nn.Sequential(Holder(), Holder()), torch.zeros(1), []
    for module in model:
        module.register_buffer("b", shared)
        module.x = log
    state = state_of(model)
    before = state.record()
    model[0].b.add_(1)
    model[1].x.append(1)
    changes = [state.changes(before)]
    assert len(changes[0].tensors) == len(changes[0].contents) == 1
    with state.kept():
        state.rewind(changes)
        assert shared.item() == 0 and log == []
    assert shared.item() == 1 and log == [1] and model[0].b is model[1].b and model[0].x is model[1].x


def test_trainable_weights_are_left_alone_wherever_they_are_held():
    """Whoever shifts the weights inside `kept` puts them back himself; until then nobody else may."""
    model = Holder()
    weight = model.linear.weight
    model.tied, model.parts = weight, [weight, weight.detach(), weight.data[0]]
    model.register_buffer("alias", weight.detach().view(-1))
    start = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    model.gradient = weight.grad
    state = state_of(model)
    with state.kept():
        with torch.no_grad():
            weight.add_(1)
            weight.grad.add_(1)
        state.rewind([])
        assert torch.equal(weight, start + 1) and weight.grad.sum() == 4
    assert torch.equal(weight, start + 1) and weight.grad.sum() == 4


def test_tied_frozen_tensors_and_expanded_buffers():
    model = Holder()
    model.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    model.x = {"same": model.frozen}
    base = torch.zeros(1)
    model.register_buffer("wide", base.expand(4))
    state = ForwardState({"model": model}, trainable_of(model))
    before = state.record()
    with torch.no_grad():
        model.x["same"].add_(1)
        base.add_(2)
    changes = [state.changes(before)]
    with state.kept():
        state.rewind(changes)
        assert model.frozen.tolist() == [0, 0, 0] and model.wide.tolist() == [0] * 4
    assert model.frozen.tolist() == [1, 1, 1] and model.wide.tolist() == [2] * 4


def test_inference_and_meta_tensors_are_let_be():
    with torch.inference_mode():
        made = torch.ones(2)
    model = Holder(made)
    model.register_buffer("nowhere", torch.zeros(3, device="meta"))
    state = state_of(model)
    with state.kept():
        model.x = None
    assert model.x is made


def test_numbers_computed_anew_are_no_change():
    model = Holder(1000)
    model.y = float("nan")
    state = state_of(model)
    before = state.record()
    model.x, model.y = int("1000"), float("nan")
    assert not state.changes(before)
    before = state.record()
    model.x = 1000.0
    assert state.changes(before)


# ---- roots that are no modules


def test_a_loss_object_an_objects_method_and_a_closure():
    class Loss:
        def __init__(self):
            self.calls, self.scale = 0, torch.ones(1)

        def __call__(self):
            self.calls += 1
            self.scale.mul_(0.5)

    def closed(history=[]):  # noqa: B006
        nonlocal calls
        calls += 1
        history.append(calls)

    calls, one, other = 0, Loss(), Loss()
    for function, see in (
        (one, lambda: (one.calls, one.scale.item())),
        (other.__call__, lambda: (other.calls, other.scale.item())),
        (closed, lambda: (calls, len(closed.__defaults__[0]))),
        (functools.partial(Loss.__call__, third := Loss()), lambda: (third.calls, third.scale.item())),
    ):
        state, start, changes = state_of(Holder(), compute_loss_func=function), see(), []
        for _ in range(2):
            before = state.record()
            function()
            changes.append(state.changes(before))
        end = see()
        with state.kept():
            state.rewind(changes)
            assert see() == start and end[0] == 2
            function()
        assert see() == end


def test_a_loss_that_is_a_module_counts_as_one():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(1))

    loss = Loss()
    state = state_of(Holder(), compute_loss_func=loss)
    with state.kept():
        loss.centre.add_(1)
    assert loss.centre.item() == 0


def test_a_sum_in_place_on_the_trainer_is_put_back():
    """With `Records` this was an error."""
    trainer = SimpleNamespace(sums={"loss": torch.zeros(())})
    state = state_of(Holder(), trainer=trainer)
    with state.kept():
        trainer.sums["loss"] += 1
    assert trainer.sums["loss"].item() == 0


def test_names_left_out_are_left_alone():
    trainer = SimpleNamespace(data=[1], count=[1])
    state = ForwardState({"trainer": trainer}, list, without=("data",))
    with state.kept():
        trainer.data.append(2)
        trainer.count.append(2)
    assert trainer.data == [1, 2] and trainer.count == [1]


@pytest.mark.parametrize(
    "rows", [[{"a": 1}] * 10 + list(range(LARGEST)), np.zeros(LARGEST + 1)], ids=["list", "array"]
)
def test_a_data_set_is_not_searched_and_said_once(rows):
    trainer = SimpleNamespace(rows=rows, count=0)
    state = state_of(Holder(), trainer=trainer)
    with pytest.warns(UserWarning, match=r"SimpleNamespace\.rows holds over 100000 entries") as warned, state.kept():
        trainer.count = 1
        rows[0] = 2
    assert trainer.count == 0 and rows[0] == 2 and len(warned) == 1
    with state.kept():  # a second warning would be an error
        trainer.count = 1
    assert trainer.count == 0


def test_libraries_objects_are_left_alone(tmp_path):
    """An optimizer of one's own, arguments, a data set, an enumeration: their books go on."""

    class Own(torch.optim.SGD):
        notes = None

    class Rows(torch.utils.data.Dataset):
        read = 0

    model = Holder()
    own, rows = Own(model.parameters(), lr=0.1), Rows()
    own.notes, arguments = [], TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer = SimpleNamespace(optimizer=own, args=arguments, rows=rows, function=print, cls=Own, module=types)
    state = state_of(model, trainer=trainer)
    with state.kept():
        own.notes.append(1)
        own.param_groups[0]["lr"] = 0.2
        rows.read = 3
        arguments.seed = 7
    assert own.notes == [1] and own.param_groups[0]["lr"] == 0.2 and rows.read == 3 and arguments.seed == 7


def test_a_wrapper_of_a_library_keeps_its_books_and_the_model_in_it_is_looked_after():
    class Wrapped(nn.parallel.DataParallel):
        pass

    model = Wrapped(Holder([1]))
    state = state_of(model)
    with state.kept():
        model.books = 1
        model.module.x.append(2)
    assert model.books == 1 and model.module.x == [1]


def test_a_list_that_holds_itself_ends():
    model = Holder([1])
    model.x.append(model.x)
    state = state_of(model)
    with state.kept():
        model.x.append(2)
    assert len(model.x) == 2


# ---- with what people use


def test_dynamic_rope_begins_with_the_frequencies_of_its_first_pass():
    """Lengths 16 and 6 with 8 positions: transformers makes other frequencies at 16 and goes back at 6."""
    size = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(**size, num_attention_heads=2, max_position_embeddings=8, rope_parameters=rope)
    model = LlamaForCausalLM(config).train()
    rotary, state = model.model.rotary_emb, state_of(model)
    batches = [{"input_ids": torch.arange(length)[None]} for length in (16, 6)]
    cached, outputs, changes = [], [], []
    for batch in batches:
        before = state.record()
        cached.append(rotary.max_seq_len_cached)
        outputs.append(model(**batch).logits)
        changes.append(state.changes(before))
    assert cached == [8, 16] and rotary.max_seq_len_cached == 8
    frequencies = rotary.inv_freq
    with state.kept():
        for i, batch in enumerate(batches):
            state.rewind(changes[i:])
            assert rotary.max_seq_len_cached == cached[i]
            assert torch.equal(model(**batch).logits, outputs[i])
    assert rotary.inv_freq is frequencies and rotary.max_seq_len_cached == 8


def test_a_trainer_with_records_like_trls(tmp_path):
    """What its loss writes down goes back; the books of its optimizer and of transformers' `TrainerState` do not."""
    model = Holder()
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to="none", use_cpu=True))
    trainer.create_optimizer()
    trainer._metrics = {"train": defaultdict(list, {str(i): [0.5] * 1000 for i in range(10)}), "eval": {}}
    trainer.total_train_tokens = 0
    state = state_of(model, trainer=trainer)
    before = state.record()
    assert not state.changes(before)
    with state.kept():
        trainer._metrics["train"]["0"].append(1.0)
        trainer._metrics["train"]["new"].append(1.0)
        trainer.total_train_tokens += 8
        trainer.state.global_step += 1
        trainer.optimizer.param_groups[0]["lr"] = 7
    assert len(trainer._metrics["train"]) == 10 and trainer._metrics["train"]["0"] == [0.5] * 1000
    assert trainer.total_train_tokens == 0
    assert trainer.state.global_step == 1 and trainer.optimizer.param_groups[0]["lr"] == 7
    spans = []
    for _ in range(20):
        start = time.thread_time()
        state.changes(state.record())
        spans.append(time.thread_time() - start)
    assert min(spans) < 4e-3  # 0.7 ms on the slow machine on which this was written


class Carrying(nn.Module):
    """A hidden state in an attribute, a count in a buffer, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("count", torch.zeros(1))
        self.hidden = torch.zeros(4)

    def forward(self, x):
        self.count.add_(1)
        h = self.frozen(self.first(x)) + self.hidden
        self.hidden = h.detach().mean(0)
        return h


def test_torch_compile_compiles_nothing_anew():
    torch._dynamo.reset()
    model, x = Carrying(), torch.randn(3, 4)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    state, changes, outputs = state_of(compiled), [], []
    for _ in range(2):
        before = state.record()
        outputs.append(compiled(x).detach())
        changes.append(state.changes(before))
    made = counter.frame_count
    with state.kept():
        for i in (0, 1, 0):
            state.rewind(changes[i:])
            assert torch.equal(compiled(x), outputs[i])
    assert counter.frame_count == made and model.count.item() == 2


def test_fsdp_may_have_gathered_weights_and_is_not_disturbed():
    """Without reduction the weights stay gathered after the first pass: other objects in the parameters' place."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, model, x = init_device_mesh("cpu", (1,)), Carrying(), torch.randn(3, 4)
        for module in (model.first, model.frozen, model):
            fully_shard(module, mesh=mesh)
        state, changes, outputs = ForwardState({"model": model}, trainable_of(model)), [], []

        def step(last):
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
            out = model(x)
            out.sum().backward()
            return out.detach()

        for last in (False, True):
            before = state.record()
            outputs.append(step(last))
            changes.append(state.changes(before))
            assert sharded(model.first.weight) == last
        assert [[list(earlier) for _, earlier, _ in change.names] for change in changes] == [[["hidden"]]] * 2
        with state.kept():
            for i in (0, 1):
                state.rewind(changes[i:])
                assert torch.equal(step(i == 1), outputs[i])
        assert model.count.item() == 2 and sharded(model.first.weight)
    finally:
        dist.destroy_process_group()


# ---- interrupts


def test_put_back_by_an_outer_handler_is_done_once():
    model = Holder(1)
    state = state_of(model)
    assert not state.put_back()
    try:
        with state.kept():
            model.x = 2
            try:
                raise KeyboardInterrupt
            finally:
                assert state.put_back() and model.x == 1
                assert not state.put_back()
                model.x = 5  # somebody's business after the handler
    except KeyboardInterrupt:
        pass
    assert model.x == 5


def test_a_put_back_that_is_interrupted_is_finished_by_another(monkeypatch):
    """Ctrl-C at every call of a function while two buffers and a list go back from a rewound state."""
    from hf_sharp._engine import records

    for when in range(1, 12):
        model = Holder([0])
        model.register_buffer("a", torch.zeros(1))
        model.register_buffer("b", torch.zeros(1))
        state, changes = state_of(model), []

        def move(model=model):
            model.a.add_(1)
            model.b.add_(1)
            model.x.append(1)

        for _ in range(2):
            before = state.record()
            move()
            changes.append(state.changes(before))
        calls = 0

        def interrupted(*args, original=records.write, when=when):
            nonlocal calls
            calls += 1
            if calls == when:
                raise KeyboardInterrupt
            original(*args)

        try:
            with state.kept():
                with monkeypatch.context() as patch:
                    patch.setattr(records, "write", interrupted)
                    for i in (0, 1):
                        state.rewind(changes[i:])
                        move()
                    state.put_back()
        except KeyboardInterrupt:
            state.put_back()
        assert (model.a.item(), model.b.item(), model.x) == (2, 2, [0, 1, 1])
        assert not state.put_back()


def interrupted_at(number):
    """A rewound region of three passes, with Ctrl-C as the function of that number of the package is entered."""
    norm, trainer = nn.BatchNorm1d(2), SimpleNamespace(n=0, log={"a": []}, g=torch.Generator().manual_seed(1))
    model = nn.Sequential(norm, Holder([0]))
    state, changes, entered = state_of(model, trainer=trainer), [], 0

    def move(i):
        norm(torch.full((3, 2), float(i)) + torch.arange(6.0).view(3, 2))
        model[1].x.append(i)
        trainer.n += 1
        trainer.log["a"].append(torch.rand(1, generator=trainer.g).item())

    def seen():
        return repr((norm.running_mean, norm.num_batches_tracked, model[1].x, trainer.n, trainer.log))

    def count(frame, event, _):
        nonlocal entered
        if event == "call" and "hf_sharp" in frame.f_code.co_filename:
            entered += 1
            if entered == number:
                sys.setprofile(None)
                raise KeyboardInterrupt

    for i in range(3):
        before = state.record()
        move(i)
        changes.append(state.changes(before))
    end, earlier = seen(), sys.getprofile()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            sys.setprofile(count)
            with state.kept():
                for i in range(3):
                    state.rewind(changes[i:])
                    move(i)
        finally:
            sys.setprofile(earlier)
    while state.put_back():
        pass
    assert seen() == end, number
    return entered


def test_an_interrupt_at_a_function_entry_leaves_nothing_moved():
    entries = interrupted_at(0)
    assert entries > 500
    for number in range(1, entries, 7):
        interrupted_at(number)


def test_nested_regions_go_back_one_by_one():
    model = Holder(1)
    state = state_of(model)
    with state.kept():
        model.x = 2
        with state.kept():
            model.x = 3
        assert model.x == 2
    assert model.x == 1


def test_rewind_is_for_the_inside_of_kept():
    with pytest.raises(RuntimeError, match="inside of `kept`"):
        state_of(Holder()).rewind([])


# ---- nothing is kept


def test_nothing_is_kept_alive_afterwards():
    model, trainer = Holder([torch.ones(3)]), SimpleNamespace(log={"a": Average()})
    model.register_buffer("b", torch.zeros(2))
    state = state_of(model, trainer=trainer)
    for _ in range(2):
        before = state.record()
        model.b.add_(1)
        change = state.changes(before)
        with state.kept():
            state.rewind([change])
    references = [weakref.ref(thing) for thing in (model.x[0], trainer.log["a"], trainer.log["a"].value, model.b)]
    references += [weakref.ref(copy) for _, copy in change.tensors]
    del change
    model.x, model.b, trainer.log = None, None, {}
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


def test_a_change_holds_only_what_moved():
    model = Holder([1])
    model.register_buffer("b", torch.zeros(2))
    model.register_buffer("c", torch.zeros(2))
    state = state_of(model)
    before = state.record()
    model.b.add_(1)
    change = state.changes(before)
    assert [tensor is model.b for tensor, _ in change.tensors] == [True] and not change.names and not change.contents
