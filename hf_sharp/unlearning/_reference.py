"""The reference of an unlearning run: the model as it was before, and how a resumed run knows it again."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hf_sharp.unlearning._objectives.base import Objective
from hf_sharp.unlearning._objectives.models import adapter_is_fresh, has_adapter

PRECOMPUTED = "precomputed"


def reference_for(module: nn.Module, objective: Objective, given: nn.Module | str | None) -> nn.Module | None:
    """The reference that an objective compares with.

    Args:
        module: the unwrapped model in training, as it stands before the first step.
        objective: the objective.
        given: a module; None for the model as it stands; "precomputed" for none.

    Returns:
        A frozen module, `module` itself where its adapter is to be switched off, or None.

    Raises:
        ValueError: if `given` is none of these, is the model in training itself, or the objective cannot do without.
    """
    if isinstance(given, nn.Module):
        if given is module:
            raise ValueError(
                "The reference is the model in training itself, which would move along. Give a copy, or None."
            )
        return given.requires_grad_(False).eval()
    if given == PRECOMPUTED:
        lacking = [name for name, term in objective.terms.items() if term.reference and not term.precomputable]
        if lacking:
            raise ValueError(
                f"The term {', '.join(lacking)} of {objective!r} compares whole outputs with a reference's, which no "
                "column can hold. Keep a reference: reference=None."
            )
        return None
    if given is not None:
        raise ValueError(f"reference is a module, 'precomputed' or None; got {given!r}.")
    if not objective.needs_reference:
        return None
    if not has_adapter(module):
        return copy.deepcopy(module).requires_grad_(False).eval()
    if not adapter_is_fresh(module):
        warnings.warn(
            "The reference is the model with its adapter switched off, and this adapter is not a fresh one: the "
            "reference differs from the model as it stands. That is right if the adapter is that of an earlier part "
            "of this unlearning. If it holds what is to be forgotten, merge it into the model and add a fresh one, or "
            "give reference= a model of its own.",
            stacklevel=4,
        )
    return module


def place(reference: nn.Module, device: torch.device) -> None:
    """Move a reference to where the model trains, unless it is there, or spread over devices.

    Args:
        reference: the reference.
        device: the training's.
    """
    spread = getattr(reference, "hf_device_map", None) is not None
    if not spread and any(p.device != device for p in reference.parameters()):
        reference.to(device)


def fingerprint(reference: nn.Module, training: nn.Module) -> str:
    """A mark by which a resumed run knows whether it has the same reference.

    Args:
        reference: the reference.
        training: the model in training; if it is the same, its trainable parameters (the adapter) do not count.

    Returns:
        A hexadecimal digest of some entries of every parameter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in _fixed(reference, training):
        entries = tensor.detach().reshape(-1)
        chosen = entries[:: max(1, entries.numel() // 64)][:64]
        digest.update(chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fixed(reference: nn.Module, training: nn.Module) -> Iterator[Tensor]:
    for parameter in reference.parameters():
        if reference is not training or not parameter.requires_grad:
            yield parameter
