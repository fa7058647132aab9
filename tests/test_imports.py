"""Which room may import which: the order below is the rule. A room imports the rooms above it in this list, no other.

Imports are read by `ast`, inside functions and under `if TYPE_CHECKING:` too. A new module needs no line here.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_sharp"

# Lowest floor first: what each room is for stands in its docstring.
FLOORS = (
    "_checks",
    "_extras",
    "_tensors",
    "_engine",
    "_perturbation",
    "_methods",
    "_adapters",
    "_presets",
    "_integrations",
    "unlearning",
    "evaluation",
    "recipes",
    "__main__",
    "",  # hf_sharp/__init__.py: the public names
)
# What a room takes from outside, beyond the standard library.
OUTSIDE = {
    "_tensors": {"torch"},
    "_engine": {"torch", "numpy"},  # numpy for its random stream only
    "_perturbation": {"torch"},
    "_methods": {"torch"},
    "_adapters": {"torch", "peft"},
    "_integrations": {"torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy"},
    "unlearning": {"torch", "transformers", "accelerate", "numpy"},
    "recipes": {"torch", "transformers", "scipy", "datasets", "tokenizers", "matplotlib"},
}
# `torch` above does not mean this: distribution belongs in the engine and the integrations.
FORBIDDEN = {room: {"torch.distributed"} for room in ("_perturbation", "_methods", "_adapters")}
# Packages of programs that are told apart by a base of their own: a program imports the base and no other program.
PROGRAMS = {"_methods": {"base", "ascent", "sometimes", "every", "after", "preset"}}


def room_of(module: str) -> str:
    """The room of a module, named without the package: "_methods.sam" -> "_methods"."""
    return module.split(".")[0]


def imported(source: str, known: set[str]) -> Iterator[str]:
    """Dotted names that a source imports; `from hf_sharp._engine import rows` counts as that module if it is known."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in known or not base.startswith((PACKAGE, ".")) else base
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def violations(module: str, source: str, known: set[str]) -> list[str]:
    """What a module's source imports against the rule, as sentences."""
    room = room_of(module)
    if room not in FLOORS:
        return [f"{module} is in no room of FLOORS"]
    below = set(FLOORS[: FLOORS.index(room) + 1])
    found = []
    for name in imported(source, known):
        top = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{module} imports {name}: imports are absolute")
        elif top == PACKAGE:
            inner = name.removeprefix(PACKAGE).lstrip(".")
            if room_of(inner) not in below or (not inner and room):
                found.append(f"{module} imports {name}, which is above it")
            elif room_of(inner) == room and room in PROGRAMS and not is_free(module, inner):
                found.append(f"{module} imports {name}, another program")
        elif any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN.get(room, ())):
            found.append(f"{module} imports {name}")
        elif top not in sys.stdlib_module_names and top not in OUTSIDE.get(room, ()):
            found.append(f"{module} imports {name}, which its room does not take")
    return found


def is_free(module: str, inner: str) -> bool:
    """Whether an import inside a package of programs is of a base, or made by the package's own `__init__`."""
    return "." not in module or inner.rpartition(".")[2] in PROGRAMS[room_of(module)]


def modules() -> dict[str, str]:
    """Name without the package -> source, of every module that there is."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


SOURCES = modules()
KNOWN = {f"{PACKAGE}.{name}".rstrip(".") for name in SOURCES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_only_what_its_room_may(module):
    assert violations(module, SOURCES[module], KNOWN) == []


def test_no_circle_of_modules():
    """Packages' `__init__` are left out: they only re-export, and whoever imports from one means what is behind it."""
    packages = {name for name in SOURCES if any(other.startswith(f"{name}.") for other in SOURCES)} | {""}
    graph = {}
    for module, source in SOURCES.items():
        names = (name.removeprefix(PACKAGE + ".") for name in imported(source, KNOWN) if name.startswith(PACKAGE))
        graph[module] = set() if module in packages else set(names) - packages
    assert circle(graph) == []


def test_no_permission_is_unused():
    used = {room: set() for room in FLOORS}
    for module, source in SOURCES.items():
        used[room_of(module)] |= {name.split(".")[0] for name in imported(source, KNOWN)}
    assert {room: taken - used[room] for room, taken in OUTSIDE.items() if taken - used[room]} == {}


def test_every_floor_is_a_room_and_few_are_enough():
    rooms = {room_of(module) for module in SOURCES}
    assert rooms == set(FLOORS)
    assert len(rooms - {""}) <= 16


def test_no_module_is_named_as_something_its_package_gives_out():
    """`from hf_sharp.x import y` must not depend on whether the module y was imported before."""
    for module, source in SOURCES.items():
        inside = {name.rpartition(".")[2] for name in SOURCES if name.rpartition(".")[0] == module and name}
        given = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if f"{node.module}.{alias.name}" not in KNOWN
        }
        assert not inside & given, module


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.name)
def test_recipes_are_flat(path):
    """A recipe imports the public library and no other recipe."""
    for name in imported(path.read_text(encoding="utf-8"), KNOWN):
        assert name.split(".")[0] not in ("recipes", "tests") and not name.startswith("."), name
        assert not (ROOT / "recipes" / f"{name.split('.')[0]}.py").exists(), name
        assert not any(part.startswith("_") for part in name.split(".") if name != "__future__"), name


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_what_tests_share_is_a_helper(path):
    """No test file is imported by another: what two of them need lives in tests/helpers, and says what it is for."""
    source = path.read_text(encoding="utf-8")
    assert not [name for name in imported(source, KNOWN) if name.rpartition(".")[2].startswith("test_")]
    assert path.parent.name != "helpers" or ast.get_docstring(ast.parse(source))


BROKEN = {
    "a method that knows the Trainer": ("_methods.sam", "from transformers import Trainer"),
    "inside a function": ("_methods.sam", "def f():\n    import accelerate"),
    "a method that knows ranks": ("_methods.sam", "import torch.distributed as dist"),
    "the same, from": ("_methods.sam", "from torch import distributed"),
    "the same, a name of it": ("_methods.base", "from torch.distributed import all_reduce"),
    "the same, by attribute": ("_methods.sam", "import torch\ntorch.distributed.get_rank()"),
    "a method that knows another": ("_methods.gsam", "from hf_sharp._methods.sam import SAM"),
    "a method that knows the presets": ("_methods.sam", "from hf_sharp import _presets"),
    "an engine that knows methods": ("_engine.landscape", "from hf_sharp._methods import SAM"),
    "an engine that knows one": ("_engine.landscape", "import hf_sharp._methods.sam"),
    "an arrow up, for types": (
        "_tensors.vector",
        "if TYPE_CHECKING:\n    from hf_sharp._engine.landscape import Landscape",
    ),
    "around by the package itself": ("_perturbation.balls", "from hf_sharp import SharpTrainer"),
    "the whole package": ("_perturbation.balls", "import hf_sharp"),
    "a relative import": ("_methods.sam", "from .base import Method"),
    "a relative import of a module": ("_perturbation.balls", "from . import vector"),
    "a package that is not listed": ("_tensors.vector", "import scipy.linalg"),
    "a room that only begins alike": ("_presets.names", "from hf_sharp._methods_extra import x"),
    "a module without a room": ("newcomer", ""),
    "a package without a room": ("newcomers.one", ""),
}
FINE = {
    "standard library": ("_perturbation.part", "import math\nfrom collections.abc import Collection, Iterator"),
    "below": ("_methods.sam", "import torch\nfrom hf_sharp._engine.landscape import Landscape"),
    "a module of the own room": ("_engine.landscape", "from hf_sharp._engine import rows"),
    "the presets' methods": ("_presets.combinations", "from hf_sharp._methods import SAM"),
    "a method's base": ("_methods.sam", "from hf_sharp._methods.base import Method"),
    "public names": ("", "from hf_sharp._integrations.trainer import SharpTrainer as SharpTrainer"),
    "a package's names": ("_methods", "from hf_sharp._methods.sam import SAM as SAM"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_noticed(case):
    assert violations(*BROKEN[case], KNOWN) != []


@pytest.mark.parametrize("case", FINE)
def test_what_is_listed_passes(case):
    assert violations(*FINE[case], KNOWN) == []


def test_a_circle_is_noticed():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) != []
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
