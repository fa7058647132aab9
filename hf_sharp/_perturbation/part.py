"""What methods are made of: frozen settings, and state that is saved with the checkpoint and can be rolled back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from hf_sharp._engine.landscape import Landscape
from hf_sharp._perturbation.kept import ANYTHING, FINITE, NUMBER, ByParameter, Kind, UnfitState

State = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A piece of a method (a ball, a mask, a method itself): fields are settings, `_state` is what training changes.

    Subclasses are frozen dataclasses. A value in `_state` is an int, a float, a tensor, or a dict of tensors keyed by
    parameter name; it is *replaced*, never changed in place, so that a step which fails is undone by putting the old
    values back.

    Attributes:
        remembers: whether it has state at all, so that a checkpoint without it is noticed. A dict says more: what each
            entry of `_state` is (`kept.py`), by which saved state is checked. True stands for finite numbers, and
            tensors by parameter name, each of its parameter's shape.
    """

    remembers: ClassVar[bool | Mapping[str, Kind]] = False
    weighs: ClassVar[bool] = False  # whether it weighs the host's loss or gradient against what has a size of its own
    apart: ClassVar[bool] = False  # whether it makes passes whose gradients are not reduced over ranks

    @property
    def needs(self) -> frozenset[str]:
        """What an integration must provide, keys of `WANTED` in `refusals.py`."""
        return frozenset()

    _state: State = field(default_factory=dict, init=False, repr=False, compare=False)

    def named_parts(self, path: str = "") -> Iterator[tuple[str, Part]]:
        """This part and all parts among its fields, in order, each with its dotted path.

        Args:
            path: the path of this part itself.

        Yields:
            Pairs of path and part; the path of the part called on is `path`.
        """
        yield path, self
        for name, part in self._parts():
            yield from part.named_parts(f"{path}.{name}".lstrip("."))

    def _parts(self) -> Iterator[tuple[str, Part]]:
        """The parts among the fields, and those in fields that are dicts."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, Part):
                yield setting.name, value
            elif isinstance(value, dict):
                yield from ((key, inner) for key, inner in value.items() if isinstance(inner, Part))

    def check(self, landscape: Landscape) -> None:
        """Refuse before training what cannot be right for this model. The default has nothing to refuse.

        Args:
            landscape: the model's landscape, without data.
        """

    def begin(self, landscape: Landscape) -> None:
        """Called before every step's first pass, also at steps that a combinator leaves out. The default does nothing.

        Args:
            landscape: the step's, nothing evaluated yet.
        """

    def perturbed(self, landscape: Landscape) -> dict[str, float]:
        """The parameters that are perturbed, for the note at the start of training.

        Args:
            landscape: the model's landscape, without data.

        Returns:
            The (mean) share of entries that move, by parameter name; by default what the parts among the fields say.
        """
        shares: dict[str, float] = {}
        for _, part in self._parts():
            for name, share in part.perturbed(landscape).items():
                shares[name] = max(share, shares.get(name, 0.0))
        return shares

    def start_note(self, landscape: Landscape) -> str | None:
        """What the note at the start of training says in place of the share of trainables that `perturbed` gives.

        Args:
            landscape: the model's landscape, without data.

        Returns:
            The end of a sentence that begins with the method; None where `perturbed` says it all, the default.
        """
        del landscape
        return None

    def adds(self, landscape: Landscape) -> dict[str, Tensor]:
        """Parameters that this part trains beside the model's; `landscape.facts.added` holds them from then on.

        They are in the optimizer, without weight decay, and nowhere in the model: evaluation, saved weights, clipping
        and the gradient's norm do not know them. Checkpoints of the training hold them.

        Args:
            landscape: the model's landscape, without data.

        Returns:
            Their start values by name, each on its device; by default there are none.
        """
        del landscape
        return {}

    def snapshot(self) -> dict[str, State]:
        """The state of all parts as it is now, to give to `rollback`; no tensor is copied.

        Returns:
            State by path.
        """
        return {path: dict(part._state) for path, part in self.named_parts()}

    def rollback(self, snapshot: Mapping[str, State]) -> None:
        """Put back what `snapshot` returned.

        Args:
            snapshot: state by path.
        """
        for path, part in self.named_parts():
            part._state.clear()
            part._state.update(snapshot.get(path, {}))

    def changed_since(self, snapshot: Mapping[str, State]) -> bool:
        """Whether any state was replaced since `snapshot` was taken.

        Args:
            snapshot: state by path.

        Returns:
            True if a value was added, removed or replaced.
        """
        for path, part in self.named_parts():
            before = snapshot.get(path, {})
            if before.keys() != part._state.keys() or any(before[k] is not v for k, v in part._state.items()):
                return True
        return False

    def reset(self) -> None:
        """Forget all state, as at the start of training."""
        self.rollback({})

    def state_dict(self) -> State:
        """All state, flat: `path:key` to a number or a tensor, `path:key/parameter name` to a parameter's tensor.

        Returns:
            The flat dict; empty for a method without state.
        """
        flat: State = {}
        for path, part in self.named_parts():
            for key, value in part._state.items():
                if isinstance(value, dict):
                    flat.update({f"{path}:{key}/{name}": tensor for name, tensor in value.items()})
                else:
                    flat[f"{path}:{key}"] = value
        return flat

    def spread_state(self, landscape: Landscape) -> None:
        """Spread loaded state over the ranks as the parameters are.

        Args:
            landscape: the model's landscape, without data.
        """
        for _, part in self.named_parts():
            for key, value in part._state.items():
                if isinstance(value, dict):
                    part._state[key] = landscape.facts.named(landscape.facts.vector(value))

    def kept_names(self, landscape: Landscape) -> Collection[str]:
        """The parameters that this part keeps a tensor for, where a saved state does not say how many there were.

        Args:
            landscape: the model's landscape, without data.

        Returns:
            Their names; by default all that are trained.
        """
        return landscape.facts.names

    def check_state(self, state: Mapping[str, Any], path: str, landscape: Landscape) -> None:
        """Compare saved state with the model; what the entries have to do with each other is for subclasses to add.

        Args:
            state: what is to become `_state`.
            path: of this part, for the message.
            landscape: the model's landscape, without data.

        Raises:
            UnfitState: if it does not fit.
        """
        for key, value in state.items():
            self._kind(key, value, path).check(f"{path}:{key}", value, landscape)
        lacking = set(self._declared) - set(state)
        if state and lacking:
            raise UnfitState(f"'{path}:{min(lacking)}' is missing")

    def _kind(self, key: str, value: Any, path: str) -> Kind:
        if not self.remembers or (self._declared and key not in self._declared):
            own = "" if self.remembers else " (if it does, write `remembers = True` in the class)"
            raise UnfitState(f"{type(self).__name__} keeps no '{path}:{key}'{own}")
        own = {dict: ANYTHING, Tensor: FINITE}.get(type(value), NUMBER)
        return self._declared.get(key, own)

    @property
    def _declared(self) -> Mapping[str, Kind]:
        return self.remembers if isinstance(self.remembers, Mapping) else {}

    def state_sizes(self) -> dict[str, int]:
        """How many tensors each entry has that is a dict, so that one which is lost on the way is missed.

        Returns:
            Numbers by `path:key/`; 0 for an entry that there is not yet.
        """
        sizes: dict[str, int] = {}
        for path, part in self.named_parts():
            dicts = [key for key, kind in part._declared.items() if kind.is_dict]
            for key in dict.fromkeys((*dicts, *part._state)):
                value = part._state.get(key, {})
                if isinstance(value, dict):
                    sizes[f"{path}:{key}/"] = len(value)
        return sizes

    def load_state_dict(self, state: Mapping[str, Any], landscape: Landscape | None = None) -> None:
        """Replace all state by what `state_dict` returned.

        Args:
            state: the flat dict, with `state_sizes` in it or not.
            landscape: the model's landscape, without data, to compare the state with before it is taken; None to take
                it as it is.

        Raises:
            ValueError: if it holds state of a part that this method does not have.
            UnfitState: if it does not fit the model.
        """
        known = dict(self.named_parts())
        nested: dict[str, State] = {path: {} for path in known}
        sizes: dict[str, Any] = {}
        for key, value in state.items():
            path, _, name = key.partition(":")
            if path not in known:
                raise ValueError(
                    f"The saved state holds '{key}', but {self!r} has no part '{path}'. Load it with the method that "
                    "saved it, or start without that state."
                )
            entry, slash, parameter = name.partition("/")
            if not slash:
                nested[path][entry] = value
            elif not parameter:
                sizes[key] = value
            elif not isinstance(tensors := nested[path].setdefault(entry, {}), dict):
                raise UnfitState(f"'{path}:{entry}' is one value and several")
            else:
                tensors[parameter] = value
        if landscape is not None:
            for path, part in known.items():
                part._check_sizes(nested[path], path, sizes, landscape)
                part.check_state(nested[path], path, landscape)
        self.rollback(nested)

    def _check_sizes(self, state: State, path: str, sizes: Mapping[str, Any], landscape: Landscape) -> None:
        """Refuse saved state from which tensors are lost; entries that were empty are put into it."""
        dicts = {key: kind for key, kind in self._declared.items() if kind.is_dict}
        if not state and any(f"{path}:{key}/" not in sizes for key in dicts):
            raise UnfitState(f"it holds nothing of what {type(self).__name__} keeps ({', '.join(dicts)})")
        for key in dict.fromkeys((*dicts, *(key for key, value in state.items() if isinstance(value, dict)))):
            tensors, size = state.get(key, {}), sizes.get(f"{path}:{key}/")
            named = isinstance(dicts.get(key), ByParameter)
            lost = sorted(set(self.kept_names(landscape)) - set(tensors)) if named else []
            if (state and lost) if size is None else size != len(tensors):
                of = "" if size is None else f" of {size!r:.20}"
                which = f"; {', '.join(lost[:3])} may be missing" if lost else ""
                raise UnfitState(f"'{path}:{key}' has {len(tensors)}{of} tensors{which}")
            if state:
                state.setdefault(key, {})
