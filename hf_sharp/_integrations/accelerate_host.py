"""`AcceleratorHost`: what hosts that run on Accelerate have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_sharp._engine.host import Host
from hf_sharp._engine.shift import Pool, displaced
from hf_sharp._integrations.labels import shifts_labels
from hf_sharp._integrations.momentum import momentum_of
from hf_sharp._tensors.shards import sharded
from hf_sharp._tensors.vector import alike, copy_

BUCKET = 25 * 2**20  # bytes, as in DDP


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Cut a list of tensors into parts that can be sent as one.

    Args:
        tensors: the tensors, the same ones on every rank.

    Returns:
        In their order: tensors of one dtype and device, of at most 25 MiB together; larger ones alone.
    """
    found: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        size += tensor.nbytes
        if not found or not alike(found[-1][:1], [tensor]) or size > BUCKET:
            found.append([])
            size = tensor.nbytes
        found[-1].append(tensor)
    return found


class AcceleratorHost(Host):
    """Parameters, learning rates, loss scale and ranks as Accelerate has them."""

    def __init__(self) -> None:
        self.wrapped: Any = None  # the model as the loop calls it
        self._known: tuple[Any, dict[str, nn.Parameter]] = (None, {})
        self._no_subsets: str | None = None
        self._call: tuple[Any, dict[str, Any]] | None = None

    @property
    @abstractmethod
    def accelerator(self) -> Any:
        """The Accelerator."""

    @property
    @abstractmethod
    def optimizer(self) -> Any:
        """The prepared optimizer, None before there is one."""

    @property
    def model(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unwrapped model."""
        return self.accelerator.unwrap_model(self.wrapped, keep_torch_compile=False)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's trainables by the model's names; before there is an optimizer, the model's trainables."""
        groups = self.groups
        key = [(id(p), p.requires_grad) for group in groups for p in group["params"]]
        if self._known[0] != key or not groups:
            self.reshard()
            inside = {id(p) for group in groups for p in group["params"]}
            named = self.model.named_parameters()
            chosen = {name: p for name, p in named if p.requires_grad and (id(p) in inside or not groups)}
            self._known = (key, chosen)
        return self._known[1]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return getattr(self.optimizer, "param_groups", [])

    @property
    def loss_scale(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The scaler's factor, read without waiting for the device."""
        one = torch.ones((), device=self.accelerator.device)
        scaler = self.accelerator.scaler
        return one if scaler is None or not scaler.is_enabled() else scaler.scale(one)

    @property
    def skips_overflows(self) -> bool:
        """With a scaler."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled()

    @property
    def rank(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Accelerate's process index."""
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Accelerate's number of processes."""
        return self.accelerator.num_processes

    @property
    def autocast(self) -> torch.dtype | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Accelerate's mixed precision."""
        mixed = str(self.accelerator.mixed_precision)
        return {"no": None, "bf16": torch.bfloat16}.get(mixed, torch.float16)

    @property
    def shifts_labels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """By the model's loss or class."""
        return shifts_labels(self.model)

    @property
    def sharded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Under FSDP2."""
        return bool(getattr(self.accelerator, "is_fsdp2", False))

    def again(self, batch: Any, weights: Mapping[str, Tensor]) -> Any:
        """The model inside, called with what it was called with in this pass."""
        del batch
        if self._call is None:
            raise ValueError(
                "The loss does not call the model, so there are no outputs to look at. Call the model in the "
                "loss, or use a method of gradients alone, such as SAM."
            )
        args, keywords = self._call
        if not self.sharded:
            return functional_call(self.model, dict(weights), args, keywords)
        held = {name: p for name, p in self.parameters.items() if name in weights}
        others = {name: tensor for name, tensor in weights.items() if name not in held}
        with self._at(list(held.values()), [weights[name] for name in held]):
            return functional_call(self.model, others, args, keywords)

    @contextmanager
    def _at(self, parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
        """While open, shards hold other values: sharded modules gather their own, whatever they are called with."""
        try:
            with displaced(parameters, Pool()), torch.no_grad():
                copy_(parameters, values)
                self.reshard()
                yield
        finally:
            self.reshard()

    @contextmanager
    def watched(self) -> Iterator[list[Any]]:
        """While open, the model's calls are remembered for `again`.

        Yields:
            A list to which the outputs of each call are added.
        """
        outputs: list[Any] = []

        def before(module: nn.Module, args: Any, keywords: Any) -> None:
            self._call = (args, dict(keywords))

        handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(lambda module, args, output: outputs.append(output)),
        ]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code draws other dropout than `again` can
                yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def unsynced(self) -> AbstractContextManager[Any]:
        """Accelerate's `no_sync`, as loops use it for all but a window's last micro-batch."""
        return self._reducing(False) if self.sharded else self.accelerator.no_sync(self.wrapped)

    def synced(self) -> AbstractContextManager[Any]:
        """Every backward reduces and scatters."""
        return self._reducing(True)

    @contextmanager
    def _reducing(self, wanted: bool) -> Iterator[None]:
        """Afterwards what the loop has at this micro-batch; Accelerate's `no_sync` would switch reduction on."""
        kept = self.accelerator.sync_gradients or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        self.wrapped.set_requires_gradient_sync(wanted)
        try:
            yield
        finally:
            self.wrapped.set_requires_gradient_sync(bool(kept))

    def reshard(self) -> None:
        """FSDP2 keeps what it has gathered of some modules until a backward, and puts it in the parameters' place."""
        if self.sharded:
            for module in self.model.modules():
                if callable(getattr(module, "reshard", None)):
                    module.reshard()  # pyright: ignore[reportCallIssue]

    def seen_in(self, parameter: nn.Parameter) -> torch.dtype | None:
        """The dtype to which FSDP casts what it gathers."""
        if not sharded(parameter):
            return None
        return getattr(self.accelerator.state.fsdp_plugin.mixed_precision_policy, "param_dtype", None)

    def momentum(self) -> dict[str, Tensor] | None:
        """That of the optimizer inside Accelerate's wrapper."""
        return None if self.optimizer is None else momentum_of(self.optimizer, self.parameters)

    def mean_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Accelerate's reduction, of as many tensors at once as fit into a bucket of DDP's size."""
        means: list[Tensor] = []
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]) if len(bucket) > 1 else bucket[0]
            parts = self.accelerator.reduce(flat, reduction="mean").reshape(-1).split([t.numel() for t in bucket])
            means += [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
        return means

    def subset_works(self, further: dict[str, bool]) -> bool:
        """Whether a backward towards some parameters alone is possible here; says once what it costs where not.

        Args:
            further: other reasons against it, and whether they hold.

        Returns:
            True where nothing stands against it.
        """
        reasons = {
            "gradients are reduced over ranks": self.ranks > 1,
            "reentrant gradient checkpointing needs the full backward": self._reentrant(),
            **further,
        }
        reason = next((text for text, holds in reasons.items() if holds), None)
        if reason is not None:
            self.refuse_subsets(reason)
        return self._no_subsets is None

    def refuse_subsets(self, reason: str) -> None:
        """Remembered as long as the host lives; the warning comes once."""
        if self._no_subsets is None:
            self._no_subsets = reason
            warnings.warn(
                f"The ascent of this method needs few gradients, but {reason}: all are computed, and a step costs "
                "the time of two full passes.",
                stacklevel=2,
            )

    def _reentrant(self) -> bool:
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(module, "gradient_checkpointing", False) and function is not None:
                return getattr(function, "keywords", {}).get("use_reentrant", True) is not False
        return False


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """While open, `owner.name` is the replacement.

    Args:
        owner: an object.
        name: of one of its attributes.
        replacement: what it is meanwhile.

    Yields:
        Nothing.
    """
    had, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
