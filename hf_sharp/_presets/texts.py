"""What a preset's docstring says, piece by piece: the one place where its words are written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

UNSAID = "not said"


def about(preset: Callable[..., Any]) -> str:
    """What a method is and whose.

    Args:
        preset: the preset.

    Returns:
        The first line of its docstring.
    """
    return _text(preset).partition("\n")[0]


def passes_of(preset: Callable[..., Any]) -> str:
    """How many passes over the batch a step of a method makes.

    Args:
        preset: the preset.

    Returns:
        Words and numbers, from the docstring's "Returns: The method, of cost ...;".
    """
    return _found(preset, r"The method, of cost ([^;]*);")


def memory_of(preset: Callable[..., Any]) -> str:
    """What a method keeps in memory beyond plain training.

    Args:
        preset: the preset.

    Returns:
        The number of copies of the trainables, in words, from the docstring's "Returns: ...; memory: ...".
    """
    return _found(preset, r"; memory: ([^.;]*)")


def options_told(preset: Callable[..., Any]) -> dict[str, str]:
    """What a docstring says of each option.

    Args:
        preset: the preset.

    Returns:
        The sentences of its Args by the option's name.
    """
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", _text(preset), flags=re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def defaults_of(preset: Callable[..., Any]) -> dict[str, Any]:
    """The options of a preset.

    Args:
        preset: the preset.

    Returns:
        Their defaults by name, in the order of its signature.
    """
    return {option.name: option.default for option in inspect.signature(preset).parameters.values()}


def _text(preset: Callable[..., Any]) -> str:
    return inspect.getdoc(preset) or ""


def _found(preset: Callable[..., Any], pattern: str) -> str:
    found = re.search(pattern, " ".join(_text(preset).split()))
    return UNSAID if found is None else found[1]
