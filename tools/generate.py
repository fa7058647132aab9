"""Writes what follows from the methods' files: lists of names, types for editors, tables and lists of the pages.

    make generated      # writes; a test fails while a file differs from what this program would write

A method's options, defaults, cost and memory are written once, in its preset's signature and docstring. Here they are
carried to `hf_sharp/__init__.py` and its like, `fields.pyi`, README.md, `docs/` and `mkdocs.yml`, between marks. In
tables the last column is a person's (a measured time, where a default comes from), and so is the order of rows and
lists: both are read from the file and kept; what is new comes last.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "hf_sharp"
BASES = {"base", "ascent", "sometimes", "preset"}  # of methods: what other files build on, not methods themselves
SHARED = ("interval", "start", "fraction", "per_rank")  # options that docs/methods/schedules.md explains for all
WIDTH = 119


# ---- what there is, read without importing it -------------------------------------------------------------------


def is_marked(node: ast.ClassDef | ast.FunctionDef, mark: str) -> bool:
    """Whether a class or function has a decorator of this name."""
    names = (item.func if isinstance(item, ast.Call) else item for item in node.decorator_list)
    return any(isinstance(name, ast.Name) and name.id == mark for name in names)


def found(package: str, kind: type, mark: str, leave: Collection[str] = ()) -> dict[str, str]:
    """Public classes or functions with a decorator, in a package's files: name -> module."""
    names = {}
    for path in sorted((LIBRARY / package).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kind) and path.stem not in leave and is_marked(node, mark):  # type: ignore[arg-type]
                names[node.name] = f"hf_sharp.{package}.{path.stem}"  # type: ignore[attr-defined]
    return names


def classes(package: str) -> dict[str, str]:
    """The methods' classes: name -> module."""
    own = {"Method": "hf_sharp._methods.base"} if package == "_methods" else {}
    return own | found(package, ast.ClassDef, "dataclass", leave=BASES)


def presets() -> dict[str, str]:
    """The presets: name -> module."""
    return {
        name: module
        for package in ("_methods", "_adapters", "_presets")
        for name, module in found(package, ast.FunctionDef, "remembered").items()
    }


# ---- Python -----------------------------------------------------------------------------------------------------


def exports(names: Mapping[str, str]) -> list[str]:
    """Lines that give names out, in the order that ruff keeps."""

    def place(item: tuple[str, str]) -> tuple[str, int, str]:
        name, module = item
        return module, 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name.lower()

    return [f"from {module} import {name} as {name}" for name, module in sorted(names.items(), key=place)]


def package_text(path: Path, names: Mapping[str, str]) -> str:
    """A package's `__init__.py`: its docstring, and the names."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return "\n".join([f'"""{docstring}"""', "", *exports(names)]) + "\n"


def public_text(path: Path) -> str:
    """`hf_sharp/__init__.py`: all lines but those of methods and presets are a person's."""
    text = path.read_text(encoding="utf-8")
    for package, names in {
        "_methods": classes("_methods"),
        "_adapters": classes("_adapters"),
        "_presets": presets(),
    }.items():
        lines = exports(dict.fromkeys(names, f"hf_sharp.{package}"))
        pattern = rf"(?:from hf_sharp\.{package} import .*\n)+"
        text = re.sub(pattern, "\n".join(lines) + "\n", text)
    return text


def stub_text() -> str:
    """`fields.pyi`: what editors and type checkers read of `fields.py`."""
    from hf_sharp._presets.fields import options_among
    from hf_sharp._presets.names import METHODS

    names = ",\n".join(f'    "{name}"' for name in METHODS)
    lines = []
    for name, option in options_among(METHODS).items():
        words = textwrap.fill(option.help, WIDTH - 7, initial_indent="", subsequent_indent="    ")
        closing = '\n    """' if len(words.splitlines()[-1]) > WIDTH - 8 else '"""'
        lines.append(f'    {name}: {option.kind.__name__} | None = None\n    """{words}{closing}')
    return STUB.format(names=names, fields="\n".join(lines))


STUB = """\
# Written by `make generated` from the presets' signatures and docstrings.
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

from hf_sharp._perturbation.schedules import Schedule

MethodName = Literal[
{names},
]
SCHEDULES: dict[str, Callable[[float, float], Schedule]]
SCHEDULE_OPTIONS: tuple[str, ...]

def schedule_settings(rho: Any) -> dict[str, Any]: ...

class Option(NamedTuple):
    kind: type
    help: str

def options_among(methods: Mapping[str, Callable[..., Any]]) -> dict[str, Option]: ...
def declare(cls: type, methods: Mapping[str, Callable[..., Any]]) -> None: ...

@dataclass
class Options:
    method: MethodName = "sam"
    _: KW_ONLY
{fields}
"""


# ---- documentation ----------------------------------------------------------------------------------------------


def between(text: str, what: str, new: str, path: Path) -> str:
    """A page with another text between its marks for `what`."""
    pattern = re.compile(rf"(<!-- generated: {what} -->\n)(.*?)(\n<!-- end -->)", flags=re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{path} has no '<!-- generated: {what} -->' ... '<!-- end -->' to write between.")
    return pattern.sub(lambda mark: mark[1] + new + mark[3], text)


def inside(text: str, what: str) -> str:
    """What stands between the marks for `what`."""
    match = re.search(rf"<!-- generated: {what} -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)
    return match[1] if match else ""


def ordered(names: Iterable[str], present: Iterable[str]) -> list[str]:
    """Names in the order in which they are present; new ones last."""
    names, present = list(names), list(present)
    return sorted(names, key=lambda name: present.index(name) if name in present else len(present))


def key_of(line: str) -> str:
    """What a row of a table is about: the first thing in code marks."""
    match = re.search(r"`(\w+)`", line)
    return match[1] if match else ""


def table(head: list[str], rows: Mapping[str, list[str]], old: str, kept: bool) -> str:
    """A table in the order of the old one; with `kept`, its last column is the old one's."""
    before = {key_of(line): line for line in old.splitlines() if key_of(line)}
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in ordered(rows, before):
        cells = [cell.replace("|", r"\|") for cell in rows[name]]
        if kept:
            cells.append(re.split(r"(?<!\\)\|", before[name])[-2].strip() if name in before else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme_text(path: Path) -> str:
    """README's table of methods."""
    from hf_sharp._presets.names import METHODS
    from hf_sharp._presets.texts import about, memory_of, passes_of

    text, rows = path.read_text(encoding="utf-8"), {}
    for name, preset in METHODS.items():
        card = (
            f"[`{name}`](docs/methods/{name}.md)" if (ROOT / "docs/methods" / f"{name}.md").is_file() else f"`{name}`"
        )
        rows[name] = [card, about(preset).rstrip("."), passes_of(preset), memory_of(preset)]
    head = ["method", "what it does", "passes a step", "memory beyond plain"]
    return between(text, "methods", table(head, rows, inside(text, "methods"), kept=False), path)


def costs_text(path: Path) -> str:
    """The table of costs on the page that helps to choose."""
    from hf_sharp._presets.names import METHODS
    from hf_sharp._presets.texts import memory_of, passes_of

    text, rows = path.read_text(encoding="utf-8"), {}
    for name, preset in METHODS.items():
        card = f"[`{name}`]({name}.md)" if (path.parent / f"{name}.md").is_file() else f"`{name}`"
        rows[name] = [card, passes_of(preset), memory_of(preset)]
    head = ["preset", "passes", "memory", "measured time over plain"]
    return between(text, "costs", table(head, rows, inside(text, "costs"), kept=True), path)


def card_text(path: Path) -> str:
    """The options on a method's card: its flags, and a table."""
    from hf_sharp._presets.names import METHODS, options_of
    from hf_sharp._presets.texts import defaults_of, options_told

    text, name = path.read_text(encoding="utf-8"), path.stem
    defaults, told = defaults_of(METHODS[name]), options_told(METHODS[name])
    own = {option: default for option, default in defaults.items() if option not in SHARED}
    flags = [f"--{option} {default}" for option, default in own.items() if default is not None]
    flags += [f"[--{option} ...]" for option, default in own.items() if default is None]
    flags.append("[" + " ".join(f"--{option} {defaults[option]}" for option in SHARED if option in defaults) + "]")
    if "rho_schedule" in options_of(name):
        flags.append("[--rho_schedule linear --rho_end 0.0]")
    rows = {option: [f"`{option}`", written(default), told.get(option, "")] for option, default in own.items()}
    head = ["option", "default", "what it is", "where the default comes from"]
    lines = table(head, rows, inside(text, "options"), kept=True)
    return between(text, "options", f"\n{wrapped([f'--method {name}', *flags])}\n\n{lines}\n", path)


def wrapped(flags: list[str]) -> str:
    """A command as a block of code, its flags whole."""
    lines, indent = ["    " + flags[0]], "        "
    for flag in flags[1:]:
        if len(lines[-1]) + 1 + len(flag) > WIDTH:
            lines.append(indent + flag)
        else:
            lines[-1] += " " + flag
    return "\n".join(lines)


def written(value: Any) -> str:
    """A default as Python writes it."""
    return f'`"{value}"`' if isinstance(value, str) else repr(value)


def reference_text(path: Path) -> str:
    """The lists of presets and of methods' classes in the reference."""
    text = path.read_text(encoding="utf-8")
    for_adapters = {name for name, module in presets().items() if "._adapters." in module}
    lists = {
        "presets": presets().keys() - for_adapters,
        "presets for adapters": for_adapters,
        "classes": classes("_methods").keys() | classes("_adapters").keys(),
    }
    for what, names in lists.items():
        elsewhere = re.findall(r"^::: hf_sharp\.(\w+)$", between(text, what, "", path), flags=re.MULTILINE)
        present = re.findall(r"^::: hf_sharp\.(\w+)$", inside(text, what), flags=re.MULTILINE)
        entries = [f"::: hf_sharp.{name}" for name in ordered(sorted(names - set(elsewhere)), present)]
        text = between(text, what, "\n" + "\n\n".join(entries) + "\n", path)
    return text


def navigation_text(path: Path) -> str:
    """The cards' places in the navigation of the site."""
    text = path.read_text(encoding="utf-8")
    cards = sorted(card.stem for card in (ROOT / "docs/methods").glob("*.md") if card.stem in presets())
    pattern = r"(?: {6}- \w+: methods/\w+\.md\n)+"
    block = max(re.findall(pattern, text), key=len)
    lines = [f"      - {name}: methods/{name}.md\n" for name in ordered(cards, re.findall(r"- (\w+):", block))]
    return text.replace(block, "".join(lines))


# ---- all of it --------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """Write a file that differs, and say so."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


def names_wanted() -> dict[Path, str]:
    """The files that give names out, as they should be."""
    wanted = {LIBRARY / package / "__init__.py": classes(package) for package in ("_methods", "_adapters")}
    wanted[LIBRARY / "_presets" / "__init__.py"] = presets()
    texts = {path: package_text(path, names) for path, names in wanted.items()}
    return {**texts, LIBRARY / "__init__.py": public_text(LIBRARY / "__init__.py")}


def texts_wanted() -> dict[Path, str]:
    """The files made of the presets' words, as they should be; the names must be given out by now."""
    docs = ROOT / "docs"
    cards = {docs / "methods" / f"{name}.md" for name in presets() if name != "plain"}
    for card in sorted(cards):
        if not card.is_file():
            raise SystemExit(f"{card.relative_to(ROOT)} is missing: every preset has a card.")
    return {
        LIBRARY / "_presets" / "fields.pyi": stub_text(),
        ROOT / "README.md": readme_text(ROOT / "README.md"),
        ROOT / "mkdocs.yml": navigation_text(ROOT / "mkdocs.yml"),
        docs / "reference.md": reference_text(docs / "reference.md"),
        docs / "methods" / "index.md": costs_text(docs / "methods" / "index.md"),
        **{card: card_text(card) for card in sorted(cards)},
    }


def main() -> None:
    """Write what differs."""
    for path, text in names_wanted().items():
        write(path, text)
    for path, text in texts_wanted().items():
        write(path, text)


if __name__ == "__main__":
    main()
