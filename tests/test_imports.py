"""Which module may import what: one dict, lowest floor first. An arrow that is not in it, or a circle, fails.

Imports are read by `ast`, inside functions too; those under `if TYPE_CHECKING:` are not counted, the standard library
is free. To add a room, add its line here; to add a method, nothing: `methods.*` has one.
"""

import ast
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_sharp"

# Ours with a leading dot, `.methods` meaning all of that package; other packages by their name.
ALLOWED: dict[str, set[str]] = {
    # floor 1: know nothing of ours
    "shards": {"torch"},
    "vector": {"torch", ".shards"},
    "part": set(),
    "checkpoints": set(),
    "schedules": set(),
    "replay": {"torch", "numpy"},  # numpy for its random stream only
    "rows": {"torch"},
    "momentum": {"torch"},
    "host": {"torch", ".rows"},
    "attachment": {"torch"},
    "records": {"torch"},
    "report.*": {"torch", "scipy", "matplotlib", "transformers", ".report"},
    "objectives.*": {"torch", ".objectives"},
    "tasks.*": {
        *("torch", "numpy", "scipy", "sklearn", "datasets", "evaluate", "transformers", "tokenizers", "PIL"),
        ".tasks",
        ".encoding",
    },
    "encoding": {"torch"},
    "unlearning.data": {"torch", "numpy", "transformers", ".encoding"},
    "evaluation.*": {"torch", ".evaluation", ".tasks.extras", ".encoding"},
    # floor 2
    "rounding": {"torch", ".vector"},
    "shift": {"torch", ".vector", ".rounding", ".shards"},
    "balls": {"torch", ".vector", ".part", ".shards"},
    "masks": {"torch", ".vector", ".part"},
    "answers": {"torch", ".vector"},
    "facts": {"torch", ".vector", ".host", ".shards"},
    "entry_masks": {"torch", ".vector", ".masks", ".shards"},
    "passes": {"torch", ".facts", ".vector", ".replay", ".rows", ".host", ".answers"},
    "landscape": {"torch", ".passes", ".vector", ".host", ".shift", ".answers", ".terms", ".rounding", ".shards"},
    "terms": {"torch", ".host"},
    "noise": {"torch", ".vector", ".shards"},
    "references": {".noise", ".part"},
    # floor 3
    "perturbation": {"torch", ".balls", ".masks", ".schedules", ".vector", ".part", ".shards"},
    # floor 4
    "methods.base": {"torch", ".landscape", ".answers", ".vector", ".part", ".perturbation"},
    "methods.*": {
        *("torch", ".landscape", ".answers", ".perturbation", ".part", ".vector"),
        *(
            ".methods.base",
            ".methods.ascent",
            ".methods.sometimes",
            ".objectives",
            ".references",
            ".noise",
            ".balls",
            ".rows",
            ".schedules",
        ),
    },
    "adapters.*": {
        *("torch", "peft", ".landscape", ".answers", ".vector", ".part", ".methods.base", ".schedules", ".noise"),
        *(".adapters", ".shards"),
    },
    "diagnostics.*": {"torch", ".landscape", ".perturbation", ".vector"},
    # floor 5
    "presets.*": {
        *(".adapters", ".entry_masks", ".methods", ".perturbation", ".balls", ".masks", ".schedules", ".references"),
        ".presets",
    },
    "stepper": {
        "torch",
        ".rounding",
        ".shift",
        ".vector",
        "accelerate",
        ".landscape",
        ".answers",
        ".host",
        ".part",
        ".methods.base",
    },
    "labels": {"transformers"},
    "accelerate_host": {"torch", "accelerate", ".host", ".momentum", ".labels", ".shards", ".shift", ".vector"},
    "loop": {
        *("torch", "accelerate", ".landscape", ".host", ".stepper", ".methods.base"),
        *(".accelerate_host", ".refusals", ".attachment", ".shards"),
    },
    "optimizer": {
        *("torch", ".landscape", ".host", ".stepper", ".methods.base", ".refusals", ".momentum", ".attachment"),
        ".shards",
    },
    "unlearning.relearn": {"torch", ".evaluation", ".encoding"},
    "unlearning.quantize": {"torch", "transformers"},
    "averaging": {"torch", "transformers", "safetensors", ".vector", ".shards"},
    "tasks.unlearning": {"torch", "transformers", ".encoding", ".evaluation", ".unlearning", ".report"},
    "config": {"transformers", "yaml", ".presets", ".schedules", ".methods.base", ".objectives"},
    "frozen": {"torch", ".objectives"},
    "search": {"numpy", ".config", ".methods.base"},
    "__main__": {".config"},
    "refusals": {"transformers", "accelerate", ".methods.base", ".part", ".shards"},
    "trainer_host": {"torch", "transformers", "accelerate", ".accelerate_host", ".momentum", ".records", ".refusals"},
    # floor 6
    "trainer": {
        *("torch", "numpy", "transformers", "accelerate", "safetensors", "huggingface_hub"),
        *(
            ".attachment",
            ".config",
            ".rows",
            ".refusals",
            ".search",
            ".shards",
            ".stepper",
            ".trainer_host",
            ".landscape",
            ".host",
            ".methods.base",
            ".part",
            ".objectives",
        ),
    },
    # floor 7
    "unlearn_trainer": {
        *("torch", "transformers", "accelerate", ".config", ".methods", ".objectives", ".terms", ".trainer"),
        *(".frozen", ".vector", ".unlearning.data"),
    },
    "any_trainer": {"transformers", "trl", ".trainer", ".refusals"},
    # re-exports only
    "methods": {".methods"},
    "adapters": {".adapters"},
    "presets": {".presets"},
    "objectives": {".objectives"},
    "diagnostics": {".diagnostics"},
    "tasks": {".tasks"},
    "evaluation": {".evaluation"},
    "unlearning": {".unlearning", ".encoding"},
    "report": {".report"},
    "": {"."},
}
PACKAGES = {name for name in ALLOWED if not name or f"{name}.*" in ALLOWED}
# `torch` above does not mean these: distribution belongs in the engine and the doors.
FORBIDDEN = {"methods.*": {"torch.distributed"}, "methods.base": {"torch.distributed"}}


def room_of(module: str) -> str | None:
    """The line of ALLOWED that holds for a module, named without the package: "methods.sam" -> "methods.*"."""
    if module in ALLOWED:
        return module
    wildcard = module.rpartition(".")[0] + ".*"
    return wildcard if wildcard in ALLOWED else None


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: what stands under `if TYPE_CHECKING:` is left out."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from running(other)
            continue
        yield child
        yield from running(child)


def imported(source: str, known: Collection[str]) -> Iterator[str]:
    """Dotted names that a source imports; `from hf_sharp import vector` counts as hf_sharp.vector if that is known."""
    for node in running(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in known or not base.startswith((PACKAGE, ".")) else base
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def violations(module: str, source: str, known: Collection[str] = ()) -> list[str]:
    """What a module's source imports against the rule, as sentences."""
    room = room_of(module)
    if room is None:
        return [f"{module} has no line in ALLOWED"]
    known = set(known) | {f"{PACKAGE}.{name}" for name in ALLOWED if name and "*" not in name}
    found = []
    for name in imported(source, known):
        top = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{module} imports {name}: imports are absolute")
        elif top == PACKAGE:
            own = name.removeprefix(PACKAGE)
            if not any(own == allowed or own.startswith(allowed.rstrip(".") + ".") for allowed in ours(room)):
                found.append(f"{module} imports {name}")
        elif any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN.get(room, ())):
            found.append(f"{module} imports {name}")
        elif top not in sys.stdlib_module_names and top not in ALLOWED[room]:
            found.append(f"{module} imports {name}")
    return found


def ours(room: str) -> set[str]:
    return {name for name in ALLOWED[room] if name.startswith(".")}


def modules() -> dict[str, str]:
    """Name without the package -> source, of every module that there is."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


SOURCES = modules()
KNOWN = {f"{PACKAGE}.{name}".rstrip(".") for name in SOURCES}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_only_what_its_room_may(module):
    assert violations(module, SOURCES[module], KNOWN) == []


def test_no_circle():
    """Packages' `__init__` are left out: they only re-export, and whoever imports from one means what is behind it."""
    graph = {}
    for module, source in SOURCES.items():
        names = (name.removeprefix(PACKAGE + ".") for name in imported(source, KNOWN) if name.startswith(PACKAGE))
        graph[module] = set() if room_of(module) in PACKAGES else set(names)
    assert circle(graph) == []


def test_the_rule_itself_has_no_circle():
    graph = {}
    for room in ALLOWED:
        if room not in PACKAGES:
            lower = {name.lstrip(".") for name in ours(room)}
            graph[room] = {f"{name}.*" if f"{name}.*" in ALLOWED else name for name in lower} - {room}
    assert circle(graph) == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.name)
def test_recipes_are_flat(path):
    """A recipe imports the public library and no other recipe."""
    for name in imported(path.read_text(encoding="utf-8"), KNOWN):
        assert name.split(".")[0] not in ("recipes", "tests") and not name.startswith("."), name
        assert not (ROOT / "recipes" / f"{name.split('.')[0]}.py").exists(), name
        assert not any(part.startswith("_") for part in name.split(".") if name != "__future__"), name


BROKEN = {
    "a method that knows the Trainer": ("methods.sam", "from transformers import Trainer"),
    "inside a function": ("methods.sam", "def f():\n    import accelerate"),
    "a method that knows ranks": ("methods.sam", "import torch.distributed as dist"),
    "the same, from": ("methods.sam", "from torch import distributed"),
    "the same, a name of it": ("methods.base", "from torch.distributed import all_reduce"),
    "the same, by attribute": ("methods.sam", "import torch\ntorch.distributed.get_rank()"),
    "a method that knows another": ("methods.gsam", "from hf_sharp.methods.sam import SAM"),
    "a method that knows the presets": ("methods.sam", "from hf_sharp import presets"),
    "an engine that knows methods": ("landscape", "from hf_sharp.methods import SAM"),
    "an engine that knows one": ("landscape", "import hf_sharp.methods.sam"),
    "an arrow up": ("vector", "from hf_sharp.landscape import Landscape"),
    "around by the front door": ("balls", "from hf_sharp import SharpTrainer"),
    "the whole front door": ("balls", "import hf_sharp"),
    "a relative import": ("methods.sam", "from .base import Method"),
    "a relative import of a module": ("balls", "from . import vector"),
    "a package that is not listed": ("vector", "import scipy.linalg"),
    "after the type checker's branch": ("part", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
    "a name that only begins alike": ("presets.sam", "from hf_sharp.methods_extra import x"),
    "a module without a line": ("newcomer", ""),
    "a package without a line": ("newcomers.one", ""),
    "numpy by the back door": ("landscape", "import numpy as np"),
}
FINE = {
    "standard library": ("part", "import math\nfrom collections.abc import Collection, Iterator"),
    "listed": ("methods.sam", "import torch\nfrom hf_sharp.landscape import Landscape, Evaluation"),
    "a module from the front door": ("passes", "from hf_sharp import rows, vector"),
    "types only": ("masks", "if TYPE_CHECKING:\n    from hf_sharp.landscape import Landscape"),
    "types only, qualified": ("masks", "import typing\nif typing.TYPE_CHECKING:\n    import transformers"),
    "the presets' methods": ("presets.sam", "from hf_sharp.methods import SAM\nfrom hf_sharp.methods.sam import SAM"),
    "a method's base": ("methods.sam", "from hf_sharp.methods.base import Method"),
    "re-export": ("", "from hf_sharp.trainer import SharpTrainer as SharpTrainer"),
    "re-export of methods": ("methods", "from hf_sharp.methods.sam import SAM as SAM"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_noticed(case):
    assert violations(*BROKEN[case]) != []


@pytest.mark.parametrize("case", FINE)
def test_what_is_listed_passes(case):
    assert violations(*FINE[case]) == []


def test_a_circle_is_noticed():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) != []
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
