"""What forward passes read and move beside the trainable weights, so that a repeated pass begins where the first did.

Buffers, attributes of modules, frozen parameters, generators, what a loss object or a trainer writes down. Before a
pass all of it is copied shallowly; after the pass only what moved is kept. Later passes go back by it.
"""

# pyright: reportPrivateUsage=false
# The dicts in which a module keeps its buffers, parameters and children have no public name.

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

from torch import Tensor, nn

from hf_sharp._engine.contents import NAMES
from hf_sharp._engine.names import NamesOf, difference
from hf_sharp._engine.records import Change, Record, together
from hf_sharp._engine.walk import Reader, Walk
from hf_sharp._engine.watched import SMALL, Watch
from hf_sharp._tensors.shards import sharded

# Attributes that every module has and no forward writes: hooks, and the dicts that are looked at by themselves.
EVERY_MODULES = frozenset(vars(nn.Module())) - {"training"}
WRAPPERS = ("torch.distributed.", "torch.nn.parallel.", "torch._dynamo.", "deepspeed.", "accelerate.")


class ForwardState:
    """What forward passes read and move beside the trainable weights.

    Example:
        >>> import torch
        >>> model = nn.BatchNorm1d(2)
        >>> state = ForwardState({"model": model}, model.parameters)
        >>> before, changes = state.record(), []
        >>> _ = model(torch.randn(3, 2))  # the first pass
        >>> changes.append(state.changes(before))
        >>> with state.kept():
        ...     state.rewind(changes)
        ...     int(model.num_batches_tracked)
        0
        >>> int(model.num_batches_tracked)
        1

    What nobody can see from outside is not looked after: class attributes and globals, streams of libraries in C, and
    objects of libraries' classes, optimizers and data sets among them.

    Args:
        roots: modules, trainers and loss functions by the names to use in messages. Of an object that is no module the
            attributes; of a bound method those of its object; of a function its closure and default values.
        trainable: gives the parameters that the engine itself moves; they and their gradients are left alone.
        without: names of attributes of roots (no modules) that are not looked into.
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        trainable: Callable[[], Collection[Tensor]],
        without: Collection[str] = (),
    ) -> None:
        self._roots = {name: root for name, root in roots.items() if root is not None}
        self._without = frozenset(without)
        self._watch = Watch(trainable)
        self._reader = Reader(self._watch)
        self._open: list[list[Record | Change]] = []  # for each `kept`, what puts its state back, from last to first
        self._build({})

    def record(self) -> Record:
        """Record the state before a pass. It takes about 2 microseconds a module.

        Returns:
            The record, for `changes`.
        """
        while True:
            record = Record()
            walk = Walk(record, self._reader)
            self._watch.begin()
            self._modules(walk)
            for name, root in self._roots.items():
                self._root(walk, name, root)
            hidden = {key: found for key, found in walk.modules.items() if key not in self._inside}
            if list(hidden) == self._hidden:
                return record
            self._build(hidden)

    def changes(self, before: Record) -> Change:
        """What moved since a record. The record is emptied.

        Args:
            before: the record.

        Returns:
            What moved, with its earlier values.

        A large integer buffer that moved is a RuntimeError: it is not copied, because such buffers are quantised
        weights.
        """
        change, tables, lost = self._moved(before)
        _complain(tables, lost)
        before.clear()
        return change

    def put_back_to(self, before: Record) -> None:
        """Undo what moved since a record, as far as there are copies.

        Args:
            before: the record of a pass that was cut off.
        """
        self._moved(before)[0].undo()

    @contextmanager
    def kept(self) -> Generator[None]:
        """Whatever moves inside is afterwards what it was before; a large integer buffer that moved is an error.

        Yields:
            Nothing.
        """
        layers: list[Record | Change] = [self.record()]
        self._open.append(layers)
        passed = False
        try:
            yield
            passed = True
        finally:
            tables, lost = self._close(layers)
        if passed:
            _complain(tables, lost)

    def rewind(self, changes: Sequence[Change]) -> None:
        """Inside `kept`: go back to the state in which the first of some passes began.

        Args:
            changes: of that pass and of all passes after it, in their order.

        Raises:
            RuntimeError: outside `kept`.
        """
        if not self._open:
            raise RuntimeError("`rewind` is for the inside of `kept`, which knows the state to come back to.")
        layers = self._open[-1]
        self._peel(layers, 1)
        base = layers[0]
        assert isinstance(base, Record)
        self._moved(base)[0].undo()
        change = together(changes)
        if change:
            layers.append(change.inverse())
            change.undo()
            layers.append(self.record())

    def put_back(self) -> bool:
        """Put back what the innermost open `kept` recorded, and close it: for an outer handler of interrupts.

        An interrupted call is finished by another one. `kept` itself does nothing afterwards.

        Returns:
            Whether a `kept` was open.
        """
        if not self._open:
            return False
        self._close(self._open[-1])
        return True

    def _close(self, layers: list[Record | Change]) -> tuple[list[str], list[str]]:
        """Undo all layers, once; what could not be undone is named."""
        found = self._peel(layers, 0)
        self._open = [other for other in self._open if other is not layers]
        return found

    def _peel(self, layers: list[Record | Change], count: int) -> tuple[list[str], list[str]]:
        """Undo the last layers, until so many are left."""
        tables: list[str] = []
        lost: list[str] = []
        while len(layers) > count:
            layer = layers[-1]
            if isinstance(layer, Record):
                layer, *names = self._moved(layer)
                tables += names[0]
                lost += names[1]
            layer.undo()
            layers.pop()
        return tables, lost

    def _moved(self, record: Record) -> tuple[Change, list[str], list[str]]:
        change = Change()
        for before in record.names:
            for names, earlier, order in before.names.moved(before):
                earlier = {k: old for k, old in earlier.items() if not _gathered(names.get(k), old)}
                if earlier:
                    change.names.append((names, earlier, order))
        for item, kind, copy in record.contents:
            if kind is NAMES:
                earlier = difference(item, copy)
                if earlier:
                    change.names.append((item, earlier, ()))
            elif not kind.same(item, copy):
                change.contents.append((item, kind, copy))
        change.tensors, tables, lost = self._watch.moved(record.tensors)
        return change, tables, lost

    def _build(self, hidden: dict[int, tuple[str, nn.Module]]) -> None:
        """Learn which modules there are; `hidden` are those that only an attribute holds."""
        self._hidden = list(hidden)
        memo: set[nn.Module] = set()
        modules: list[tuple[str, nn.Module]] = []
        for name, root in self._roots.items():
            if isinstance(root, nn.Module):
                modules += root.named_modules(memo, name)
        self._inside = {id(module) for _, module in modules}
        for name, module in hidden.values():
            modules += cast("Iterator[tuple[str, nn.Module]]", module.named_modules(memo, name))
        owners = [(name, type(module).__name__, module) for name, module in modules]
        self._children = NamesOf([(name, cls, module._modules) for name, cls, module in owners])
        self._attributes = NamesOf(
            [(name, cls, vars(module)) for name, cls, module in owners if not _wraps(module)], EVERY_MODULES
        )
        self._buffers = NamesOf([(name, cls, module._buffers) for name, cls, module in owners])
        self._parameters = NamesOf([(name, cls, module._parameters) for name, cls, module in owners])
        self._known_children = self._children.take()

    def _modules(self, walk: Walk) -> None:
        """Record the modules' own dicts, buffers and frozen parameters, and walk through their attributes."""
        if not self._known_children.unmoved():
            self._build({})
        children, buffers = self._known_children, self._buffers.take()
        parameters, attributes = self._parameters.take(), self._attributes.take()
        walk.record.names += [attributes, buffers, parameters, children]
        for (owner, _, key), buffer in zip(buffers.places, buffers.values(), strict=True):
            if buffer is not None:
                walk.tensor(f"{owner}.{key}", buffer, buffer=True)
        for (owner, _, key), parameter in zip(parameters.places, parameters.values(), strict=True):
            if parameter is not None and not parameter.requires_grad:
                walk.tensor(f"{owner}.{key}", parameter)
        for place, value in zip(attributes.places, attributes.values(), strict=True):
            if type(value) not in self._reader.dull:
                walk.attribute(*place, value)

    def _root(self, walk: Walk, name: str, root: Any) -> None:
        """Record a root that is no module."""
        while isinstance(root, MethodType):
            root = root.__self__
        if isinstance(root, nn.Module):
            walk.modules[id(root)] = name, root
            return
        cls = type(root).__name__
        if isinstance(root, FunctionType):
            for key in ("__closure__", "__defaults__", "__kwdefaults__"):
                walk.attribute(name, cls, key, getattr(root, key))
        found, bound = getattr(root, "__dict__", None), isinstance(root, partial)
        if not isinstance(found, dict) or bound:
            walk.attribute(name, cls, "self", root)
            return
        names = cast("dict[str, Any]", found)
        walk.record.contents.append((names, NAMES, dict(names)))
        for key, value in names.items():
            if type(value) not in self._reader.dull and key not in self._without:
                walk.attribute(name, cls, key, value)


def _gathered(now: Any, before: Any) -> bool:
    """Whether an entry is none of ours: FSDP2 puts what it gathered in the parameters' place and takes it away."""
    return isinstance(now, Tensor) and isinstance(before, Tensor) and sharded(now) != sharded(before)


def _wraps(module: nn.Module) -> bool:
    """Whether a module is a library's wrapper around the model, whose attributes are the library's own books."""
    forwards = (cls.__module__ for cls in type(module).__mro__ if "forward" in vars(cls))
    return any(f"{name}.".startswith(WRAPPERS) for name in forwards)


def _complain(tables: list[str], lost: list[str]) -> None:
    if tables:
        raise RuntimeError(
            f"The forward pass changes the integer buffers {tables} of over {SMALL} entries, which a second pass "
            "would change twice. Keep such counters in a floating-point buffer."
        )
    if lost:
        warnings.warn(
            f"The forward pass changes {lost} in place, of which there was no copy, so that repeated passes of this "
            "step change it once more. From now on it is copied. State of the model is better a buffer "
            "(`register_buffer`), which is copied from the first pass on; what is none should stay out of the "
            "training forward.",
            stacklevel=3,
        )
