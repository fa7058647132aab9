"""`SharpOptimizer`: a sharpness-aware method for those who have a `torch.optim.Optimizer` and a closure."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_sharp._engine.evaluation import Hook
from hf_sharp._engine.facts import StepFacts
from hf_sharp._engine.host import Host
from hf_sharp._engine.landscape import Landscape
from hf_sharp._integrations.attachment import Attachment
from hf_sharp._integrations.momentum import momentum_of
from hf_sharp._integrations.refusals import refuse_needs
from hf_sharp._integrations.stepper import Stepper
from hf_sharp._methods.base import Method, added_by
from hf_sharp._tensors.shards import gathered, sharded

Closure = Callable[[], Any]
SHARP = "sharp"  # the method's key in the state dict


class ClosureHost(Host):
    """A closure as a `Host`: it makes forward and backward of the whole batch, as torch has it.

    Args:
        optimizer: the base optimizer.
        model: whose names and modules the method may ask for, or None.
    """

    accumulates = False

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None) -> None:
        self.optimizer, self.step, self.seed = optimizer, 0, 0
        self.added: Mapping[str, nn.Parameter] = {}
        self.model = nn.Module() if model is None else model  # without one there are no buffers to look after
        self._given, self.named = model, _names(optimizer, model)
        self.loss: Any = None
        self._largest = 0.0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainables of the base optimizer's groups."""
        own = {id(p) for p in self.added.values()}
        held = [p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad and id(p) not in own]
        if any(sharded(p) and id(p) not in self.named for p in held):  # `accelerator.prepare` has sharded the model
            self.reshard()
            self.named = _names(self.optimizer, self._given)
        return {self.named.get(id(p), f"parameter {index}"): p for index, p in enumerate(held)}

    def facts(self) -> StepFacts:
        """Those of the base optimizer; no length of training is known, and a scaler is refused."""
        parameters, first = self.parameters, self.optimizer.param_groups[0]
        lr = float(first["lr"])
        self._largest = max(self._largest, lr)
        return StepFacts(
            parameters=parameters,
            step=self.step,
            total_steps=None,
            warmup_steps=None,
            lr=lr,
            lr_max=float(first.get("initial_lr", self._largest)),  # schedulers set it
            loss_scale=torch.ones((), device=next((p.device for p in parameters.values()), None)),
            seed=self.seed,
            sharded=any(sharded(p) for p in parameters.values()),
            added=self.added,
            find_grids=lambda: {n: p.dtype if p.dtype.itemsize == 2 else None for n, p in parameters.items()},
        )

    def reshard(self) -> None:
        """Of the model, where it is known; a backward has done it otherwise."""
        for module in self.model.modules():
            if callable(getattr(module, "reshard", None)):
                module.reshard()  # pyright: ignore[reportCallIssue]

    def normaliser(self, batches: Sequence[Any] | None) -> None:
        """The closure divides its loss itself."""

    def backward(
        self, batch: Any, normaliser: None, only: Sequence[nn.Parameter] | None, hook: Hook | None = None
    ) -> Tensor:
        """The closure; all gradients, whatever is asked for."""
        del normaliser, only, hook
        with torch.enable_grad():
            loss = batch()
        self.loss = loss if self.loss is None else self.loss
        value = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(0.0 if loss is None else float(loss))
        return value.sum()

    def forward(self, batch: Any) -> Any:
        """A closure has no outputs."""
        raise NotImplementedError

    def recompute(self, weights: Mapping[str, Tensor]) -> Any:
        """A closure has no outputs."""
        raise NotImplementedError

    def row_backward(self, row: Any) -> None:
        """A closure has no rows."""
        raise NotImplementedError

    def unsynced(self) -> AbstractContextManager[Any]:
        """The closure decides."""
        return nullcontext()

    def refuse_subsets(self, reason: str) -> None:
        """Nothing to refuse: a closure gives all gradients."""

    def momentum(self) -> dict[str, Tensor] | None:
        """The base optimizer's."""
        return momentum_of(self.optimizer, self.parameters)

    def mean_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """One process."""
        return tensors


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
        if not isinstance(method, Method):
            raise ValueError(
                f"method is a Method, such as sam(rho=0.05); got {method!r}. Call the preset, or build settings: "
                "SharpConfig(method='sam').build()."
            )
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
        host.seed = seed
        self.base, self.method, self._host = optimizer, method, host
        self._stepper, self._warned = Stepper(method, host, rounding), False
        landscape = Landscape(host)
        if not landscape.facts.names:
            raise ValueError(
                "The optimizer holds no trainable parameter, so there is nothing to perturb. Make it from the model's "
                "parameters, some of them with requires_grad."
            )
        for _, part in method.named_parts():
            part.check(landscape)
        self._attachment = Attachment()
        host.added = self._attachment.parameters
        around = (self._stepper.before_update, self._stepper.after_update)
        self._attachment.attach(optimizer, added_by(method, landscape), *around)

    def __repr__(self) -> str:
        return f"SharpOptimizer({self.base!r}, {self.method!r})"

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # before __init__, or while unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base's.

        Args:
            param_group: as torch has it.
        """
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's.

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
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the method's state under "sharp".

        Returns:
            A new dict.
        """
        own = gathered(self.method.state_dict()) | self._attachment.state_dict()
        own = {"step": self._host.step, **own}
        return {**self.base.state_dict(), SHARP: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or the base's own state dict.

        Args:
            state_dict: the dict.
        """
        own = dict(state_dict.get(SHARP, {}))
        self._attachment.check(own)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != SHARP})
        self._host.step = int(own.pop("step", 0))
        self.method.load_state_dict(self._attachment.load_state_dict(own))


def _names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[int, str]:
    if model is not None:
        return {id(p): name for name, p in model.named_parameters()}
    return {
        id(p): name
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


def _under_scaler() -> bool:
    """Whether torch's gradient scaler is calling: Accelerate hands a closure through it, past torch's own guard."""
    code, frame = torch.amp.GradScaler.step.__code__, sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
