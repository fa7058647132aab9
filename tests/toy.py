"""The smallest host there can be: a model, its parameters, a mean loss; a second opinion beside the Trainer's."""

from contextlib import contextmanager, nullcontext

import torch
from torch.func import functional_call

from hf_sharp._engine.host import Host
from hf_sharp._engine.landscape import Landscape


class ToyHost(Host):
    """A host without a loop around it.

    Args:
        model: returns {"loss": ...}.
        frozen: names left out of the optimizer's groups.
        scale: the loss scale.
    """

    total_steps, warmup_steps, lr, lr_max, seed = 10, 2, 0.05, 0.1, 7
    rank, ranks, autocast, shifts_labels, sharded = 0, 1, None, False, False

    def __init__(self, model, frozen=(), scale=1.0):
        self.model, self.step = model, 0
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in frozen}
        self.loss_scale = torch.tensor(scale)
        self.micro_batches = 1
        self.calls = []

    def backward(self, batch, only, hook=None):
        self.model.train()
        outputs = self.model(**batch)
        loss = outputs["loss"] / self.micro_batches
        term = None if hook is None else hook(outputs, batch)
        loss = loss if term is None else loss + term
        (loss * self.loss_scale).backward(inputs=only)
        self.calls.append(len(next(iter(batch.values()))))
        return loss.detach()

    def forward(self, batch):
        return self.model.train()(**batch)

    def again(self, batch, weights):
        return functional_call(self.model.train(), weights, (), batch)

    def momentum(self):
        return None

    def row_backward(self, row):
        assert not self.model.training
        (self.model(**row)["loss"] * self.loss_scale).backward()
        self.calls.append("row")

    @contextmanager
    def window(self, batches):
        before, self.micro_batches = self.micro_batches, len(batches)
        yield
        self.micro_batches = before

    def unsynced(self):
        return nullcontext()

    def records_kept(self):
        return nullcontext()

    def refuse_subsets(self, reason):
        self.calls.append(reason)

    def mean_over_ranks(self, tensors):
        return tensors


def opened(model, window, measuring=False, **settings):
    """A landscape whose first pass has been made, and its host."""
    host = ToyHost(model, **settings)
    host.micro_batches = len(window)
    landscape = Landscape(host, window, measuring)
    for batch in window:
        landscape.first_pass(batch)
    return landscape, host


def flat(vector, like):
    """A ParamVector as one tensor, None as zeros."""
    return torch.cat(
        [
            (torch.zeros_like(p) if t is None else t).reshape(-1)
            for t, p in zip(vector.tensors, like.parameters(), strict=True)
        ]
    )
