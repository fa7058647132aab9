"""`AcceleratorHost`: what hosts that run on Accelerate have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_sharp._engine import rows
from hf_sharp._engine.facts import StepFacts
from hf_sharp._engine.host import Host
from hf_sharp._engine.rounding import grids_of
from hf_sharp._engine.switches import eager
from hf_sharp._engine.weights import buffer_copies
from hf_sharp._integrations.labels import shifts_labels
from hf_sharp._integrations.momentum import momentum_of
from hf_sharp._tensors.vector import alike

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


class Schedule(NamedTuple):
    """Where a training is; see `StepFacts`."""

    step: int
    total_steps: int | None
    warmup_steps: int | None
    lr: float
    lr_max: float
    seed: int


class AcceleratorHost(Host):
    """Parameters, learning rates, loss scale and ranks as Accelerate has them."""

    def __init__(self) -> None:
        self.wrapped: Any = None  # the model as the loop calls it
        self._known: tuple[Any, dict[str, nn.Parameter]] = (None, {})
        self._no_subsets: str | None = None
        self.added: Mapping[str, nn.Parameter] = MappingProxyType({})  # what the method has in the optimizer
        self._call: tuple[Any, dict[str, Any]] | None = None
        self._inputs: tuple[dict[str, Tensor], dict[str, int]] = {}, {}

    @property
    @abstractmethod
    def accelerator(self) -> Any:
        """The Accelerator that has prepared model and optimizer."""

    @property
    @abstractmethod
    def optimizer(self) -> Any:
        """The prepared optimizer, None before there is one."""

    @property
    def model(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model inside its wrappers, those of DDP and torch.compile."""
        return self.accelerator.unwrap_model(self.wrapped, keep_torch_compile=False)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
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
    @abstractmethod
    def schedule(self) -> Schedule:
        """Step, lengths and learning rates, as far as the loop knows them."""

    def facts(self) -> StepFacts:
        """As Accelerate, the optimizer and the loop have them."""
        scaler, parameters = self.accelerator.scaler, self.parameters
        loss_scale, scaling = torch.ones((), device=self.accelerator.device), False
        if scaler is not None and scaler.is_enabled():
            loss_scale, scaling = scaler.scale(loss_scale), True  # read without waiting for the device
        return StepFacts(
            parameters=parameters,
            **self.schedule._asdict(),
            loss_scale=loss_scale,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            sharded=self.sharded,
            inflation=self.inflation,
            shifts_labels=shifts_labels(self.model),
            autocast=self._autocast,
            skips_overflows=scaling,
            added=self.added,
            find_grids=lambda: self._grids(parameters),
        )

    def _grids(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.dtype | None]:
        """The formats that FSDP's and autocast's casts make."""
        self.reshard()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        gathered = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
        return grids_of(parameters, self.model.modules(), self._autocast, gathered)

    @property
    def inflation(self) -> float:
        """1: the loss is a mean over the window."""
        return 1.0

    @property
    def _autocast(self) -> torch.dtype | None:
        return {"no": None, "bf16": torch.bfloat16}.get(str(self.accelerator.mixed_precision), torch.float16)

    @property
    def ranks(self) -> int:
        """Accelerate's number of processes."""
        return self.accelerator.num_processes

    @property
    def keeps_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Not where DDP hands out views of its buckets."""
        return not getattr(self.wrapped, "gradient_as_bucket_view", False)

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks, as FSDP2 does it."""
        return bool(getattr(self.accelerator, "is_fsdp2", False))

    def recompute(self, weights: Mapping[str, Tensor]) -> Any:
        """The model inside, called with what it was called with in this pass."""
        if self._call is None:
            raise ValueError(
                "The loss does not call the model, so there are no outputs to look at. Call the model in the "
                "loss, or use a method of gradients alone, such as SAM."
            )
        args, keywords = self._given()
        buffers = buffer_copies(self.model)  # a graph may have saved the buffers themselves
        return functional_call(self.model, {**buffers, **weights}, args, keywords)

    def _given(self) -> tuple[Any, dict[str, Any]]:
        """What the model was called with in this pass: a forward that changes its inputs in place has another now."""
        assert self._call is not None
        (args, keywords), (copied, before) = self._call, self._inputs
        moved = rows.changed({**keywords, **{str(i): arg for i, arg in enumerate(args)}}, copied, before)
        values = {name: copied[name].clone() for name in moved}
        args = tuple(values.get(str(index), arg) for index, arg in enumerate(args))
        return args, {name: values.get(name, value) for name, value in keywords.items()}

    @contextmanager
    def watched(self) -> Generator[list[Any]]:
        """While open, the model's calls are remembered for `recompute`.

        Yields:
            A list to which the outputs of each call are added.
        """
        outputs: list[Any] = []

        def before(module: nn.Module, args: Any, keywords: Any) -> None:
            self._call = (args, dict(keywords))
            named = {**keywords, **{str(index): arg for index, arg in enumerate(args)}}
            self._inputs = rows.copies(named), rows.versions(named)

        handles: list[Any] = []

        def remove() -> None:
            for handle in handles:
                handle.remove()

        model = self.model
        with self.undo.region(remove), eager(self.undo.region):  # compiled code draws other dropout than `recompute`
            handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(model.register_forward_hook(lambda module, args, output: outputs.append(output)))
            yield outputs

    @contextmanager
    def replaced(self, owner: Any, name: str, replacement: Any) -> Generator[None]:
        """While open, `owner.name` is the replacement.

        Args:
            owner: an object.
            name: of one of its attributes.
            replacement: what it is meanwhile.

        Yields:
            Nothing.
        """
        had, original = name in vars(owner), getattr(owner, name)

        def put_back() -> None:
            if had:
                setattr(owner, name, original)
            else:
                vars(owner).pop(name, None)

        with self.undo.region(put_back):
            setattr(owner, name, replacement)
            yield

    def unsynced(self) -> AbstractContextManager[Any]:
        """Accelerate's `no_sync`, as loops use it for all but a window's last micro-batch."""
        return self._reducing(False) if self.sharded else self._unreduced()

    @contextmanager
    def _unreduced(self) -> Iterator[None]:
        model = self.wrapped
        kept = getattr(model, "require_backward_grad_sync", None)  # of DDP

        def put_back() -> None:
            if kept is not None:
                model.require_backward_grad_sync = kept

        with self.undo.region(put_back), self.accelerator.no_sync(model):
            yield

    def synced(self) -> AbstractContextManager[Any]:
        """Every backward reduces and scatters."""
        return self._reducing(True)

    @contextmanager
    def _reducing(self, wanted: bool) -> Generator[None]:
        """Afterwards what the loop has at this micro-batch; Accelerate's `no_sync` would switch reduction on."""
        kept = self.accelerator.sync_gradients or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        with self.undo.region(lambda: self.wrapped.set_requires_gradient_sync(bool(kept))):
            self.wrapped.set_requires_gradient_sync(wanted)
            yield

    def reshard(self) -> None:
        """FSDP2 keeps what it has gathered of some modules until a backward, and puts it in the parameters' place."""
        if self.sharded:
            for module in self.model.modules():
                if callable(getattr(module, "reshard", None)):
                    module.reshard()  # pyright: ignore[reportCallIssue]

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
