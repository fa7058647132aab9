"""What a method has in the optimizer: parameters of its own, and calls right before and after each update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._perturbation.kept import check_tensor

PREFIX = "added/"  # of the parameters' names in a saved state


class Attachment:
    """Joins a method to an optimizer, for every integration alike.

    Attributes:
        parameters: the parameters that the method trains beside the model's, by name. They are in a group of the
            optimizer that has no weight decay and the learning rate of the first group, and nowhere in the model.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._base: torch.optim.Optimizer | None = None
        self._handles: list[Any] = []

    def attach(
        self,
        optimizer: Any,
        values: Mapping[str, Tensor],
        before_update: Callable[[], None],
        after_update: Callable[[], None],
    ) -> None:
        """Put parameters into the optimizer, or start those that are in it already afresh, and listen to its updates.

        Args:
            optimizer: a torch optimizer, possibly inside Accelerate's wrapper.
            values: the parameters' start values by name, on their devices.
            before_update: called right before every update, not where a gradient scaler skips it.
            after_update: called right after it.
        """
        self.detach()
        base = base_of(optimizer)
        if base is self._base:
            self._restart(values)
        else:
            self._base = base
            self.parameters.clear()
            self.parameters.update({name: nn.Parameter(value.detach().clone()) for name, value in values.items()})
            if self.parameters:
                self._add_group(base)
        self._listen(base, before_update, after_update)

    def attach_again(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        before_update: Callable[[], None],
        after_update: Callable[[], None],
    ) -> None:
        """Listen to the copy of an optimizer that has the method's parameters in it already.

        Args:
            optimizer: a torch optimizer.
            parameters: the method's parameters in it, by name.
            before_update: called right before every update.
            after_update: called right after it.
        """
        self.detach()
        self._base = optimizer
        self.parameters.clear()
        self.parameters.update(parameters)
        self._listen(optimizer, before_update, after_update)

    def _listen(
        self, base: torch.optim.Optimizer, before_update: Callable[[], None], after_update: Callable[[], None]
    ) -> None:
        self._handles = [
            base.register_step_pre_hook(lambda stepping, *_: None if _skips(stepping) else before_update()),
            base.register_step_post_hook(lambda stepping, *_: None if _skips(stepping) else after_update()),
        ]

    def detach(self) -> None:
        """Listen no more; the parameters stay in the optimizer, where nothing moves them without gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters' values.

        Returns:
            Tensors by name, each name beginning with `PREFIX`.
        """
        return {f"{PREFIX}{name}": parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the parameters' values from a state.

        Args:
            state: a dict that holds what `state_dict` returned, among other things.
        """
        self.check(state)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[PREFIX + name])

    @staticmethod
    def without(state: Mapping[str, Any]) -> dict[str, Any]:
        """The rest of a state.

        Args:
            state: a dict that holds what `state_dict` returned, among other things.

        Returns:
            The other things.
        """
        return {key: value for key, value in state.items() if not key.startswith(PREFIX)}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state with other parameters than these.

        Args:
            state: a saved state.

        Raises:
            ValueError: if its parameters are not these, or have other shapes or dtypes, or are not finite.
        """
        saved = {key.removeprefix(PREFIX) for key in state if key.startswith(PREFIX)}
        if saved != set(self.parameters):
            kinds = [f"{len(s)} (such as {min(s)})" if s else "none" for s in (saved, set(self.parameters))]
            raise ValueError(
                f"The checkpoint's method trains parameters of its own: {kinds[0]}; this one: {kinds[1]}. The "
                "optimizer's state cannot fit both. Resume with the method and the adapters that wrote it, or load "
                "its weights and train without resuming."
            )
        for name, parameter in self.parameters.items():
            check_tensor(PREFIX + name, state[PREFIX + name], parameter.shape, parameter.dtype)

    def _restart(self, values: Mapping[str, Tensor]) -> None:
        assert self._base is not None
        shapes = {name: value.shape for name, value in values.items()}
        if shapes != {name: parameter.shape for name, parameter in self.parameters.items()}:
            raise ValueError(
                "The adapters are not those that the optimizer was made for. Make a new one, or a new Trainer."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
                parameter.grad = None
                self._base.state.pop(parameter, None)

    def _add_group(self, base: torch.optim.Optimizer) -> None:
        if hasattr(base.step, "_wrapped_by_lr_sched"):
            raise ValueError(
                "This method has parameters of its own in the optimizer, and a learning-rate scheduler has counted "
                "the optimizer's groups already. Make the scheduler afterwards: give the Trainer "
                "optimizers=(optimizer, None), build SharpStep or SharpOptimizer before the scheduler."
            )
        first = base.param_groups[0]
        named = "param_names" in first
        rate = first["lr"].clone() if isinstance(first["lr"], Tensor) else first["lr"]
        members = list(self.parameters.items()) if named else list(self.parameters.values())
        base.add_param_group({"params": members, "weight_decay": 0.0, "lr": rate})


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer that is stepping skips its update: fused ones are called after an overflow too."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)


def base_of(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper.

    Args:
        optimizer: a torch optimizer, wrapped or not.

    Returns:
        The innermost one.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
