"""`hf-sharp methods` (or `python -m hf_sharp methods`): the methods, what they cost, and their options.

Everything printed is read from the presets and their docstrings, so that there is one place to keep true.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap

from hf_sharp._presets.fields import SCHEDULE_OPTIONS
from hf_sharp._presets.names import METHODS, nearest, options_of
from hf_sharp._presets.texts import about, defaults_of, memory_of

WIDTH = 110
NOTE = (
    "Passes: forward and backward passes over the batch at each step; plain training makes 1. Memory: copies of the "
    "trainable parameters beyond plain training. One method in full: hf-sharp methods NAME"
)


def signature_of(name: str) -> str:
    """The options of a method with their defaults, as they are written in Python.

    Args:
        name: a name in `METHODS`.

    Returns:
        `rho=0.05, start=0.0`, for example.
    """
    return ", ".join(f"{option}={default!r}" for option, default in defaults_of(METHODS[name]).items()) or "no options"


def table() -> str:
    """All methods, the cheapest first, a paragraph each: name, passes, memory, what it is, options with defaults.

    Returns:
        Text for a terminal.
    """
    lines = [f"{'method':<26}{'passes':<8}memory", ""]
    for name in sorted(METHODS, key=lambda name: METHODS[name]().cost):
        lines.append(f"{name:<26}{f'{METHODS[name]().cost:.3g}':<8}{memory_of(METHODS[name])}")
        for text in (about(METHODS[name]), signature_of(name)):
            lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    return "\n".join([*lines, *textwrap.wrap(NOTE, WIDTH)])


def card(name: str) -> str:
    """One method in full: its preset's docstring, and its flags.

    Args:
        name: a name in `METHODS`.

    Returns:
        Text for a terminal.
    """
    flags = " ".join(f"[--{option} ...]" for option in options_of(name))
    schedule = f"\n{' and '.join(SCHEDULE_OPTIONS)} make the radius vary." if "--rho " in flags else ""
    usage = textwrap.fill(f"--method {name} {flags}".strip(), WIDTH, subsequent_indent="    ")
    return (
        f"{name}({signature_of(name)})\n\n{inspect.getdoc(METHODS[name])}\n\nOn the command line:\n{usage}{schedule}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print what was asked for.

    Args:
        arguments: those of the command line if None.
    """
    parser = argparse.ArgumentParser(prog="hf-sharp", description="Sharpness-aware fine-tuning: what there is.")
    commands = parser.add_subparsers(dest="command", required=True)
    methods = commands.add_parser("methods", help="list the methods, or explain one")
    methods.add_argument("name", nargs="?", help="explain this one")
    name = parser.parse_args(arguments).name
    if name is not None and name not in METHODS:
        parser.error(f"there is no method '{name}'.{nearest(name, METHODS)} Known: {', '.join(METHODS)}")
    print(table() if name is None else card(name))


if __name__ == "__main__":
    main()
