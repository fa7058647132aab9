"""`hf-sharp methods`: the table says what the presets and the documentation say."""

import inspect
import re
from pathlib import Path

import pytest

from hf_sharp.__main__ import UNSAID, main, memory_of
from hf_sharp._presets.config import METHODS, options_of

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
COSTS = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8").split("## Costs")[1].split("\n## ")[0]


def documented(name):
    """(passes, memory) of a method, as the rows of the documentation's table of costs have them."""
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in COSTS.splitlines() if line.startswith("|")]
    return [(passes, memory) for first, passes, memory in rows if re.search(rf"`{name}`", first)]


def numbers(text):
    return {int(number) for number in re.findall(r"\b\d+\b", text.replace("none", "0"))}


@pytest.mark.parametrize("name", METHODS)
def test_passes_and_memory_are_those_of_the_documentation(name, capsys):
    rows = documented(name)
    assert rows, f"docs/methods/index.md, Costs, has no row of {name}"
    assert memory_of(name) != UNSAID, f"the docstring of the preset {name} ends its Returns in '; memory: ...'"
    assert numbers(memory_of(name)) == {number for _, memory in rows for number in numbers(memory)}
    main(["methods"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if re.match(rf"{name}\s", line)]
    assert line.split()[1] == f"{METHODS[name]().cost:.3g}"
    assert float(line.split()[1]) in {cost for passes, _ in rows for cost in possible(passes)}


def possible(passes):
    """What a cell such as `2 + 1/3`, `samples (3)` or `1 + 1/every` can mean."""
    values = re.search(r"\((\d+)\)", passes) or re.match(r"[\d+/ ]+$|\d+(?=,)", passes)
    if values is None:
        assert passes == "1 + 1/every"
        return {1.2}
    return {round(eval(values[1] if values.re.groups else values[0]), 2)}


@pytest.mark.parametrize("name", METHODS)
def test_every_option_with_its_default_and_its_words(name, capsys):
    main(["methods", name])
    printed = capsys.readouterr().out
    assert all(f"--{option}" in printed for option in options_of(name))
    for option in inspect.signature(METHODS[name]).parameters.values():
        assert f"{option.name}={option.default!r}" in printed and f"\n    {option.name}: " in printed


def test_an_unknown_name_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["methods", "sma"])
    assert stopped.value.code == 2 and "known: asam" in capsys.readouterr().err
