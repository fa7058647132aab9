"""What signatures call the things of which the library knows little: batches, outputs, and what is made of them.

A batch is what the loop's loader gives, outputs are what the model returns. Both may be anything: a dict, a tuple, an
object of somebody's own. Their names below are therefore names of `Any`, and say which of the two is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor

Batch: TypeAlias = Any  # one micro-batch, such as a dict of tensors with "labels"
Outputs: TypeAlias = Any  # what a model returns, such as an object with `logits` and `loss`
Sums: TypeAlias = Any  # what `+` adds up over micro-batches: a tensor, or a number
Normaliser: TypeAlias = Any  # what a loop divides a loss by; only its own host reads it

Hook: TypeAlias = Callable[[Outputs, Batch], Tensor | None]  # gives a term of the loss; None for none
Reduce: TypeAlias = Callable[[Outputs, Batch], Sums]  # gives something that is summed over micro-batches


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether something is a dict or like one, in a form that a type checker learns from.

    Args:
        value: anything.

    Returns:
        Whether it has keys and values.
    """
    return isinstance(value, Mapping)


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether something is a list or a tuple, in a form that a type checker learns from.

    Args:
        value: anything.

    Returns:
        Whether it is; texts and tensors are none.
    """
    return isinstance(value, list | tuple)
