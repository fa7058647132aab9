"""`SharpConfig`: a method as flat settings, for the command line, YAML and JSON; the only reader of strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_sharp._checks import check_kind
from hf_sharp._methods.base import Method
from hf_sharp._methods.preset import check_option, kinds_of
from hf_sharp._presets.fields import SCHEDULE_OPTIONS, SCHEDULES, MethodName, Options, schedule_settings
from hf_sharp._presets.names import METHODS, nearest, options_of
from hf_sharp._presets.texts import defaults_of

ENDLESS = ("constant", "zero_during_warmup")  # schedules without an end of their own
BROKEN = "It was cut short or changed by hand. Take that of another checkpoint."
CALL_IT = " A preset or class makes a method when it is called: sam(), not sam."


class SharpConfig(Options):
    """Settings of a sharpness-aware method: its name and its options; what is None is the preset's default.

    Its fields are the keywords of all presets, and `rho_schedule` and `rho_end` for a radius that varies: a dataclass
    that `HfArgumentParser` makes flags of. `hf-sharp methods fsam` lists those that a method takes.

    Args:
        method: name of the preset.
        **options: those of the method, by keyword.

    Example:
        >>> SharpConfig(method="fsam", rho=0.01, keep=0.2).build().cost
        2.0
    """

    def __repr__(self) -> str:
        return f"SharpConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

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
        for name, value in given.items():
            if name in SCHEDULE_OPTIONS:
                check_kind(value, name, [str if name == "rho_schedule" else float])
            else:
                check_option(value, name, kinds_of(preset)[name])
        schedule, end = given.pop("rho_schedule", None), given.pop("rho_end", None)
        if schedule is None and end is not None:
            raise ValueError("rho_end belongs to a rho_schedule, and none is set: add rho_schedule='linear', for one.")
        if schedule is not None:
            if schedule not in SCHEDULES:
                raise ValueError(f"rho_schedule is one of {', '.join(SCHEDULES)}; got {schedule!r}.")
            if end is not None and schedule in ENDLESS:
                raise ValueError(f"The schedule '{schedule}' has no end, so rho_end says nothing: leave it out.")
            rho = given.get("rho", defaults_of(preset)["rho"])
            given["rho"] = SCHEDULES[schedule](rho, 0.0 if end is None else end)
        return preset(**given)

    def to_dict(self) -> dict[str, Any]:
        """The method and the options that are set.

        Returns:
            A flat dict that JSON and YAML can hold.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

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
            known = ("method", *options_of(method))
            raise ValueError(
                f"No method has an option {', '.join(map(str, unknown))}.{nearest(unknown[0], known)} "
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
        settings = saved["settings"] if "repr" in saved else saved
        if not isinstance(settings, dict):
            raise ValueError(f"{path} has {settings!r:.80} where the settings belong. {BROKEN}")
        return cls.from_dict(settings)


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read ({error}). {BROKEN}") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} is not a record of a method: give a checkpoint's sharp_config.json, or an object of settings."
        )
    return record


def settings_of(method: Method) -> dict[str, Any] | None:
    """The settings of a method that a preset has made, in whatever form it was asked for.

    Args:
        method: a method.

    Returns:
        Its name under "method" and all its options, those by default too, as `SharpConfig.from_dict` takes them; None
        for a method that was put together from classes.
    """
    if method._call is None:
        return None
    schedule = schedule_settings(method._call["rho"]) if "rho" in method._call else {}
    return {**method._call, **schedule}


MethodLike = Method | SharpConfig | Mapping[str, Any] | MethodName | None


def read_method(method: MethodLike) -> tuple[Method | None, SharpConfig | None]:
    """The method of what a user gave as `method=`, in any of its forms.

    Args:
        method: a `Method`, a `SharpConfig`, a dict of its settings, a preset's name, or None.

    Returns:
        The method, and the settings it came from if any; those of a preset's call too.

    Raises:
        ValueError: if it is none of these, or names no method.
    """
    if method is None:
        return None, None
    if isinstance(method, Method):
        settings = settings_of(method) or {}
        return method, SharpConfig.from_dict(settings) if settings.get("method") in METHODS else None
    if isinstance(method, str):
        config = SharpConfig.from_dict({"method": method})
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
