"""The data behind the recipes: GLUE files in the official layout, the official metrics, and the embedded text task."""

import importlib.util

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from hf_sharp._extras import optional
from hf_sharp.recipes.tasks import GLUE, PACKAGES, docstrings, load_docstrings, load_glue, redraw_labels, small_bert
from hf_sharp.recipes.tasks import word_tokenizer as make_tokenizer
from hf_sharp.recipes.tasks.metrics import METRICS, load_metric, majority_value

# Two lines a task, as the official files have them: heading (None: there is none), then a row of each kind.
FILES = {
    "cola": (None, ["gj04\t1\t\tHe said \"no.", "gj04\t0\t*\tHim said."]),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\tA \"b\tc d", "0\t9\t3\te\tf"]),
    "rte": ("index\tsentence1\tsentence2\tlabel", ["0\ta \" b\tc\tentailment", "1\td\te\tnot_entailment"]),
    "sst2": ("sentence\tlabel", ["good film \t1", "\"bad\t0"]),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\ty\t1\ts\tt\tA \"plane.\tOne plane.\t4.750", "1\tg\tf\ty\t2\ts\tt\tb\tc\t0"],
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", ["0\twho?\tme\tentailment", "1\twho?\t\"\tnot_entailment"]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["0\t1\t2\ta?\tb?\t1", "1\t3\t4\tc?\t\"d?\t0"]),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\ts1b\ts2b\ts1p\ts2p\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\tp\tq\tg\tb\tb\tp\tp\tA.\tB.\tneutral\tcontradiction", "1\tp\tq\tg\tb\tb\tp\tp\tC.\tD.\tneutral\tneutral"],
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ["0\ta\tb\t0", "1\tc\td\t1"]),
}  # fmt: skip
LABELS = {
    "cola": [1, 0], "mrpc": [1, 0], "rte": [0, 1], "sst2": [1, 0], "stsb": [4.75, 0.0], "qnli": [0, 1], "qqp": [1, 0],
    "mnli": [2, 1], "wnli": [0, 1],
}  # fmt: skip


def write(folder, task, header, rows, splits=None):
    """Write the same rows as every split of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = rows if header is None else [header, *rows]
    for split in splits or GLUE[task].splits:
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


@pytest.mark.parametrize("task", GLUE)
def test_official_layout(task, tmp_path):
    header, rows = FILES[task]
    write(tmp_path / GLUE[task].folder, task, header, rows)
    loaded = load_glue(task, tmp_path)
    assert list(loaded) == list(GLUE[task].splits.values())
    for split in loaded.values():
        assert split.column_names == [*GLUE[task].texts, "label"]
        assert list(split["label"]) == LABELS[task]
    features = loaded["train"].features["label"]
    assert (tuple(features.names) if GLUE[task].labels else features.dtype) == (GLUE[task].labels or "float32")
    # A quotation mark is a letter: it neither joins lines nor disappears.
    texts = [text for column in GLUE[task].texts for text in loaded["train"][column]]
    assert sum(text.count('"') for text in texts) == "".join(rows).count('"')


def test_nine_tasks():
    assert list(GLUE) == ["cola", "mrpc", "rte", "sst2", "stsb", "qnli", "qqp", "mnli", "wnli"]
    assert list(GLUE["mnli"].splits.values()) == ["train", "validation_matched", "validation_mismatched"]
    assert all(len(spec.tsv_codes) == len(spec.labels) and spec.metric in METRICS for spec in GLUE.values())


def test_folder_of_the_task_itself_and_windows_line_ends(tmp_path):
    write(tmp_path, "rte", FILES["rte"][0] + "\r", [row + "\r" for row in FILES["rte"][1]])
    assert list(load_glue("rte", str(tmp_path))["validation"]["label"]) == [0, 1]


def test_unicode_line_separators_stay_in_their_sentence(tmp_path):
    write(tmp_path, "sst2", "sentence\tlabel", ["a\u2028b\x85c\x0bd\t1", "e\t0"])
    assert load_glue("sst2", tmp_path)["train"]["sentence"][0] == "a\u2028b\x85c\x0bd"


def test_hub_is_the_default(monkeypatch):
    datasets, asked = optional("datasets"), []
    rows = datasets.Dataset.from_dict({"sentence": ["a"], "label": [1], "idx": [0]})

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return {"train": rows, "validation": rows, "test": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_glue("cola", cache_dir="cache", token="secret")
    assert asked == [(("nyu-mll/glue", "cola"), {"cache_dir": "cache", "token": "secret"})]
    assert list(loaded) == ["train", "validation"]


BAD = {
    "no such task": ("cola2", None, None, "Unknown GLUE task 'cola2'. Known: cola, mrpc"),
    "no column": (
        "rte",
        "index\tsentence1\tlabel",
        ["0\ta\tentailment"],
        r"train.tsv has no column 'sentence2'.*label",
    ),
    "unknown label": ("rte", FILES["rte"][0], ["0\ta\tb\tneutral"], r"train.tsv, line 2: unknown label 'neutral'.*or"),
    "label of a test file": ("cola", None, ["gj04\t2\t\tHe."], r"train.tsv, line 1: unknown label '2'.*'0' or '1'"),
    "score out of range": ("stsb", FILES["stsb"][0], ["0\tg\tf\ty\t1\ts\tt\ta\tb\t7"], r"unknown label '7'.*0 to 5"),
    "score not a number": ("stsb", FILES["stsb"][0], ["0\tg\tf\ty\t1\ts\tt\ta\tb\tnan"], "a number from 0 to 5"),
    "rows break off": ("rte", FILES["rte"][0], ["0\ta"], r"train.tsv, line 2 .*expected 4 tab-separated columns"),
    "empty": ("rte", FILES["rte"][0], [], "train.tsv holds no rows"),
    "nothing at all": ("cola", None, [""], "expected 4 tab-separated columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_named(case, tmp_path):
    task, header, rows, message = BAD[case]
    if task in GLUE:
        write(tmp_path, task, header, rows)
    with pytest.raises(ValueError, match=message):
        load_glue(task, tmp_path)


def test_missing_folder_and_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"No RTE data: neither .*RTE.train.tsv nor .* exists.*train.tsv, dev.tsv"
    ):
        load_glue("rte", tmp_path / "nowhere")
    write(tmp_path, "mnli", *FILES["mnli"], splits=["train", "dev_matched"])
    with pytest.raises(
        FileNotFoundError, match=r"dev_mismatched.tsv is missing. MNLI needs train.tsv, dev_matched.tsv"
    ):
        load_glue("mnli", tmp_path)


def test_a_few_broken_rows_are_left_out_and_counted(tmp_path, caplog):
    rows = [FILES["qqp"][1][index % 2] for index in range(200)]
    write(tmp_path, "qqp", FILES["qqp"][0], [*rows, "7\t1\t2\tbroken?"], splits=["train"])
    write(tmp_path, "qqp", *FILES["qqp"], splits=["dev"])
    assert len(load_glue("qqp", tmp_path)["train"]) == 200
    assert "1 lines break off early" in caplog.text and "202" in caplog.text


# --- metrics ---------------------------------------------------------------------------------------------------------

DRAW = np.random.default_rng(0)
TRUE, GUESS = DRAW.integers(0, 2, 60), DRAW.integers(0, 2, 60)
SCORES = DRAW.normal(size=60).round(1)  # rounded, so that there are ties for Spearman
NEAR = (SCORES + DRAW.normal(size=60)).round(1)


def test_metrics_are_those_of_their_libraries():
    def compute(name, guess=GUESS, true=TRUE):
        return load_metric(name).compute(predictions=guess, references=true)

    accuracy, f1 = float(np.mean(TRUE == GUESS)), sklearn_metrics.f1_score(TRUE, GUESS)
    assert compute("accuracy") == pytest.approx({"accuracy": accuracy})
    assert compute("accuracy_and_f1") == pytest.approx({"accuracy": accuracy, "f1": f1})
    matthews = sklearn_metrics.matthews_corrcoef(TRUE, GUESS)
    assert compute("matthews") == pytest.approx({"matthews_correlation": matthews})
    pearson, spearman = np.corrcoef(NEAR, SCORES)[0, 1], stats.spearmanr(NEAR, SCORES)[0]
    expected = {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
    assert compute("correlation", NEAR, SCORES) == pytest.approx(expected)


def test_metrics_can_be_used_again_and_have_every_main_metric():
    for spec in GLUE.values():
        metric = load_metric(spec.metric)
        again = [metric.compute(predictions=TRUE, references=TRUE)[spec.main_metric] for _ in range(2)]
        assert again == pytest.approx([1.0, 1.0])


def test_constant_answers_are_worth_nothing():
    assert load_metric("matthews").compute(predictions=[1] * 60, references=TRUE)["matthews_correlation"] == 0
    assert set(load_metric("correlation").compute(predictions=[1.0] * 60, references=SCORES).values()) == {0.0}
    assert load_metric("accuracy_and_f1").compute(predictions=[0] * 60, references=TRUE)["f1"] == 0


def test_majority():
    labels = [1, 1, 0, 1]
    assert majority_value("accuracy", "accuracy", labels) == 0.75
    assert majority_value("accuracy_and_f1", "f1", labels) == pytest.approx(2 * 3 / 7)
    assert majority_value("matthews", "matthews_correlation", labels) == 0
    assert majority_value("correlation", "pearson", [0.5, 1.0]) is None


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"Unknown metric 'bleu'\. Known: accuracy"):
        load_metric("bleu")


# --- the embedded task -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    return load_docstrings()


def test_docstrings_are_enough_and_disjoint(task):
    train, test = set(task.train_texts), set(task.test_texts)
    assert len(train) + len(test) >= 1500 and len(test) > 200
    assert len(train) == len(task.train_texts) == len(task.train_labels)
    assert len(test) == len(task.test_texts) == len(task.test_labels)
    assert not train & test
    assert set(task.train_labels) == set(task.test_labels) == set(range(10))
    assert task.labels == PACKAGES


def test_docstrings_are_the_same_every_time(task):
    assert load_docstrings() == task


def test_answers_are_masked(task):
    words = {word for text in task.train_texts + task.test_texts for word in text.lower().replace(".", " ").split()}
    assert not words & set(PACKAGES)
    assert docstrings.MASK in words


def library(folder, texts):
    """A standard library of one's own: package -> docstrings."""
    for package, each in texts.items():
        (folder / package / "test").mkdir(parents=True)
        functions = [f'def f{index}():\n    """{text}"""\n' for index, text in enumerate(each)]
        (folder / package / "a.py").write_text('raise SystemExit("never run")\n' + "\n".join(functions))
        (folder / package / "broken.py").write_text("def (:")
        (folder / package / "test" / "b.py").write_text('"""Not read at all."""')
    return folder


def test_reading_masks_evens_out_and_drops_what_is_ambiguous(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "FEWEST_TEXTS", 1)
    texts = {
        "email": ["in both of\n  them", "Parse an Email.", "too short", "only   here, twice", "only here, twice"],
        "xml": ["in both of them", r"An \d escape that warns, of the emails."],
    }  # fmt: skip
    found = load_docstrings(library(tmp_path, texts), packages=["email", "xml"])
    rows = zip(found.train_texts + found.test_texts, found.train_labels + found.test_labels, strict=True)
    mask = docstrings.MASK
    expected = [
        ("An \\d escape that warns, of the emails.", 1),
        (f"Parse an {mask}.", 0),
        ("only here, twice", 0),
    ]
    assert sorted(rows) == expected


def test_stripped_library(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"asyncio holds no Python source.*--task_name"):
        load_docstrings(tmp_path)
    with pytest.raises(ValueError, match=r"Only 1 docstrings were found under .* needs 1500.*--task_name"):
        load_docstrings(library(tmp_path, {"xml": ["three words here"]}), packages=["xml"])


def test_word_tokenizer_and_config():
    tokenizer = make_tokenizer(["the the cat cat sat", "the mat"], size=7, max_length=6)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer)))[-2:] == ["the", "cat"]
    tokens = tokenizer("The cat ran, the cat sat", truncation=True)
    words = tokenizer.convert_ids_to_tokens(tokens["input_ids"])
    assert words == ["[CLS]", "the", "cat", "[UNK]", "[UNK]", "[SEP]"]
    assert tokenizer.pad([tokens, tokenizer("cat")])["attention_mask"][1] == [1, 1, 1, 0, 0, 0]
    config = small_bert(len(tokenizer), ["a", "b"], 6)
    assert (config.vocab_size, config.num_labels, config.id2label) == (7, 2, {0: "a", 1: "b"})


# --- label noise, optional packages ----------------------------------------------------------------------------------


def test_label_noise():
    labels = list(range(10)) * 200
    noisy = redraw_labels(labels, 0.4, classes=10, seed=3)
    assert noisy == redraw_labels(labels, 0.4, classes=10, seed=3) != redraw_labels(labels, 0.4, classes=10, seed=4)
    assert labels == list(range(10)) * 200
    changed = np.mean(np.array(noisy) != labels)
    assert changed == pytest.approx(0.4 * 0.9, abs=0.03)  # a tenth of the draws hits the true label; 2,000 draws
    assert redraw_labels(labels, 0.0, classes=10, seed=3) == labels
    assert set(redraw_labels([0] * 500, 1.0, classes=3, seed=0)) == {0, 1, 2}


@pytest.mark.parametrize(("share", "classes", "message"), [(1.5, 2, "between 0 and 1"), (0.1, 0, "predicts a number")])
def test_label_noise_refuses(share, classes, message):
    with pytest.raises(ValueError, match=message):
        redraw_labels([0], share, classes, seed=0)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs scikit-learn, .*pip install scikit-learn"):
        optional("sklearn.metrics")
