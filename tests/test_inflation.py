"""A loss that grows with the number of micro-batches: what a method weighs against it grows too.

Right is the dense program of the window's mean loss, with a learning rate as many times as large.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import METHODS, rows_for
from hf_sharp import SharpTrainer
from models import TinyMLP, mlp_rows, text_rows, tiny_bert, tiny_mlp, windows_of
from references import functional, sgd, trajectory
from training import Tripwire, train, weights

LR, STEPS = 0.01, 4
WEIGHING = ["mesa", "saf", "fisher_sam", "tram_fisher"]
OTHERS = ["sam", "gsam", "gradient_penalty"]


class IgnoresItems(TinyMLP):
    """A mean over the micro-batch, whatever number of items it is told."""

    accepts_loss_kwargs = True

    def forward(self, x, labels=None, **keywords):
        return super().forward(x, labels)


class HeedsItems(TinyMLP):
    """A sum divided by the window's number of items."""

    accepts_loss_kwargs = True

    def forward(self, x, labels=None, num_items_in_batch=None, **keywords):
        outputs = super().forward(x, labels)
        count = len(x) if num_items_in_batch is None else num_items_in_batch
        return outputs if labels is None else {**outputs, "loss": outputs["loss"] * len(x) / count}


def trained(model, name, folder, accumulate, micro=2, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "max_steps": STEPS}
    settings |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "optimizers": (optimizer, None)}
    rows = rows_for(name, mlp_rows(80)) if isinstance(model, TinyMLP) else text_rows(80)
    return weights(train(SharpTrainer, model, rows, folder, method=METHODS[name].method(), **sizes, **settings))


def dense(name, accumulate, times, micro=2):
    case = METHODS[name]
    w, layout, loss_fn = functional(tiny_mlp())
    windows = windows_of(rows_for(name, mlp_rows(80)), micro=micro, accumulate=accumulate)
    strip = lambda w, batch: loss_fn(w, {k: v for k, v in batch.items() if k != "sample_index"})  # noqa: E731
    update = sgd(times * LR, momentum=0.9)
    path = trajectory(case.rule, strip, w, windows, update, STEPS, layout=layout, **case.settings)
    return path[-1]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("name", WEIGHING + OTHERS)
def test_the_method_is_the_same_and_its_step_as_long_as_the_loss_is_large(name, accumulate, tmp_path):
    ours = trained(IgnoresItems().double(), name, tmp_path, accumulate)
    torch.testing.assert_close(ours, dense(name, accumulate, times=accumulate), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", WEIGHING)
def test_a_loss_that_heeds_the_items_is_left_alone(name, tmp_path):
    ours = trained(HeedsItems().double(), name, tmp_path, 4)
    torch.testing.assert_close(ours, dense(name, 4, times=1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["mesa", "fisher_sam"])
def test_a_loss_function_that_ignores_the_items_is_one_too(name, tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels)

    ours = trained(tiny_mlp(), name, tmp_path, 2, compute_loss_func=mean)
    torch.testing.assert_close(ours, dense(name, 2, times=2), rtol=0, atol=1e-11)


class Counting(IgnoresItems):
    """Statistics, dropout and a count of passes."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.dropout = nn.Sequential(nn.BatchNorm1d(8), self.dropout)


def test_to_find_out_takes_two_forwards_once_and_leaves_no_trace(tmp_path):
    counts, statistics = [], []
    for accumulate in (1, 2):
        model = Counting().double()
        wire = Tripwire(model)
        trained(model, "fisher_sam", tmp_path, accumulate)
        counts.append(wire.count - STEPS * accumulate * 2)
        statistics.append(int(model.dropout[0].num_batches_tracked) - STEPS * accumulate)
    assert counts == [0, 2] and statistics == [0, 0]


@pytest.mark.parametrize("name", ["mesa", "fisher_sam"])
def test_berts_head_is_such_a_one(name, tmp_path):
    """However the window is cut, by the learning rate that takes the growth back."""
    ends = []
    for micro, accumulate in ((8, 1), (2, 4)):
        model = tiny_bert(dropout=0.0, float64=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.04 / accumulate)
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "max_steps": STEPS}
        settings = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "optimizers": (optimizer, None), **sizes}
        method = METHODS[name].method()
        ends.append(weights(train(SharpTrainer, model, text_rows(32), tmp_path, method=method, **settings)))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-11)
