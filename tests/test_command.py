"""`hf-sharp methods`: the table says what the presets and the documentation say."""

import inspect
import re
from pathlib import Path

import pytest

from hf_sharp.__main__ import main
from hf_sharp._presets.names import METHODS, options_of
from hf_sharp._presets.texts import UNSAID, memory_of, passes_of

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", METHODS)
def test_passes_and_memory_are_said_and_the_passes_are_true(name, capsys):
    preset = METHODS[name]
    assert memory_of(preset) != UNSAID, f"the docstring of the preset {name} ends its Returns in '; memory: ...'"
    assert round(preset().cost, 2) in possible(passes_of(preset)), passes_of(preset)
    main(["methods"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if re.match(rf"{name}\s", line)]
    assert line.split()[1] == f"{preset().cost:.3g}" and line.endswith(memory_of(preset))


def possible(passes):
    """What words such as `2 + 1/3, "fisher" 3`, `samples (3)` or `1 + 1/every` can mean."""
    if passes == "1 + 1/every":
        return {1.2}
    number = re.search(r"\((\d+)\)", passes) or re.match(r"([\d+/ ]+)(?=,|$)", passes)
    return {round(eval(number[1]), 2)}


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
    assert stopped.value.code == 2 and "Did you mean 'sam'? Known: asam" in capsys.readouterr().err
