"""What a loss writes down beside itself counts once, however often its pass is repeated."""

from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from hf_sharp import SharpTrainer, fsam, make_sharp, sam
from hf_sharp._engine.state import ForwardState
from hf_sharp._engine.walk import LARGEST
from models import mlp_rows, tiny_mlp
from training import train, weights


def kept(owner, **settings):
    return ForwardState({type(owner).__name__: owner}, list, **settings).kept()


def nested():
    return {"train": defaultdict(list, loss=[1.0]), "eval": ([2.0], {"deep": deque([3], maxlen=2)})}


WRITES = {
    "a number": (lambda: 3, lambda o: setattr(o, "x", o.x + 1)),
    "a text": (lambda: "a", lambda o: setattr(o, "x", o.x + "b")),
    "a list": (lambda: [1, 2], lambda o: o.x.append(3)),
    "an entry of a list": (lambda: [1, 2], lambda o: o.x.__setitem__(0, 9)),
    "a shorter list": (lambda: [1, 2], lambda o: o.x.pop()),
    "a dict": (lambda: {"a": 1}, lambda o: o.x.update(a=2, b=3)),
    "a key that goes": (lambda: {"a": 1}, lambda o: o.x.clear()),
    "a set": (lambda: {1}, lambda o: o.x.add(2)),
    "a counter": (lambda: Counter("aab"), lambda o: o.x.update("abc")),
    "an ordered dict": (lambda: OrderedDict(a=1, b=2), lambda o: o.x.move_to_end("a")),
    "a deque that drops": (lambda: deque([1, 2], maxlen=2), lambda o: o.x.append(3)),
    "a list in a defaultdict": (nested, lambda o: o.x["train"]["loss"].append(5.0)),
    "a new key of a defaultdict": (nested, lambda o: o.x["train"]["entropy"].append(5.0)),
    "a list replaced": (nested, lambda o: o.x["train"].__setitem__("loss", [7.0])),
    "a list in a tuple": (nested, lambda o: o.x["eval"][0].append(5.0)),
    "depths": (nested, lambda o: o.x["eval"][1]["deep"].append(9)),
    "a tensor assigned": (lambda: torch.ones(2), lambda o: setattr(o, "x", o.x + 1)),
}


@pytest.mark.parametrize("case", WRITES)
def test_what_is_written_inside_is_forgotten(case):
    make, write = WRITES[case]
    owner = SimpleNamespace(x=make())
    content = owner.x
    with kept(owner):
        write(owner)
        changed = str(owner.x) != str(make())
    assert changed and str(owner.x) == str(make()) and owner.x is content


def test_a_defaultdict_keeps_its_factory_and_a_deque_its_length():
    owner = SimpleNamespace(x=nested())
    with kept(owner):
        owner.x["train"]["more"].append(1)
    owner.x["train"]["later"].append(1)
    owner.x["eval"][1]["deep"].extend([4, 5])
    assert owner.x["train"]["later"] == [1] and list(owner.x["eval"][1]["deep"]) == [4, 5]


def test_attributes_that_come_and_go_are_put_back_also_after_an_error():
    owner = SimpleNamespace(count=1)
    with pytest.raises(KeyError, match="inside"), kept(owner):
        owner.count, owner.new = 2, 3
        raise KeyError("inside")
    assert vars(owner) == {"count": 1}


def test_a_list_that_holds_itself_ends():
    owner = SimpleNamespace(x=[1])
    owner.x.append(owner.x)
    with kept(owner):
        owner.x.append(2)
    assert len(owner.x) == 2


def test_a_tensor_changed_in_place_is_put_back():
    owner = SimpleNamespace(sums={"loss": torch.zeros(())}, other=torch.ones(3))
    total = owner.sums["loss"]
    with kept(owner):
        owner.sums["loss"] += 1
    assert owner.sums["loss"] is total and total == 0


def test_inference_tensors_have_no_version_and_are_let_be():
    with torch.inference_mode():
        owner = SimpleNamespace(x=torch.ones(2))
    with kept(owner):
        owner.x = 1
    assert isinstance(owner.x, torch.Tensor)


def test_a_data_set_is_not_searched_and_said_once():
    owner = SimpleNamespace(rows=[{"a": 1}] * 10 + list(range(LARGEST)), count=0)
    records = ForwardState({"SimpleNamespace": owner}, list)
    with pytest.warns(UserWarning, match=r"SimpleNamespace\.rows holds over 100000 entries") as warned, records.kept():
        owner.count = 1
        owner.rows[0]["a"] = 2
    assert owner.count == 0 and owner.rows[0]["a"] == 2 and len(warned) == 1
    with records.kept():  # a second warning would be an error
        owner.count = 1
    assert owner.count == 0


def test_names_left_out_are_left_alone():
    owner = SimpleNamespace(data=[1], count=[1])
    with kept(owner, without=("data",)):
        owner.data.append(2)
        owner.count.append(2)
    assert owner.data == [1, 2] and owner.count == [1]


# ---- a Trainer of one's own


class Counting(Trainer):
    """Writes as users and TRL do: a number, a nested list, a running mean, and something in `log`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.tokens, self.mean, self.logged = 0, torch.zeros(()), []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        self.tokens += inputs["x"].numel()
        self.losses["train" if model.training else "eval"]["loss"].append(loss.item())
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss

    def log(self, logs, *args, **kwargs):
        self.logged.append((self.tokens, list(self.losses["train"]["loss"]), self.mean.item()))
        super().log(logs, *args, **kwargs)


METHODS = {
    "sam": sam(0.0),
    "sam on a fraction": sam(0.0, fraction=0.5),
    "a mask from single rows": fsam(0.0, fisher="per_sample", samples=3, every=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_a_trainer_writes_in_its_loss_counts_once(name, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 4}
    plain = train(Counting, tiny_mlp(), mlp_rows(40), tmp_path, **settings)
    ours = train(make_sharp(Counting), tiny_mlp(), mlp_rows(40), tmp_path, method=METHODS[name], **settings)
    assert torch.equal(weights(ours), weights(plain))
    assert ours.logged == plain.logged and ours.tokens == 4 * 2 * 4 * 5 and len(ours.losses["train"]["loss"]) == 8
    assert not ours.losses["eval"]


class Summing(Trainer):
    total = None

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.total = torch.zeros((), dtype=loss.dtype) if self.total is None else self.total
        self.total += loss.detach()
        return loss


def test_a_sum_in_place_counts_once(tmp_path):
    plain = train(Summing, tiny_mlp(), mlp_rows(40), tmp_path)
    ours = train(make_sharp(Summing), tiny_mlp(), mlp_rows(40), tmp_path, method=sam(0.0))
    assert torch.equal(ours.total, plain.total) and torch.equal(weights(ours), weights(plain))


def test_a_long_list_of_rows_is_no_record(tmp_path):
    """Training data in a plain list is the Trainer's and is not looked at: a warning would be an error here."""
    rows = mlp_rows(8) * (LARGEST // 8)
    trainer = train(SharpTrainer, tiny_mlp(), rows, tmp_path, method=sam(0.1), eval_dataset=rows[:4], max_steps=1)
    assert trainer.state.global_step == 1
