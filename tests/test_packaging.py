"""What is built and published: the wheel, the source archive, the version, the public names, the workflows."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_sharp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_sharp"
INTERFACES = {"unlearning", "evaluation", "recipes"}  # all that has no underscore
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?! *export)", MAKEFILE, re.MULTILINE))
ACTION = re.compile(r"actions/[a-z-]+@v\d+|pypa/gh-action-pypi-publish@release/v1|\./\.github/workflows/[a-z]+\.yml")


def built(kind: str, sources: Path, target: Path) -> Path:
    """Builds as an installer does, in a process of its own, with the setuptools that is installed."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, target], cwd=sources, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (result,) = target.iterdir()
    return result


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What a build reads, copied, since it leaves files behind."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(PACKAGE, folder / "hf_sharp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The built wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built("wheel", sources, tmp_path_factory.mktemp("dist"))) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel):
    (file,) = wheel.glob("*.dist-info/METADATA")
    return Parser().parsestr(file.read_text(encoding="utf-8"))


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_the_library_and_nothing_else(wheel):
    ours = {name for name in files_of(PACKAGE) if "__pycache__" not in name and not name.startswith("recipes/")}
    assert {name for name in files_of(wheel) if ".dist-info/" not in name} == {f"hf_sharp/{name}" for name in ours}
    assert "py.typed" in ours


def test_nothing_in_the_wheel_imports_what_is_not_in_it(wheel):
    for path in (wheel / "hf_sharp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
            assert not any(name == "recipes" or name.startswith("hf_sharp.recipes") for name in named), path


def test_the_wheel_works_where_there_are_no_sources(wheel, tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import hf_sharp, hf_sharp.unlearning, hf_sharp.evaluation\n"
        "from hf_sharp.__main__ import main\n"
        "assert hf_sharp.__file__.startswith(sys.argv[1]), hf_sharp.__file__\n"
        "assert all(hasattr(hf_sharp, name) for name in hf_sharp.__all__)\n"
        "main(['methods', 'sam'])\n"
    )
    command = [sys.executable, "-c", program, str(wheel)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "rho" in run.stdout


def test_the_wheel_says_what_it_is(metadata, wheel):
    assert metadata["Name"] == "hf_sharp" and metadata["Version"] == hf_sharp.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert {"Source", "Documentation", "Changelog", "Issues"} <= set(addresses)
    assert all(address.startswith(addresses["Source"]) for address in addresses.values())
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    (entry,) = wheel.glob("*.dist-info/entry_points.txt")
    assert entry.read_text(encoding="utf-8").split() == [
        "[console_scripts]",
        "hf-sharp",
        "=",
        "hf_sharp.__main__:main",
    ]


def test_the_wheel_asks_for_lower_bounds_only(metadata):
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[><=]", line)[0] for line in needed} == {
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "numpy",
    }
    assert all(re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+(; .*)?", line) for line in metadata.get_all("Requires-Dist"))


def test_the_pythons_that_are_promised_begin_and_end_where_the_workflow_tests(metadata):
    found = re.findall(r"Python :: (3\.\d+)", "\n".join(metadata.get_all("Classifier")))
    tested = yaml.safe_load((WORKFLOWS[0].parent / "checks.yml").read_text(encoding="utf-8"))
    pythons = tested["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert [found[0], found[-1]] == pythons  # as text: 3.10 as a number would be 3.1
    assert metadata["Requires-Python"] == f">={pythons[0]}"


def test_the_source_archive_has_what_the_wheel_leaves_out(sources, tmp_path):
    with tarfile.open(built("sdist", sources, tmp_path)) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"hf_sharp/recipes/tasks/glue.py", "recipes/glue_fsam.py", "Makefile", "constraints.txt"} <= names


def test_an_editable_install_is_a_path_that_type_checkers_follow(sources, tmp_path):
    with zipfile.ZipFile(built("editable", sources, tmp_path)) as file:
        outside = [name for name in file.namelist() if ".dist-info/" not in name]
        (path,) = outside
        assert path.endswith(".pth")
        assert Path(file.read(path).decode().strip()) == sources


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_sharp.__version__ and citation["license"] == "Apache-2.0"
    assert ("date-released" in citation) == (".dev" not in hf_sharp.__version__)


def test_the_public_names_are_all_that_the_package_imports():
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    imported = [
        alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(name for name in imported if not name.startswith("_")) == sorted(hf_sharp.__all__)


def test_what_has_no_underscore_is_on_the_page_that_says_what_is_public():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {name for name in names if not name.startswith("_")} == INTERFACES
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert all(f"`hf_sharp.{name}`" in page for name in INTERFACES)


def test_the_page_names_the_lower_bounds_of_the_project(metadata):
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+)", page, re.MULTILINE))
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(metadata.get_all("Requires-Dist")), re.MULTILINE))
    for name in ("torch", "transformers", "accelerate"):
        assert rows[name] == bounds[name]
    assert metadata["Requires-Python"] == f">={rows['Python']}"


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps of all jobs; a job that calls another workflow is a step itself."""
    jobs = workflow["jobs"].values()
    return [step for job in jobs for step in job.get("steps", [job])]


def targets_of(workflow: dict[str, Any]) -> set[str]:
    """The make targets that a workflow calls, with those of its matrix."""
    run = "\n".join(step.get("run", "") for step in steps_of(workflow))
    called = set(re.findall(r"make ([a-z-]+)", run))
    for job in workflow["jobs"].values():
        called |= {
            row["target"] for row in job.get("strategy", {}).get("matrix", {}).get("include", ()) if "target" in row
        }
    return called


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_that_exist_and_actions_of_a_fixed_version(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["name"] == path.stem and workflow[True]  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for step in steps_of(workflow):
        assert ("run" in step) != ("uses" in step)
        if "run" in step:
            assert re.fullmatch(r"make [^;&|\n]+", step["run"]), "a step is one target of the Makefile"
        else:
            assert ACTION.fullmatch(step["uses"]), step["uses"]
            assert not step["uses"].startswith("./") or (ROOT / step["uses"]).is_file()
    assert targets_of(workflow) <= TARGETS


def test_the_workflows_do_all_that_there_is_to_do():
    called = {path.stem: targets_of(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in WORKFLOWS}
    assert called == {
        "checks": {"lint", "test", "test-oldest", "test-wheel", "docs"},
        "weekly": {"test-main"},
        "release": {"release-check", "dist"},
    }


def test_only_the_job_that_publishes_may_say_who_it_is():
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    jobs = release["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert jobs["publish"]["environment"] == "release" and set(jobs["publish"]["needs"]) == {"checks", "build"}
    assert release[True]["push"] == {"tags": ["v*"]}


@pytest.mark.parametrize(
    "tag, fine", [(f"v{hf_sharp.__version__}", True), (hf_sharp.__version__, False), ("v9", False)]
)
def test_a_tag_that_is_not_the_version_is_refused(tag, fine):
    environment = {**os.environ, "TAG": tag}
    run = subprocess.run(["make", "-s", "release-check"], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (run.returncode == 0) == fine


@pytest.mark.parametrize("name", ["bug", "method"])
def test_a_form_for_issues_is_one(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["labels"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert all(field["type"] in ("textarea", "input") and field["attributes"]["label"] for field in form["body"])


def test_the_other_files_of_the_repository_can_be_read():
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
    for name in ("SECURITY.md", "RELEASING.md", ".github/PULL_REQUEST_TEMPLATE.md"):
        named = re.findall(r"`([\w./-]+\.(?:md|yml|py|toml|cff|txt))`", (ROOT / name).read_text(encoding="utf-8"))
        missing = [file for file in named if "/" in file and not (ROOT / file).exists()]
        assert not missing, f"{name} names {missing}"
