"""Two domains of text: the standard library's, and the user's files and data sets; and what a Trainer gets of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sharp._extras import optional
from hf_sharp.recipes.tasks import PACKAGES, docstrings, domains, load_domains
from hf_sharp.recipes.tasks.domains import Domain, accuracy, byte_tokenizer, encode, majority, pick_domain, small_llama

# --- the embedded domains --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return load_domains()


def test_embedded_domains_are_enough_and_their_splits_disjoint(embedded):
    assert [domain.name for domain in embedded] == ["docstrings", "code"]
    for domain in embedded:
        train, test = {text for text, _ in domain.train}, {text for text, _ in domain.test}
        assert len(train) == len(domain.train) > 1000 and len(test) == len(domain.test) > 200
        assert not train & test
        assert domain.labels == sorted(PACKAGES)


def test_code_has_no_words_about_it_and_no_answers(embedded):
    code = [text for text, _ in embedded[1].train + embedded[1].test]
    assert sum("\n" in text for text in code) > 0.99 * len(code)
    assert not any('"""' in text.split("\n")[1] or "# " in text.split("\n")[0] for text in code if "\n" in text)
    assert not any(f"{package}." in text.lower().replace("_", ".") for text in code for package in PACKAGES)


SOURCE = '''
"""A module."""
raise SystemExit("never run")

def twice(a, b):
    """Say what it does."""
    return max(a, b) + min(a, b) + {number} + 0 + 0  # and why

class Email:
    def method(self, a, b, c):
        def inner(d):
            """Only this."""
        return inner(a) + inner(b) + emails + {number} - 1 - 1
'''


def library(folder, **numbers):
    """A standard library of one's own: a number for each package makes its functions differ."""
    for package, number in numbers.items():
        (folder / package / "test").mkdir(parents=True)
        (folder / package / "a.py").write_text(SOURCE.format(number=number))
        (folder / package / "broken.py").write_text("def (:")
        (folder / package / "test" / "b.py").write_text(SOURCE.format(number="not_read_at_all"))
    return folder


def test_functions_are_read_once_without_docstrings_and_masked(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "FEWEST_TEXTS", 0)
    monkeypatch.setattr(domains, "FEWEST_FUNCTIONS", 1)
    code = load_domains(library(tmp_path, email=1, xml=2), packages=["email", "xml"])[1]
    rows = sorted(code.train + code.test)
    inner = "def method(self, a, b, c):\n\n    def inner(d):\n        pass\n    return inner(a) + inner(b) + "
    twice = "def twice(a, b):\n    return max(a, b) + min(a, b) + "
    assert rows == [
        (f"{inner}emails + 1 - 1 - 1", "email"),
        (f"{inner}emails + 2 - 1 - 1", "xml"),
        (f"{twice}1 + 0 + 0", "email"),
        (f"{twice}2 + 0 + 0", "xml"),
    ]


def test_a_function_of_two_packages_belongs_to_none(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "FEWEST_TEXTS", 0)
    with pytest.raises(ValueError, match=r"Only 0 functions were found under .* need 1500.*--train_file"):
        load_domains(library(tmp_path, email=1, xml=1), packages=["email", "xml"])


# --- files -----------------------------------------------------------------------------------------------------------

ROWS = [('a "b"\tc', "up"), ("d\u2028e, f", "down")]
FILES = {
    "a.csv": 'id,text,label\n1,"a ""b""\tc",up\n2,"d\u2028e, f",down\n',
    "a.tsv": '\ufefftext\tlabel\n"a ""b""\tc"\tup\nd\u2028e, f\tdown\n',
    "a.json": json.dumps([{"text": text, "label": label} for text, label in ROWS]),
    "a.JSON": "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS),
    "a.JSONL": json.dumps([{"text": text, "label": label} for text, label in ROWS]),
    "a.jsonl": "\n".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds_of_files(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    found = pick_domain(tmp_path / name, label_column="label", test_share=1.0)
    assert (found.name, found.train, found.test) == ("a", [], ROWS)
    assert pick_domain(tmp_path / name, test_share=1.0).test == [(text, "") for text, _ in ROWS]


def test_running_text_is_cut_once(tmp_path):
    (tmp_path / "a.TXT").write_text("".join(f"line {index}\u2028\n" for index in range(20)), encoding="utf-8")
    found = pick_domain(str(tmp_path / "a.TXT"), text_column="not asked for")
    assert [text for text, _ in found.train + found.test] == [f"line {index}\u2028\n" for index in range(20)]
    assert len(found.test) == 2


def test_labelled_rows_are_held_back_at_random_and_in_a_folder_all_files_count(tmp_path):
    for part in range(2):
        rows = [f"text {index},{index // 100}" for index in range(200 * part, 200 * part + 200)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["text,label", *rows]))
    (tmp_path / "notes.md").write_text("not a kind that is read")
    found = pick_domain(tmp_path, label_column="label")
    assert len(found.train) + len(found.test) == 400 and found.labels == list("0123")
    assert 20 < len(found.test) < 60 and {label for _, label in found.test} == {"0", "1", "2", "3"}
    assert found == pick_domain(tmp_path, label_column="label")


def test_so_few_rows_that_nothing_is_held_back_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\none,x\ntwo,y\n")
    with pytest.raises(ValueError, match=r"of 2 [02] would be held back"):
        pick_domain(tmp_path / "a.csv", label_column="label", test_share=1e-6)


def test_a_test_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    found = pick_domain(tmp_path / "a.txt", test_file=tmp_path / "b.txt")
    assert (found.train, found.test) == ([("one\n", ""), ("two\n", "")], [("three", "")])


BAD = {
    "no file": ("no.txt", None, {}, "There is no file or folder .*no.txt"),
    "unknown kind": ("a.pdf", "x", {}, r"a.pdf is of an unknown kind; known are \.txt, \.csv"),
    "empty": ("a.txt", "\n \n", {}, "a.txt holds no text"),
    "empty table": ("a.csv", "text\n", {}, "a.csv holds no text"),
    "no text column": ("a.csv", "id,review\n1,b\n", {}, "row 1 has no column 'text'; there are id, review"),
    "no label column": ("a.csv", "text\nb\n", {"label_column": "label"}, "row 1 has no column 'label'"),
    "a short row": ("a.csv", "text,label\nb,c\nd\n", {"label_column": "label"}, "row 2 has no column 'label'"),
    "labels in plain text": ("a.txt", "b\n", {"label_column": "label"}, "plain text without a column 'label'"),
    "no JSON": ("a.jsonl", '{"text": "b"}\n{"text"\n', {}, "a.jsonl cannot be read"),
    "JSON of another kind": ("a.json", '["b"]', {}, "row 1 is no object"),
    "not UTF-8": ("a.txt", b"\xff\xfe", {}, "a.txt cannot be read: 'utf-8'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(case, tmp_path):
    name, content, options, message = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pick_domain(tmp_path / name, **options)


def test_a_folder_without_files(tmp_path):
    with pytest.raises(ValueError, match="holds no file to read; known kinds"):
        pick_domain(tmp_path)


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The Hub with one data set, to be filled with splits; what was asked for is under "asked"."""
    datasets, content = optional("datasets"), {"asked": None}

    def load_dataset(*args):
        content["asked"] = args
        return {key: split for key, split in content.items() if key != "asked"}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return content


def split(count, **columns):
    return optional("datasets").Dataset.from_dict({"text": [f"t{index}" for index in range(count)], **columns})


def test_hub_splits(hub):
    hub |= {"train": split(10), "validation": split(3)}
    found = pick_domain("", "somebody/plays", "raw")
    assert hub["asked"] == ("somebody/plays", "raw")
    assert (found.name, len(found.train), len(found.test)) == ("plays", 10, 3)
    hub["test"] = split(2)
    assert len(pick_domain("", "somebody/plays").test) == 2
    for name in ("test", "validation"):
        del hub[name]
    assert [len(part) for part in (lambda d: (d.train, d.test))(pick_domain("", "plays"))] == [9, 1]
    assert len(pick_domain("", "plays", test_share=1.0).test) == 10


def test_hub_classes_go_by_name(hub):
    names = optional("datasets").ClassLabel(names=["no", "yes"])
    hub["test"] = split(3, label=[1, 0, 1]).cast_column("label", names)
    assert [label for _, label in pick_domain("", "plays", label_column="label").test] == ["yes", "no", "yes"]


def test_hub_refuses(hub):
    with pytest.raises(ValueError, match=r"plays has no split train, test, .*it has none"):
        pick_domain("", "plays")
    hub["test"] = split(1)
    with pytest.raises(ValueError, match="plays, split test, row 1 has no column 'sentence'; there are text"):
        pick_domain("", "plays", text_column="sentence")


# --- examples --------------------------------------------------------------------------------------------------------

LABELLED = Domain("plays", [("to be", "a"), ("or not to be", "b"), ("that is", "a")], [("the question", "c")])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(["to be or not to be", "that is the question"] * 5, size=280, max_length=8)


def test_the_tokenizer_can_write_anything(tokenizer):
    assert len(tokenizer) == 280
    for text in ("to be", "def f(x):\n\treturn 'é\u2028'"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_blocks(tokenizer):
    blocks = encode(LABELLED, "train", tokenizer, 4)
    ids = (
        tokenizer("to be\n")["input_ids"]
        + tokenizer("or not to be\n")["input_ids"]
        + tokenizer("that is\n")["input_ids"]
    )
    assert [token for block in blocks for token in block["input_ids"]] == ids[: len(ids) // 4 * 4]
    assert all(block["labels"] == block["input_ids"] and len(block["labels"]) == 4 for block in blocks)


def test_classes(tokenizer):
    examples = encode(LABELLED, "train", tokenizer, 4, ["a", "b"])
    assert [example["label"] for example in examples] == [0, 1, 0]
    assert examples[1]["input_ids"] == tokenizer("or not to be")["input_ids"][:4]
    assert majority(examples) == pytest.approx(2 / 3) and majority(encode(LABELLED, "train", tokenizer, 4)) is None


def test_a_limit_draws_the_same_examples_from_everywhere(tokenizer):
    many = Domain("many", [(f"text {index}", str(index // 50)) for index in range(100)], [])
    some = encode(many, "train", tokenizer, 8, ["0", "1"], limit=20)
    assert some == encode(many, "train", tokenizer, 8, ["0", "1"], limit=20) and len(some) == 20
    assert {example["label"] for example in some} == {0, 1}
    assert len(encode(many, "train", tokenizer, 8, ["0", "1"], limit=1000)) == 100


def test_encode_refuses(tokenizer):
    with pytest.raises(ValueError, match="plays has a class 'c'; the domain to train on has a, b only"):
        encode(LABELLED, "test", tokenizer, 4, ["a", "b"])
    with pytest.raises(ValueError, match="plays has 1 class in train; there is nothing to tell apart"):
        encode(LABELLED, "train", tokenizer, 4, ["a"])
    with pytest.raises(ValueError, match="many has too little text to test on for one example of 4 tokens"):
        encode(Domain("many", [], []), "test", tokenizer, 4)


def test_accuracy():
    logits, truth = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), np.array([1, 0, 0])
    for predictions in (logits, (logits, None)):
        assert accuracy(SimpleNamespace(predictions=predictions, label_ids=truth)) == {
            "accuracy": pytest.approx(2 / 3)
        }


def test_the_small_model_reads_blocks(tokenizer):
    model = AutoModelForCausalLM.from_config(small_llama(tokenizer, 8))
    ids = torch.tensor([block["input_ids"] for block in encode(LABELLED, "train", tokenizer, 4)])
    loss = model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(np.log(len(tokenizer)), abs=0.3)  # at the start all tokens are nearly equal
