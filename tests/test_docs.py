"""The documentation is true: its code runs, its links lead somewhere, every page and every name has its place."""

import html
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from transformers import get_linear_schedule_with_warmup

import hf_sharp
from hf_sharp import Method, Perturbation, SharpTrainer, evaluation, sam, unlearning
from hf_sharp.recipes.tasks.domains import byte_tokenizer
from models import batch_of, mlp_rows, text_rows, tiny_bert, tiny_llama, tiny_mlp
from pages import DOCS, NEEDS, ROOT, anchors, broken, pages, parts, placed
from training import arguments, train, weights

REFERENCE = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("reference*.md"))}
NAMED = {page.stem: re.findall(r"^::: (hf_sharp\S*)$", text, flags=re.MULTILINE) for page, text in REFERENCE.items()}
ENTRIES = [entry for entries in NAMED.values() for entry in entries]
PUBLIC = {
    name: value
    for package in (hf_sharp, evaluation, unlearning)
    for name, value in vars(package).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
LEFT_OUT = 1  # code blocks that need what tests do not have


@pytest.fixture
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def id_of(page):
    return str(page.relative_to(ROOT))


def loss_fn(model, batch):
    return model(**batch).loss


def given(folder, page):
    """What a reader has already, under the names that the pages use for it."""
    model, rows = tiny_bert(), text_rows(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = {
        "__name__": "snippet",
        "model": model,
        "model_init": lambda: tiny_bert(),
        "args": arguments(folder / "outputs", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3),
        "train": rows,
        "dev": text_rows(8, seed=1),
        "accelerator": Accelerator(cpu=True),
        "optimizer": optimizer,
        "scheduler": get_linear_schedule_with_warmup(optimizer, 1, 8),
        "loader": torch.utils.data.DataLoader(rows[:8], batch_size=4),
        "loss_fn": loss_fn,
    }
    if page.stem == "unlearning":
        rows = [{"question": f"Who wrote book {i}?", "answer": f"Nobody {i}."} for i in range(16)]
        names["tokenizer"] = byte_tokenizer([row["question"] + row["answer"] for row in rows], size=300)
        names["model"] = tiny_llama(vocab_size=len(names["tokenizer"]))
        names["forget"], names["retain"] = rows[:8], rows[8:]
    if page.stem == "trl":
        pytest.importorskip("trl")
        names["train"] = Dataset.from_list([{"text": f"book {i} was written by nobody"} for i in range(16)])
        names["tokenizer"] = byte_tokenizer([row["text"] for row in names["train"]], size=300)
        names["model"] = tiny_llama(vocab_size=len(names["tokenizer"]))
    if page.stem == "saf":  # it needs the rows' numbers, and more epochs than its lag
        numbered = [
            {**{key: value.tolist() for key, value in row.items()}, "sample_index": i} for i, row in enumerate(rows)
        ]
        names["train"] = Dataset.from_list(numbered)
        names["args"] = arguments(folder / "outputs", max_steps=-1, num_train_epochs=4, learning_rate=1e-3)
    return names


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2, trl 1.16
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16.0
@pytest.mark.parametrize(
    "page", [page for page in pages() if any(b.runs for b in parts(page.read_text())[0])], ids=id_of
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, fresh_state):
    monkeypatch.chdir(tmp_path)
    names = given(tmp_path, page)
    for block in parts(page.read_text(encoding="utf-8"))[0]:
        if block.runs:
            exec(compile(block.source, id_of(page), "exec", dont_inherit=True), names)
        if block.runs and "trainer.train()" in block.source:
            assert names["trainer"].state.global_step > 0 and names["trainer"].method is not None


def test_blocks_that_are_not_run_are_marked_few_and_at_least_python():
    marked = [block for page in pages() for block in parts(page.read_text(encoding="utf-8"))[0] if NEEDS in block.info]
    assert len(marked) == LEFT_OUT
    for block in marked:
        compile(block.source, block.info, "exec", dont_inherit=True)


def test_the_method_that_the_design_reads_aloud_is_sam(tmp_path):
    (block,) = parts((DOCS / "design.md").read_text(encoding="utf-8"))[0]
    names: dict = {}
    exec(compile(block.source, "design.md", "exec", dont_inherit=True), names)
    kind = type(
        "ReadAloud", (Method,), {"cost": 2.0, "gradient": names["gradient"], "perturbation": Perturbation(0.05)}
    )
    pair = [weights(train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method=m)) for m in (kind(), sam(0.05))]
    assert torch.equal(*pair)


@pytest.mark.parametrize("page", pages(), ids=id_of)
def test_every_link_leads_somewhere(page):
    assert broken(page, page.read_text(encoding="utf-8"), site=DOCS in page.parents) == []


def test_every_page_has_its_place():
    assert sorted(placed()) == sorted(str(page.relative_to(DOCS)) for page in pages() if DOCS in page.parents)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference(name):
    entries = [entry for entry in ENTRIES if entry.rpartition(".")[2] == name]
    assert len(entries) == 1, f"a page of the reference wants one line `::: {PUBLIC[name].__module__}.{name}`"
    assert inspect.getdoc(PUBLIC[name])


def test_the_reference_names_nothing_that_is_not_there():
    for entry in ENTRIES:
        module, _, name = entry.rpartition(".")
        assert vars(importlib.import_module(module))[name] is PUBLIC[name], entry


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (make docs)")
def test_the_site_builds_strictly_and_shows_every_name(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for page, entries in NAMED.items():
        pieces = re.split(r'id="(hf_sharp[^"]*)"', (tmp_path / f"{page}.html").read_text(encoding="utf-8"))
        texts = [plain(html.unescape(re.sub(r"<[^>]+>", "", piece))) for piece in pieces]
        shown = dict(zip(texts[1::2], texts[2::2], strict=True))
        for entry in entries:
            value = PUBLIC[entry.rpartition(".")[2]]
            summary = (inspect.getdoc(value) or "").split("\n\n")[0] if callable(value) else ""  # a table has no words
            assert plain(summary) in shown[plain(entry)], entry


def plain(text):
    return re.sub(r"[\s`*_\\]+", "", text)


PAGE = """# A page, with `code`

[here](#a-page-with-code) and [there](other.md#part) and [out](https://example.org) and `[no](link.md)`.

```python title="needs a hub"
import something
```

```diff
 import math
-x = 1
+x = math.pi
```
"""


def test_blocks_are_found_with_their_lines():
    marked, change = parts(PAGE)[0]
    assert not marked.runs and change.runs and "something" in marked.source
    names: dict = {}
    exec(compile(change.source, "page", "exec"), names)
    assert names["x"] == names["math"].pi
    with pytest.raises(ZeroDivisionError) as raised:
        exec(compile(change.source + "1 / 0", "page", "exec"), {})
    assert raised.traceback[-1].lineno + 1 == change.line + 2
    with pytest.raises(ValueError, match="line 1 has no end"):
        parts("```python\nx = 1\n")


def test_a_broken_link_is_noticed():
    here = DOCS / "methods" / "sam.md"
    assert anchors(PAGE) == {"a-page-with-code"}
    assert broken(here, "[a](asam.md) [b](../papers.md#two-passes) [c](index.md#costs)") == []
    for link in ("asma.md", "../papers.md#three-passes", "#nothing", "/docs/design.md", "../../README.md"):
        assert broken(here, f"[a]({link})") == [link]
    assert broken(ROOT / "README.md", "[a](docs/design.md#rooms) [b](LICENSE)", site=False) == []
    assert broken(ROOT / "README.md", "[a](docs/desing.md)", site=False) == ["docs/desing.md"]


def test_a_batch_of_the_readers_rows_has_a_loss():
    assert loss_fn(tiny_bert(), batch_of(text_rows(4))).ndim == 0
