"""`SharpConfig`: a method as flat settings, for the command line, YAML and JSON; the only reader of strings."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_sharp import _presets as presets
from hf_sharp._methods.base import Method
from hf_sharp._perturbation import schedules

METHODS: dict[str, Callable[..., Method]] = {  # every function that hf_sharp._presets exports
    name: preset for name, preset in sorted(vars(presets).items()) if inspect.isfunction(preset)
}
SCHEDULES: dict[str, Callable[[float, float], schedules.Schedule | float]] = {
    "constant": lambda rho, end: schedules.Constant(rho),
    "linear": schedules.Linear,
    "cosine": schedules.Cosine,
    "follows_lr": schedules.FollowsLearningRate,
    "zero_during_warmup": lambda rho, end: schedules.ZeroDuringWarmup(rho),
}
ENDLESS = ("constant", "zero_during_warmup")  # schedules without an end of their own
SCHEDULE_OPTIONS = ("rho_schedule", "rho_end")
CALL_IT = " A preset or class makes a method when it is called: sam(), not sam."


def options_of(method: str) -> tuple[str, ...]:
    """The options that a method takes.

    Args:
        method: a name in `METHODS`.

    Returns:
        The preset's keywords, and the two of the radius' schedule where there is a radius.

    Raises:
        ValueError: if there is no such method.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"There is no method '{method}'.{_nearest(method, METHODS)} Known: {', '.join(METHODS)}.")
    own = tuple(inspect.signature(METHODS[method]).parameters)
    return own + SCHEDULE_OPTIONS if "rho" in own else own


def _nearest(name: object, known: Collection[str]) -> str:
    found = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean '{found[0]}'?" if found else ""


@dataclass
class SharpConfig:
    """Settings of a sharpness-aware method; what is None is the preset's default.

    Args:
        method: name of the preset.
        rho: radius of the perturbation.
        eta: of the adaptive ball (asam, sam_on, tram) or the Fisher metric (fisher_sam).
        on: which tensors asam and sam_on's adaptive ball adapt to.
        keep: share of the entries that fsam perturbs.
        every: how many steps fsam uses a mask, looksam a reused part.
        fisher: how fsam estimates the Fisher diagonal.
        scope: over what fsam takes the largest entries.
        outside: what fsam does with biases, embeddings and BatchNorm.
        embeddings: by what fsam tells embeddings.
        renormalise: whether fsam's masked perturbation has the full radius.
        samples: rows for fsam's per-sample Fisher, draws of randomized_smoothing.
        ball: of sam_on.
        rho_min: radius of gsam at learning rate zero.
        alpha: weight of what gsam removes, looksam reuses, gam adds.
        minimize_fp: which of its two forms gsam has.
        gamma: weight of the sharpness in wsam.
        sigma: share of the mean in friendly_sam; noise of tram, randomized_smoothing and flat_lora.
        lam: old mean kept by friendly_sam; weight of the term that mesa and the penalties add.
        theta: weight of the present gradient in vasso.
        reference: what tram compares outputs with.
        kl: which divergence tram takes.
        scale: times tram's divergence.
        max_radius: tram's largest radius.
        r: length of the differences of gam and the penalties.
        mu: how far ahead curvature_regularization looks; strength of bar.
        kind: of bar, by gradients or by weights.
        rank: of bi_lora's auxiliary adapter.
        decay: how much of the old average mesa keeps.
        temperature: of mesa's and saf's divergence.
        lag: how many visits ago saf looks.
        fraction: share of the window for the ascent of sam and its kin.
        per_rank: whether each rank of sam and its kin ascends by its own rows.
        interval: the method at every so many steps only.
        start: share of training that is plain before.
        rho_schedule: how the radius varies.
        rho_end: the radius at the end of a schedule, or at learning rate zero.

    Example:
        >>> SharpConfig(method="fsam", rho=0.01, keep=0.2).build().cost
        2.0
    """

    method: str = field(default="sam", metadata={"help": f"Method: {', '.join(METHODS)}."})
    rho: float | None = field(default=None, metadata={"help": "Radius of the perturbation."})
    eta: float | None = field(
        default=None, metadata={"help": "asam, sam_on, tram: added to |w|; fisher_sam: Fisher weight."}
    )
    on: str | None = field(default=None, metadata={"help": "asam, sam_on: adapt on 'weights' or 'all'."})
    keep: float | None = field(default=None, metadata={"help": "fsam: share of the entries perturbed, in (0, 1]."})
    every: int | None = field(
        default=None, metadata={"help": "fsam: steps between masks; looksam: between SAM steps."}
    )
    fisher: str | None = field(default=None, metadata={"help": "fsam: 'batch' or 'per_sample'."})
    scope: str | None = field(default=None, metadata={"help": "fsam: largest entries, 'global' or per 'tensor'."})
    outside: str | None = field(
        default=None, metadata={"help": "fsam: bias, embeddings, BatchNorm 'always' or 'never'."}
    )
    embeddings: str | None = field(default=None, metadata={"help": "fsam: told by 'modules' or by 'names'."})
    renormalise: bool | None = field(default=None, metadata={"help": "fsam: give the masked perturbation radius rho."})
    samples: int | None = field(
        default=None, metadata={"help": "fsam: rows for its Fisher; randomized_smoothing: draws."}
    )
    ball: str | None = field(default=None, metadata={"help": "sam_on: 'l2' or 'adaptive'."})
    rho_min: float | None = field(default=None, metadata={"help": "gsam: radius at learning rate zero."})
    alpha: float | None = field(
        default=None, metadata={"help": "gsam: part removed; looksam: weight of the reused part; gam: of flatness."}
    )
    minimize_fp: bool | None = field(default=None, metadata={"help": "gsam: descend the perturbed loss (default)."})
    gamma: float | None = field(default=None, metadata={"help": "wsam: weight of the sharpness in [0, 1)."})
    sigma: float | None = field(
        default=None,
        metadata={"help": "friendly_sam: share of the mean; tram, randomized_smoothing, flat_lora: noise."},
    )
    lam: float | None = field(
        default=None, metadata={"help": "friendly_sam: old mean kept; mesa, saf, penalties: weight of the term."}
    )
    theta: float | None = field(default=None, metadata={"help": "vasso: weight of the present gradient."})
    reference: str | None = field(
        default=None, metadata={"help": "tram: 'previous', 'pretrained', 'noise' or 'fisher'."}
    )
    kl: str | None = field(default=None, metadata={"help": "tram: 'forward', 'reverse' or 'symmetric'."})
    scale: float | None = field(default=None, metadata={"help": "tram: times the divergence."})
    max_radius: float | None = field(default=None, metadata={"help": "tram: the radius is at most this."})
    r: float | None = field(default=None, metadata={"help": "gam, penalties: length of the differences."})
    mu: float | None = field(
        default=None, metadata={"help": "curvature_regularization: length of the look ahead; bar: strength."}
    )
    kind: str | None = field(default=None, metadata={"help": "bar: 'n' (by gradients) or 'o' (by weights)."})
    rank: int | None = field(default=None, metadata={"help": "bi_lora: rank of the auxiliary adapter."})
    decay: float | None = field(default=None, metadata={"help": "mesa: share of the old average kept."})
    temperature: float | None = field(default=None, metadata={"help": "mesa, saf: divides the logits."})
    lag: int | None = field(default=None, metadata={"help": "saf: with the outputs of how many visits ago."})
    fraction: float | None = field(
        default=None, metadata={"help": "sam and its kin: share of the window for the ascent, in (0, 1]."}
    )
    per_rank: bool | None = field(
        default=None, metadata={"help": "sam, asam, sam_on, fisher_sam: each rank ascends by its own rows (DDP)."}
    )
    interval: int | None = field(default=None, metadata={"help": "The method at every so many steps only."})
    start: float | None = field(default=None, metadata={"help": "Share of training that is plain before."})
    rho_schedule: str | None = field(default=None, metadata={"help": f"Radius over time: {', '.join(SCHEDULES)}."})
    rho_end: float | None = field(default=None, metadata={"help": "Last radius of a schedule (default 0)."})

    def build(self) -> Method:
        """The method that these settings describe.

        Returns:
            The method.

        Raises:
            ValueError: if there is no such method, or an option is set that it does not take, or a value cannot be
                right.
        """
        taken, given = options_of(self.method), self.to_dict()
        del given["method"]
        foreign = [name for name in given if name not in taken]
        if foreign:
            takes = f"It takes {', '.join(taken)}." if taken else "It takes no options."
            raise ValueError(f"Method '{self.method}' has no option {', '.join(foreign)}. {takes}")
        preset = METHODS[self.method]
        schedule, end = given.pop("rho_schedule", None), given.pop("rho_end", None)
        if schedule is None and end is not None:
            raise ValueError("rho_end belongs to a rho_schedule, and none is set: add rho_schedule='linear', for one.")
        if schedule is not None:
            if schedule not in SCHEDULES:
                raise ValueError(f"rho_schedule is one of {', '.join(SCHEDULES)}; got {schedule!r}.")
            if end is not None and schedule in ENDLESS:
                raise ValueError(f"The schedule '{schedule}' has no end, so rho_end says nothing: leave it out.")
            rho = given.get("rho", inspect.signature(preset).parameters["rho"].default)
            given["rho"] = SCHEDULES[schedule](rho, 0.0 if end is None else end)
        return preset(**given)

    def to_dict(self) -> dict[str, Any]:
        """The method and the options that are set.

        Returns:
            A flat dict that JSON and YAML can hold.
        """
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SharpConfig:
        """The config of a flat dict.

        Args:
            settings: as `to_dict` gives it.

        Returns:
            The config.

        Raises:
            ValueError: if a key is not an option of any method.
        """
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown:
            method = settings.get("method", "sam")
            raise ValueError(
                f"No method has an option {', '.join(map(str, unknown))}.{_nearest(unknown[0], options_of(method))} "
                f"'{method}' takes {', '.join(options_of(method))}."
            )
        return cls(**settings)

    @classmethod
    def from_json_file(cls, path: str | Path) -> SharpConfig:
        """The config in a JSON file.

        Args:
            path: the file, such as a checkpoint's `sharp_config.json`.

        Returns:
            The config.

        Raises:
            ValueError: if the file is not such a record, or records a method that was not made from settings.
        """
        saved = read_record(path)
        if "repr" in saved and saved.get("settings") is None:
            raise ValueError(
                f"{path} records the method {saved['repr']}, which no settings describe; build it in Python."
            )
        return cls.from_dict(saved["settings"] if "repr" in saved else saved)


def read_record(path: str | Path) -> dict[str, Any]:
    """What a `sharp_config.json` says.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        ValueError: if it is not a JSON object.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); it was cut short or changed by hand. Take that of another checkpoint."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} is not a record of a method: give a checkpoint's sharp_config.json, or an object of settings."
        )
    return record


MethodLike = Method | SharpConfig | Mapping[str, Any] | str | None


def read_method(method: MethodLike) -> tuple[Method | None, SharpConfig | None]:
    """What a door was given as `method=`.

    Args:
        method: a `Method`, a `SharpConfig`, a dict of its settings, a preset's name, or None.

    Returns:
        The method, and the settings it came from if any.

    Raises:
        ValueError: if it is none of these, or names no method.
    """
    if method is None or isinstance(method, Method):
        return method, None
    if isinstance(method, str):
        config = SharpConfig(method=method)
    elif isinstance(method, Mapping):
        config = SharpConfig.from_dict(method)
    elif isinstance(method, SharpConfig):
        config = method
    else:
        raise ValueError(
            "method is a Method, a SharpConfig, a dict of settings, a preset's name "
            f"({', '.join(METHODS)}) or None; got {method!r}.{CALL_IT if callable(method) else ''}"
        )
    return config.build(), config
