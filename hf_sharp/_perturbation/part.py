"""What methods are made of: frozen settings, and state that is saved with the checkpoint and can be rolled back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from hf_sharp._engine.landscape import Landscape

State = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A piece of a method (a ball, a mask, a method itself): fields are settings, `_state` is what training changes.

    Subclasses are frozen dataclasses. A value in `_state` is an int, a float, a tensor, or a dict of tensors keyed by
    parameter name; it is *replaced*, never changed in place, so that a step which fails is undone by putting the old
    values back.
    """

    remembers = False  # whether it has state at all, so that a checkpoint without it is noticed

    @property
    def needs(self) -> frozenset[str]:
        """What a door must provide, keys of `WANTED` in `refusals.py`."""
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
        """The parameters that are looked around in, for the note at the start of training.

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
        """What the note at the start of training says in place of the share of trainables that `moved` gives.

        Args:
            landscape: the model's landscape, without data.

        Returns:
            The end of a sentence that begins with the method; None where `moved` says it all, the default.
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all state by what `state_dict` returned.

        Args:
            state: the flat dict.

        Raises:
            ValueError: if it holds state of a part that this method does not have.
        """
        known = dict(self.named_parts())
        nested: dict[str, State] = {path: {} for path in known}
        for key, value in state.items():
            path, _, name = key.partition(":")
            if path not in known:
                raise ValueError(
                    f"The saved state holds '{key}', but {self!r} has no part '{path}'. Load it with the method that "
                    "saved it, or start without that state."
                )
            entry, slash, parameter = name.partition("/")
            if slash:
                nested[path].setdefault(entry, {})[parameter] = value
            else:
                nested[path][entry] = value
        self.rollback(nested)
