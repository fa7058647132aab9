"""What parts keep from step to step, and how a saved state is compared with the model before anything uses it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from hf_sharp._engine.landscape import Landscape

UNFIT = (
    "The saved state does not fit: {what}. Resume with the model and the method that wrote it, or leave the state out "
    "(of a checkpoint, delete sharp_state.safetensors): the method then starts afresh."
)


class UnfitState(ValueError):
    """A saved state is not this model's or this method's.

    Args:
        what: says which value, and what it should be.
    """

    def __init__(self, what: str) -> None:
        super().__init__(UNFIT.format(what=what))


def check_tensor(place: str, value: Any, shape: Collection[int] | None, dtype: torch.dtype | None) -> None:
    """Check one saved tensor.

    Args:
        place: its key in the saved state.
        value: what stands there.
        shape: the shape that it must have, None for any.
        dtype: the dtype that it must have, None for any.

    Raises:
        UnfitState: if it is no such tensor, or has entries that are not finite.
    """
    if not isinstance(value, Tensor):
        raise UnfitState(f"'{place}' is {value!r:.80} and not a tensor")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise UnfitState(f"'{place}' has the shape {tuple(value.shape)}, and here it is {tuple(shape)}")
    if dtype is not None and value.dtype != dtype:
        raise UnfitState(f"'{place}' is of {value.dtype}, and here it is {dtype}")
    if value.layout != torch.strided:
        raise UnfitState(f"'{place}' has the layout {value.layout}")
    if not bool(value.isfinite().all()):
        raise UnfitState(f"'{place}' has entries that are not finite")


class Kind(ABC):
    """What one entry of a part's state is.

    Attributes:
        is_dict: whether it is a dict of tensors.
    """

    is_dict = False

    @abstractmethod
    def check(self, place: str, value: Any, landscape: Landscape) -> None:
        """Compare a saved value with the model.

        Args:
            place: its key in the saved state.
            value: what stands there.
            landscape: the model's landscape, without data.

        Raises:
            UnfitState: if it does not fit.
        """


class Number(Kind):
    """A finite number of at least 0.

    Args:
        kind: int or float; a float may be saved as a whole number.
    """

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def check(self, place: str, value: Any, landscape: Landscape) -> None:
        """A number, no boolean."""
        del landscape
        right = type(value) is int or (type(value) is float and self._kind is float and math.isfinite(value))
        if not right or value < 0:
            wanted = "whole number" if self._kind is int else "finite number"
            raise UnfitState(f"'{place}' is {value!r:.80}, and no {wanted} of at least 0")


class ByParameter(Kind):
    """A dict of tensors: the parameters' names, each with its parameter's shape.

    Args:
        dtype: from the parameter's dtype to the tensor's; None for any.
    """

    is_dict = True

    def __init__(self, dtype: Callable[[torch.dtype], torch.dtype] | None) -> None:
        self._dtype = dtype

    def check(self, place: str, value: Any, landscape: Landscape) -> None:
        """Names, shapes, dtypes, finiteness."""
        if not isinstance(value, dict):
            raise UnfitState(f"'{place}' is {value!r:.80}, and not a tensor for each parameter")
        known = dict(landscape.model.named_parameters()) | dict(landscape.facts.parameters)  # frozen since, too
        for name, tensor in value.items():
            if name not in known:
                raise UnfitState(f"'{place}/{name}' belongs to a parameter that this model has not")
            dtype = None if self._dtype is None else self._dtype(known[name].dtype)
            check_tensor(f"{place}/{name}", tensor, known[name].shape, dtype)


class Blocks(Kind):
    """A dict of tensors by number, such as rows of the data in blocks."""

    is_dict = True

    def check(self, place: str, value: Any, landscape: Landscape) -> None:
        """Names that are numbers, tensors that are finite."""
        del landscape
        if not isinstance(value, dict) or not all(str(name).isdecimal() for name in value):
            raise UnfitState(f"'{place}' has other names than numbers")
        for name, tensor in value.items():
            check_tensor(f"{place}/{name}", tensor, None, None)


class OneTensor(Kind):
    """A tensor by itself, of any shape, all of it finite."""

    def check(self, place: str, value: Any, landscape: Landscape) -> None:
        """Finiteness."""
        del landscape
        check_tensor(place, value, None, None)


LIKE_WEIGHTS = ByParameter(lambda dtype: dtype)
AT_LEAST_FLOAT32 = ByParameter(lambda dtype: torch.promote_types(dtype, torch.float32))
MASKS = ByParameter(lambda dtype: torch.bool)
BLOCKS = Blocks()
COUNT, NUMBER = Number(int), Number(float)
ANYTHING, FINITE = ByParameter(None), OneTensor()  # of a method that does not say what it keeps
