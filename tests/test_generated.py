"""What `make generated` writes is as it would write it now, so that an option is written once and nothing drifts."""

import pytest

from generate import ROOT, card_text, names_wanted, presets, table, texts_wanted
from hf_sharp._presets.names import METHODS

WANTED = {**names_wanted(), **texts_wanted()}


@pytest.mark.parametrize("path", WANTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_written_file_is_up_to_date(path):
    assert path.read_text(encoding="utf-8") == WANTED[path], "run `make generated`"


def test_every_preset_is_found_in_the_files():
    assert set(presets()) == set(METHODS)


def test_a_table_keeps_its_order_and_a_persons_column_and_takes_in_what_is_new():
    old = "| [`b`](b.md) | 1 | it is so |\n| `gone` | 2 | - |\n| `a` | 3 | because \\| of |"
    rows = {"a": ["`a`", "30"], "b": ["`b`", "10 | 11"], "c": ["`c`", "40"]}
    lines = table(["x", "y", "z"], rows, old, kept=True).splitlines()
    assert lines[2:] == ["| `b` | 10 \\| 11 | it is so |", "| `a` | 30 | because \\| of |", "| `c` | 40 |  |"]


def test_a_page_without_marks_is_named(tmp_path):
    (tmp_path / "sam.md").write_text("# sam\n")
    with pytest.raises(SystemExit, match=r"sam.md has no '<!-- generated: options -->'"):
        card_text(tmp_path / "sam.md")
