"""The model in training and its reference, as objectives call them: a frozen copy, or the adapter switched off."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

OURS = ("labels", "reference_nll", "alternative")  # columns that are for the objective and not for the model


@dataclass(frozen=True)
class Models:
    """A model and what it is compared with.

    Args:
        model: the model as the training loop calls it, perhaps wrapped for several ranks.
        module: the same, unwrapped.
        shifted: whether the label of a position is that of the next one, as in causal language models.
        frozen: the reference: a module, `module` itself with its adapter switched off, or None if there is none.
        precision: the context in which a loop runs its forwards (autocast).
        takes_labels: whether the model needs the labels as input, as encoder-decoders do.
    """

    model: Callable[..., Any]
    module: nn.Module
    shifted: bool = True
    frozen: nn.Module | None = None
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    takes_labels: bool = False

    def called(self, model: Callable[..., Any]) -> Models:
        """These models with another wrapper around the one in training.

        Args:
            model: what to call.

        Returns:
            The models.
        """
        return replace(self, model=model)

    def outputs(self, part: Mapping[str, Any]) -> Any:
        """The model's outputs.

        Args:
            part: a part of a batch.

        Returns:
            What the model returns.
        """
        return self.model(**self._inputs(part))

    def reference(self, part: Mapping[str, Any]) -> Any:
        """The reference's outputs, in evaluation mode and without gradients.

        Args:
            part: a part of a batch.

        Returns:
            What the reference returns.

        Raises:
            ValueError: if there is no reference.
        """
        if self.frozen is None:
            raise ValueError(
                "This objective compares with a reference model and none was kept. Give every row the column "
                "'reference_nll', or let the trainer keep one (reference=None), which a KL term needs anyway."
            )
        switched = adapter_off(self.module) if self.frozen is self.module else nullcontext()
        with torch.no_grad(), _evaluating(self.frozen), switched, self.precision():
            return self.frozen(**self._inputs(part))

    def _inputs(self, part: Mapping[str, Any]) -> dict[str, Any]:
        ours = OURS[1:] if self.takes_labels else OURS
        return {name: value for name, value in part.items() if name not in ours}


@contextmanager
def adapter_off(module: Any) -> Generator[None]:
    """While open, a PEFT model computes what it computed without its adapter.

    PEFT switches `requires_grad` on the way, and switches on what was frozen by hand; it is put back.

    Args:
        module: a PEFT model.

    Yields:
        Nothing.
    """
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        with module.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, training in modes:
            inner.training = training


def has_adapter(module: Any) -> bool:
    """Whether a module is a PEFT model, whose adapter can be switched off.

    Args:
        module: the unwrapped model.

    Returns:
        True if it can.
    """
    return callable(getattr(module, "disable_adapter", None))


def adapter_is_fresh(module: Any) -> bool:
    """Whether a PEFT model computes the same with and without its adapter.

    Args:
        module: a PEFT model.

    Returns:
        True if the logits of a few tokens agree bitwise.
    """
    device = next(module.parameters()).device
    tokens = torch.arange(4, device=device)[None]
    with torch.no_grad(), _evaluating(module):
        present: Tensor = module(input_ids=tokens).logits
        with adapter_off(module):
            return torch.equal(present, module(input_ids=tokens).logits)
