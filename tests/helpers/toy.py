"""The smallest host there can be: a model, its parameters, a mean loss; a second opinion beside the Trainer's."""

from contextlib import nullcontext

import torch
from torch.func import functional_call

from hf_sharp._engine.facts import StepFacts
from hf_sharp._engine.host import Host
from hf_sharp._engine.landscape import Landscape
from hf_sharp._engine.rounding import grids_of


class ToyHost(Host):
    """A host without a loop around it.

    Args:
        model: returns {"loss": ...}.
        frozen: names left out of the optimizer's groups.
        scale: the loss scale.
        step: the number of optimizer steps made before.
    """

    total_steps, warmup_steps, lr, lr_max, seed = 10, 2, 0.05, 0.1, 7
    rank, ranks, sharded, skips_overflows, autocast = 0, 1, False, False, None

    def __init__(self, model, frozen=(), scale=1.0, step=0):
        self.model, self.step, self.added = model, step, {}
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in frozen}
        self.loss_scale = torch.tensor(scale)
        self.micro_batches = 1
        self.calls = []

    def facts(self):
        given = (
            "step",
            "total_steps",
            "warmup_steps",
            "lr",
            "lr_max",
            "loss_scale",
            "seed",
            "rank",
            "ranks",
            "sharded",
        )
        more = ("parameters", "skips_overflows", "added", "autocast")
        return StepFacts(**{name: getattr(self, name) for name in given + more}, find_grids=self.grids)

    def grids(self):
        return grids_of(self.parameters, self.model.modules(), self.autocast)

    def normaliser(self, batches):
        return self.micro_batches if batches is None else len(batches)

    def backward(self, batch, normaliser, only, hook=None):
        self.model.train()
        self.batch = batch
        outputs = self.model(**batch)
        loss = outputs["loss"] / normaliser
        term = None if hook is None else hook(outputs, batch)
        loss = loss if term is None else loss + term
        (loss * self.loss_scale).backward(inputs=only)
        self.calls.append(len(next(iter(batch.values()))))
        return loss.detach()

    def forward(self, batch):
        return self.model.train()(**batch)

    def recompute(self, weights):
        return functional_call(self.model.train(), weights, (), self.batch)

    def momentum(self):
        return None

    def row_backward(self, row):
        assert not self.model.training
        (self.model(**row)["loss"] * self.loss_scale).backward()
        self.calls.append("row")

    def unsynced(self):
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
