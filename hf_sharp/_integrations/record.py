"""What is written down of a method: for trackers and the model card as columns, for checkpoints as a record."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hf_sharp._methods.base import Method
from hf_sharp._methods.sum import Sum
from hf_sharp._perturbation.part import Part
from hf_sharp._presets.config import settings_of

PREFIX = "sharp_"
PLAIN_VALUES = (bool, int, float, str, type(None))


def columns_of(method: Method | None) -> dict[str, Any]:
    """A method as one row of a table of experiments: `sharp_method` and `sharp_` + each of its settings.

    Args:
        method: a method, or None.

    Returns:
        Numbers, texts, booleans and None by name. A method that a preset has made has the preset's name and options;
        one that was put together from classes the class's name and fields, those of its parts with dots; terms of a
        `Sum` likewise, `sharp_forget.rho`.
    """
    if method is None:
        return {}
    return {PREFIX + name: plain_value(value) for name, value in _flat(method).items()}


def _flat(method: Method) -> dict[str, Any]:
    settings = settings_of(method)
    if settings is not None:
        return settings
    if isinstance(method, Sum):
        terms = {f"{name}.{key}": value for name, term in method.methods.items() for key, value in _flat(term).items()}
        return {"method": "Sum", **terms, **{f"{name}.weight": weight for name, weight in method.weights.items()}}
    return {"method": type(method).__name__, **_fields_of(method)}


def _fields_of(part: Part) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Method):
            flat.update({f"{field.name}.{key}": inner for key, inner in _flat(value).items()})
        elif isinstance(value, Part):
            flat[field.name] = type(value).__name__
            flat.update({f"{field.name}.{key}": inner for key, inner in _fields_of(value).items()})
        elif field.init:
            flat[field.name] = value
    return flat


def plain_value(value: Any) -> Any:
    """A value as a tracker or a flat file can hold it.

    Args:
        value: anything.

    Returns:
        A number, text, boolean or None as it is; anything else as Python writes it.
    """
    return value if isinstance(value, PLAIN_VALUES) else repr(value)


def record_of(method: Method | None, rounding: str) -> dict[str, Any]:
    """What `sharp_config.json` says.

    Args:
        method: the method.
        rounding: how shifts of 16-bit weights are rounded.

    Returns:
        The method as Python writes it under "repr"; under "settings" all settings of a preset's method, with the
        defaults of this release, as `SharpConfig.from_json_file` reads them, or None; rounding; and the version.
    """
    settings = None if method is None else settings_of(method)
    if settings is not None and not all(isinstance(value, PLAIN_VALUES) for value in settings.values()):
        settings = None  # a schedule without a name: no flat file can say it
    return {"repr": repr(method), "settings": settings, "rounding": rounding, "hf_sharp": _version()}


def _version() -> str | None:
    try:
        return version("hf_sharp")
    except PackageNotFoundError:  # used from its folder, not installed
        return None


def differences(saved: Mapping[str, Any], method: Method | None, rounding: str) -> list[str]:
    """How a checkpoint's method differs from the one that goes on.

    Args:
        saved: what the checkpoint's `sharp_config.json` says; empty if it has none. Of any release: what a key is
            missing for is not compared.
        method: the method that goes on.
        rounding: its rounding.

    Returns:
        A sentence for each difference.
    """
    here = {"repr": repr(method), "rounding": rounding}
    there = {**here, "repr": "None", **saved}
    return [
        f"The checkpoint was trained with {what}{there[key]}, and goes on with {what}{here[key]}."
        for key, what in (("repr", ""), ("rounding", "rounding="))
        if there[key] != here[key]
    ]


def card_section(method: Method, columns: Mapping[str, Any]) -> str:
    """The section of a model card that says how the gradient was got.

    Args:
        method: the method.
        columns: what trackers were told.

    Returns:
        Markdown.
    """
    rows = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in columns.items())
    table = f"| setting | value |\n|---|---|\n{rows}"
    return f"\n\n### Sharpness-aware training\n\n`{method!r}`, {method.cost:g} passes a step.\n\n{table}\n"


def tell_trackers(handler: Any, columns: Mapping[str, Any]) -> None:
    """Trackers log `args.to_dict()` when training begins: in that event, and at no other time, it has these columns.

    The Trainer's list of callbacks stays as it is, and its arguments too, but for the moment of the event.

    Args:
        handler: the Trainer's `callback_handler`.
        columns: what to add.
    """
    vars(handler).pop("on_train_begin", None)
    original = handler.on_train_begin

    def on_train_begin(args: Any, *others: Any, **kwargs: Any) -> Any:
        vars(handler).pop("on_train_begin", None)
        with _said_by(args, columns):
            return original(args, *others, **kwargs)

    handler.on_train_begin = on_train_begin


@contextmanager
def _said_by(arguments: Any, columns: Mapping[str, Any]) -> Generator[None]:
    """While open, `arguments.to_dict()` has the columns too."""
    original = arguments.to_dict
    arguments.to_dict = lambda: {**original(), **columns}
    try:
        yield
    finally:
        vars(arguments).pop("to_dict", None)
