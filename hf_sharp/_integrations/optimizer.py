"""`SharpOptimizer`: a sharpness-aware method for those who have a `torch.optim.Optimizer` and a closure."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._engine.landscape import Landscape
from hf_sharp._integrations.attachment import Attachment
from hf_sharp._integrations.closure_host import ClosureHost
from hf_sharp._integrations.refusals import check_method, refuse_complex, refuse_line_search, refuse_needs
from hf_sharp._integrations.states import load_state, state_of, step_of
from hf_sharp._integrations.stepper import Stepper
from hf_sharp._methods.base import Method, added_by
from hf_sharp._methods.own import check_is_method

Closure = Callable[[], Any]
BETWEEN = ("torch", "accelerate", "hf_sharp")  # packages whose frames stand between a user's line and a step
SHARP = "sharp"  # the method's key in the state dict


class SharpOptimizer(torch.optim.Optimizer):
    """A base optimizer whose `step(closure)` steps on a sharpness-aware method's gradient.

    It is a true Optimizer that passes `accelerator.prepare`; parameter groups, state and defaults are the base's own,
    so that schedulers and checkpoints find what they expect. Prefer `SharpTrainer` or `SharpStep`: a closure sees one
    batch, so gradient accumulation, fp16 scaling and clipping of the final gradient are not in its reach.

    Args:
        optimizer: the base optimizer, not wrapped by Accelerate.
        method: the rule for getting a gradient.
        model: whose parameters these are; for methods that go by names or modules, and to keep BatchNorm's statistics
            and other buffers from moving twice.
        seed: of what methods draw.
        rounding: how shifts are added to 16-bit weights: "stochastic" or "nearest".

    Raises:
        ValueError: if the method cannot be right here; the message says why, and the way out.

    Example:
        >>> from hf_sharp import SAM, Perturbation
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SharpOptimizer(torch.optim.SGD([weight], lr=0.1), SAM(Perturbation(rho=0.05)))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        2.0
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        method: Method,
        model: nn.Module | None = None,
        seed: int = 42,
        rounding: str = "stochastic",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "step_was_skipped"):
            raise ValueError(
                f"SharpOptimizer goes around a plain torch optimizer, before accelerator.prepare; got {optimizer!r}."
            )
        check_is_method(method)
        refuse_line_search(optimizer)
        host = ClosureHost(optimizer, model)
        known = {"names"} if all(not n.startswith("parameter ") for n in host.parameters) else set()
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        several = running and torch.distributed.get_world_size() > 1
        refuse_needs(
            method,
            known
            | {"update"}
            | ({"modules"} if model is not None else set())
            | (set() if several else {"parameters"}),
            "A closure hides the data, and without model= there are no names. Pass model=, or use SharpTrainer or "
            "SharpStep",
        )
        self._set_up(optimizer, method, host, {"seed": seed, "rounding": rounding})
        landscape = Landscape(host)
        check_method(method, landscape, "Make the optimizer from the model's parameters, some with requires_grad.")
        around = (self._stepper.before_update, self._stepper.after_update)
        self._attachment.attach(optimizer, added_by(method, landscape), *around)

    def _set_up(
        self, base: torch.optim.Optimizer, method: Method, host: ClosureHost, settings: dict[str, Any]
    ) -> None:
        self.base, self.method, self._host, self._settings = base, method, host, settings
        host.seed = settings["seed"]
        self._stepper, self._warned = Stepper(method, host, settings["rounding"]), False
        self._attachment = Attachment()
        host.added = self._attachment.parameters

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made from: base, method (with what it keeps), model, settings; hooks are made anew.

        Returns:
            A dict.
        """
        own, given = dict(self._attachment.parameters), self._host.given
        steps = {"step": self._host.step, "largest": self._host.largest}
        return {"base": self.base, "method": self.method, "model": given, "added": own, **self._settings, **steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make this optimizer from what `__getstate__` gave.

        Args:
            state: that.
        """
        host = ClosureHost(state["base"], state["model"])
        host.step, host.largest = state["step"], state["largest"]
        self._set_up(state["base"], state["method"], host, {key: state[key] for key in ("seed", "rounding")})
        around = (self._stepper.before_update, self._stepper.after_update)
        self._attachment.attach_again(self.base, state["added"], *around)

    def __repr__(self) -> str:
        return f"SharpOptimizer({self.base!r}, {self.method!r})"

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # before __init__, or while unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's own list, so that schedulers write into what it steps by."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's own state, in which checkpoints and Accelerate find what they expect."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's own defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, whose parameters the method perturbs from then on.

        Args:
            param_group: as torch has it.
        """
        members = param_group["params"]
        members = members if isinstance(members, Tensor | set) else list(members)  # torch refuses sets by itself
        each = [members] if isinstance(members, Tensor) else members
        named = [member if isinstance(member, tuple) else ("of the new group", member) for member in each]
        refuse_complex({name: parameter for name, parameter in named if parameter.requires_grad})
        self.base.add_param_group({**param_group, "params": members})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the base's gradients, the method's own parameters' included.

        Args:
            set_to_none: as torch has it.
        """
        self.base.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Closure | None = None) -> Any:
        """With a closure, the method's gradient and then the base's step.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss; called as often as
                the method evaluates. Without one the base steps on the gradients that are there, which no method has
                seen: said once.

        Returns:
            The loss that the closure gave first.

        Raises:
            ValueError: under a gradient scaler, whose closures see gradients that nobody unscales.
        """
        if closure is None:
            self._say_once()
            return self.base.step()
        if _under_scaler():
            raise ValueError(
                "With fp16 gradient scaling a closure's gradients are never unscaled, and the optimizer would step on "
                "gradients thousands of times too long. Use SharpTrainer or SharpStep, or bf16."
            )
        self._host.loss = None
        self._stepper.begin_window([closure])
        self._stepper.micro_batch(closure, last=True)
        self._host.step += 1
        self.base.step()
        return self._host.loss

    def _say_once(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self._warned and any(bool(grad.ne(0).any()) for grad in grads):
            self._warned = True
            name = type(self.method).__name__
            warnings.warn(
                f"SharpOptimizer.step() without a closure steps the base optimizer: {name} had no part in this "
                "gradient. Pass a closure, or use SharpTrainer or SharpStep.",
                stacklevel=_level_of_caller(),
            )

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the method's state under "sharp".

        Returns:
            A new dict.
        """
        own = {"step": self._host.step, **state_of(self.method, self._attachment)}
        return {**self.base.state_dict(), SHARP: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or the base's own state dict.

        A method's state that does not fit this model and method is a ValueError, and nothing is taken from it.

        Args:
            state_dict: the dict.
        """
        own, landscape = dict(state_dict.get(SHARP, {})), Landscape(self._host)
        self._attachment.check(own)
        step = step_of(own)
        if SHARP in state_dict:
            load_state(own, self.method, self._attachment, landscape)
        else:
            self.method.reset()
        self._host.step = step
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != SHARP})


def _level_of_caller() -> int:
    """The `stacklevel` of the line outside of torch, Accelerate and this library that led to the warning here.

    Schedulers and Accelerate wrap `step`, so that how far up that line stands differs.

    Returns:
        The level.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    return level


def _under_scaler() -> bool:
    """Whether torch's gradient scaler is calling: Accelerate hands a closure through it, past torch's own guard."""
    code, frame = torch.amp.GradScaler.step.__code__, sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
