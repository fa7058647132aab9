"""Modules whose training forward reads and moves something of their own: they go between two layers of a network.

Each gives out what came in, disturbed by what it has seen before; all in float64. A loss and a Trainer do so, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


class Still(nn.Module):
    """Nothing moves."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Centre(nn.Module):
    """A buffer that is assigned anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        out = hidden - self.centre
        if self.training:
            self.centre = 0.5 * self.centre + 0.5 * hidden.detach().mean(0)
        return out


class Carried(nn.Module):
    """A hidden state, a counter and a list as plain attributes."""

    def __init__(self):
        super().__init__()
        self.carried, self.calls, self.seen = torch.zeros(WIDTH, dtype=torch.float64), 0, []

    def forward(self, hidden: Tensor) -> Tensor:
        out = hidden + self.carried / (1 + self.calls)
        if self.training:
            self.carried, self.calls = hidden.detach().mean(0), self.calls + 1
            self.seen.append(float(hidden.detach().sum()))
        return out * (1 + 0.1 * len(self.seen))


class Average:
    """An object of a user's own that keeps a running mean."""

    def __init__(self):
        self.mean = torch.zeros(WIDTH, dtype=torch.float64)

    def __call__(self, value: Tensor) -> Tensor:
        self.mean.mul_(0.7).add_(value, alpha=0.3)
        return self.mean.clone()


class Ema(nn.Module):
    """Such an object as an attribute."""

    def __init__(self):
        super().__init__()
        self.average = Average()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden - self.average(hidden.detach().mean(0))


class Frozen(nn.Module):
    """Parameters without a gradient that the forward moves, one of them past torch's version counter."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out = hidden * self.gain.clone() + self.shift.clone()
        self.gain.data.mul_(0.8)
        with torch.no_grad():
            self.shift += 0.1 * hidden.mean(0)
        return out


class Drawing(nn.Module):
    """A generator of its own."""

    def __init__(self):
        super().__init__()
        self.draws = torch.Generator().manual_seed(3)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0.5 * torch.randn(WIDTH, generator=self.draws, dtype=torch.float64)


class Normed(nn.BatchNorm1d):
    """Running statistics."""

    def __init__(self):
        super().__init__(WIDTH, dtype=torch.float64)


KINDS = (Still, Centre, Carried, Ema, Frozen, Drawing)


class Tempered:
    """A loss object that cools down by the rows' own losses."""

    def __init__(self):
        self.temperature, self.calls = torch.ones((), dtype=torch.float64), 0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(outputs["logits"] / self.temperature, labels, reduction="sum")
        self.temperature = self.temperature * 0.7 + 0.01 * loss.detach()
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class Cooling:
    """Before a Trainer's class: its loss reads and writes attributes of the trainer."""

    heat, history = 1.0, ()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **keywords)  # pyright: ignore
        loss = self.heat * loss
        self.heat *= 0.6
        self.history = (*self.history, len(inputs["labels"]))
        return (loss, outputs) if return_outputs else loss


class Twice:
    """Before a Trainer's class: a second pass over a disturbed micro-batch, as adversarial training has it."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)  # pyright: ignore
        super().training_step(model, self.disturbed(inputs), num_items_in_batch)  # pyright: ignore
        return loss

    def disturbed(self, inputs: Any) -> Any:
        x = inputs["x"]
        return {**inputs, "x": x + 0.1 if x.is_floating_point() else x.flip(0)}
