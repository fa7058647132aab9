"""`make_sharp`: any other Trainer class with a sharpness-aware method, and those of TRL ready made.

`SharpSFTTrainer`, `SharpDPOTrainer` and `SharpRewardTrainer` come into being when they are asked for: TRL is imported
by whoever uses them and by nobody else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from typing import Any, TypeVar, cast

from transformers import Seq2SeqTrainer, Trainer

from hf_sharp._integrations.refusals import refuse_class
from hf_sharp._integrations.signatures import SharpClass
from hf_sharp._integrations.trainer import SharpMixin, SharpSeq2SeqTrainer, SharpTrainer

T = TypeVar("T", bound=Trainer)
READY: dict[type[Trainer], type[Trainer]] = {Trainer: SharpTrainer, Seq2SeqTrainer: SharpSeq2SeqTrainer}
TRL = {"SharpSFTTrainer": "SFTTrainer", "SharpDPOTrainer": "DPOTrainer", "SharpRewardTrainer": "RewardTrainer"}


def make_sharp(trainer: type[T]) -> SharpClass[T]:
    """A sharpness-aware version of any Trainer class.

    What the class overrides (`compute_loss`, `training_step`, `log`) goes on working, and is called in every pass.
    What it writes into its attributes meanwhile (numbers, lists, dicts) counts once.

    Refused are classes that generate their data while they train or have arguments of the same names (`ValueError`),
    and what is no Trainer class (`TypeError`).

    Args:
        trainer: a subclass of `transformers.Trainer`.

    Returns:
        A subclass of it that takes `method=`, `rounding=` and `check_repeats=`, named `Sharp` + its name; the same
        class on every call.
        To be pickled it must be found: `SharpOwn = make_sharp(Own)` in the module that defines `Own`, or a class
        statement `class Better(make_sharp(Own))` anywhere.

    Example:
        >>> from transformers import Trainer
        >>> make_sharp(Trainer).__name__
        'SharpTrainer'
    """
    return cast("SharpClass[T]", _sharp_class(trainer))


@functools.cache
def _sharp_class(trainer: type[Trainer]) -> type[Trainer]:
    """What `make_sharp` returns, made once for each class."""
    if not isinstance(trainer, type) or not issubclass(trainer, Trainer):
        raise TypeError(f"make_sharp takes a subclass of transformers.Trainer, the class itself; got {trainer!r}.")
    if issubclass(trainer, SharpMixin):
        return trainer
    if trainer in READY:
        return READY[trainer]
    refuse_class(trainer)
    name = f"Sharp{trainer.__name__}"
    ours = trainer.__module__.split(".")[0] == "trl" and name in TRL
    contents = {
        "__init__": _init(trainer),
        "__doc__": f"`{trainer.__name__}` with the further arguments of `SharpMixin`.\n\n{trainer.__doc__ or ''}",
        "__module__": "hf_sharp" if ours else trainer.__module__,
    }
    return type(name, (SharpMixin, trainer), contents)


def _init(trainer: type[Trainer]) -> Any:
    """The mixin's `__init__`, which `help` and editors show with the arguments of the trainer and its own."""
    theirs = dict(inspect.signature(trainer.__init__).parameters)
    mixin = inspect.signature(SharpMixin.__init__).parameters
    own = {name: each for name, each in mixin.items() if each.kind == each.KEYWORD_ONLY}
    taken = sorted(own.keys() & theirs.keys())
    if taken:
        raise ValueError(
            f"{trainer.__name__} has an argument {' and '.join(taken)} of its own, which a sharpness-aware version "
            "needs for itself. Rename it."
        )

    @functools.wraps(trainer.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        SharpMixin.__init__(self, *args, **kwargs)

    parameters = sorted([*theirs.values(), *own.values()], key=lambda p: p.kind)
    vars(__init__)["__signature__"] = inspect.Signature(parameters)
    return __init__


def __getattr__(name: str) -> Any:
    """The ready-made versions of TRL's trainers, made at the first use of their name."""
    if name not in TRL:
        raise AttributeError(f"module 'hf_sharp' has no attribute '{name}'")
    if importlib.util.find_spec("trl") is None:
        raise ImportError(f"{name} needs TRL, which is not installed: pip install trl")
    return make_sharp(getattr(importlib.import_module("trl"), TRL[name]))
