"""How much memory a training step takes, also on devices that do not count it themselves."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


class LiveTensors(TorchDispatchMode):
    """While entered, counts the storages of all tensors that operations return; scratch inside kernels is not seen.

    Attributes:
        now: bytes alive.
        peak: the most there were; set it to `now` to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor)
        return out

    def track(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was there before; operations' results are counted as they come.

        Args:
            tensor: any.
        """
        storage: Any = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class PeakMemory(TrainerCallback):
    """Measures the most bytes that tensors hold at a time during a training step of this process.

    On CUDA it is the allocator's peak over all steps but the first two. Elsewhere the tensors alive during the third
    step are counted, which takes longer for it. By then the optimizer has its moments.

    Attributes:
        peak: the bytes; None before the third step.
    """

    made_before = 2

    def __init__(self) -> None:
        self.peak: int | None = None
        self._live: LiveTensors | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        if state.global_step != self.made_before:
            return
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
            return
        self._live = LiveTensors()
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
                self._live.track(thing)
        self._live.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self.peak, self._live = self._live.peak, None
        elif args.device.type == "cuda" and state.global_step > self.made_before:
            self.peak = torch.cuda.max_memory_allocated(args.device)
