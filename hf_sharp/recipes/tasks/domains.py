"""Two domains of text: the standard library's prose and its code, the user's own files, or data sets of the Hub.

The embedded pair needs no network: what Python's docstrings say, and the functions behind them without a word of
documentation, read by ``ast`` and never imported. Both carry the package that they come from as a label.
"""

import ast
import csv
import hashlib
import io
import json
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sharp._extras import optional
from hf_sharp.recipes.tasks.docstrings import MASK, PACKAGES, load_docstrings

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

FEWEST_FUNCTIONS = 1500
FEWEST_WORDS = 10
TEST_SHARE = 0.1  # of files and data sets that come without a test split
END = "<|endoftext|>"
HUB_TESTS = ("test", "validation", "validation_matched")

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Domain:
    """Texts of one kind, split once and for all.

    Args:
        name: what the domain is called in tables.
        train: texts to train on with the names of their classes, which are empty where there are none.
        test: texts to evaluate on, likewise.
    """

    name: str
    train: Rows
    test: Rows

    @property
    def labels(self) -> list[str]:
        """The classes of the training rows, in the order of the alphabet."""
        return sorted({label for _, label in self.train})


def load_domains(stdlib: str | Path | None = None, packages: Sequence[str] = PACKAGES) -> tuple[Domain, Domain]:
    """Read two domains that every machine has: docstrings of the standard library, and its functions without them.

    Args:
        stdlib: folder of the standard library; None takes that of the running Python.
        packages: the packages that are read; they are the classes, and their names are masked in the text.

    Returns:
        The docstrings, each on one line, and the code, as ``ast.unparse`` prints it. The splits are the same for the
        same Python, and no text is on both sides of one.

    Raises:
        ValueError: if fewer than 1,500 docstrings or functions are found. A package without Python source is a
            ``FileNotFoundError``.
    """
    task = load_docstrings(stdlib, packages)
    train = [(text, task.labels[label]) for text, label in zip(task.train_texts, task.train_labels, strict=True)]
    test = [(text, task.labels[label]) for text, label in zip(task.test_texts, task.test_labels, strict=True)]
    root = Path(stdlib if stdlib is not None else sysconfig.get_paths()["stdlib"])
    mask = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, packages))})(?![a-z])", re.IGNORECASE)
    owner: dict[str, str] = {}
    for package in packages:
        for text in _functions_of(root / package):
            text = mask.sub(MASK, text)
            owner[text] = package if owner.get(text, package) == package else ""
    rows = [(text, package) for text, package in owner.items() if package]
    if len(rows) < FEWEST_FUNCTIONS:
        raise ValueError(
            f"Only {len(rows)} functions were found under {root}; the embedded domains need {FEWEST_FUNCTIONS}. This "
            "Python is stripped of its own source: use a full build, or real data with --train_file and --ood_file."
        )
    return Domain("docstrings", train, test), Domain("code", *_split_by_hash(rows, 0.2))


def pick_domain(
    file: str | Path = "",
    name: str = "",
    config: str | None = None,
    text_column: str = "text",
    label_column: str | None = None,
    test_file: str | Path = "",
    test_share: float = TEST_SHARE,
) -> Domain:
    """Read a domain from where it is: a file or folder if one is named, or else a data set of the Hub.

    Args:
        file: .txt (a row a line), .csv or .tsv with a header, .json or .jsonl (a list of objects or an object a line),
            or a folder with such files.
        name: of the data set, whose split test or validation is the test.
        config: which of its configurations.
        text_column: column of the text, where there are columns.
        label_column: column of the class; None leaves labels empty.
        test_file: what to evaluate on beside a ``file``.
        test_share: how much to hold back where nothing else is there to evaluate on: of running text the end, of
            labelled rows a random share, the same every time. 1 trains on nothing.

    Returns:
        The domain.

    Raises:
        ValueError: if a file or split holds no text, lacks a column, or is not what its name says.
    """
    columns = text_column, label_column
    if file:
        title, train = Path(file).stem, _read(Path(file), *columns)
        test = _read(Path(test_file), *columns) if test_file else None
    else:
        title, splits = name.rstrip("/").rpartition("/")[2], optional("datasets").load_dataset(name, config)
        found = {key: _hub_rows(splits[key], f"{name}, split {key},", *columns) for key in splits}
        train, test = found.get("train", []), next((found[key] for key in HUB_TESTS if key in found), None)
        if test is None and not train:
            raise ValueError(
                f"{name} has no split train, {', '.join(HUB_TESTS)}; it has {', '.join(found) or 'none'}."
            )
    if test is None and label_column and test_share < 1:
        train, test = _split_by_hash(train, test_share)
        if not train or not test:
            few = f"{title} has so few rows that of {len(train) + len(test)} {len(test)} would be held back"
            raise ValueError(f"{few} to evaluate on. Name a file to evaluate on, or give more rows.")
    elif test is None:
        cut = round(len(train) * (1 - test_share))
        train, test = train[:cut], train[cut:]
    return Domain(title, train, test)


def encode(
    domain: Domain, part: str, tokenizer: Any, size: int, labels: Sequence[str] | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Turn rows into examples for a Trainer: blocks of running text, or a text each with its class.

    Args:
        domain: where the rows are.
        part: "train" or "test".
        tokenizer: of the model.
        size: tokens of a block, or of the longest text.
        labels: the classes; None makes blocks, for a language model.
        limit: how many examples are kept, drawn at random but the same every time; None keeps all.

    Returns:
        The examples; of running text, what does not fill the last block is left out.

    Raises:
        ValueError: if a row has another class, or there is not one example.
    """
    rows: Rows = {"train": domain.train, "test": domain.test}[part]
    size, texts = min(size, tokenizer.model_max_length), [text for text, _ in rows]
    examples: list[dict[str, Any]]
    if labels is None:
        lines = [text if text.endswith("\n") else text + "\n" for text in texts]
        tokens = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"] if lines else []
        ids = [token for line in tokens for token in line]
        blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        examples = [{"input_ids": block, "labels": block} for block in blocks]
    else:
        if len(labels) < 2:
            raise ValueError(f"{domain.name} has {len(labels)} class in {part}; there is nothing to tell apart.")
        unknown = sorted({label for _, label in rows} - set(labels))
        if unknown:
            known = ", ".join(labels)
            raise ValueError(f"{domain.name} has a class {unknown[0]!r}; the domain to train on has {known} only.")
        tokens = tokenizer(texts, truncation=True, max_length=size)["input_ids"] if texts else []
        examples = [
            {"input_ids": ids, "label": labels.index(label)} for ids, (_, label) in zip(tokens, rows, strict=True)
        ]
    if not examples:
        raise ValueError(f"{domain.name} has too little text to {part} on for one example of {size} tokens.")
    return examples if limit is None or limit >= len(examples) else random.Random(0).sample(examples, limit)


def accuracy(prediction: Any) -> dict[str, float]:
    """Score a classifier by its share of right answers, as ``Trainer(compute_metrics=...)`` wants it."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}


def majority(examples: Sequence[dict[str, Any]]) -> float | None:
    """Give the share of the most frequent class among examples of `encode`, or None where there are no classes."""
    counts = Counter(example["label"] for example in examples if "label" in example)
    return max(counts.values()) / len(examples) if counts else None


def byte_tokenizer(texts: Iterable[str], size: int = 1024, max_length: int = 128) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer, which can write any text of any domain.

    Args:
        texts: where pairs are counted.
        size: number of tokens, the 256 bytes among them.
        max_length: longest input in tokens.

    Returns:
        A tokenizer that every part of Transformers takes; one special token ends and pads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=bytes_, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, eos_token=END, pad_token=END
    )


def small_llama(tokenizer: "PreTrainedTokenizerFast", max_length: int = 128) -> "LlamaConfig":
    """Describe the language model that learns something of two domains in seconds on a processor.

    Args:
        tokenizer: its tokenizer.
        max_length: longest input in tokens.

    Returns:
        The configuration of a two-layer Llama, 96 wide, with tied embeddings.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[END],
        pad_token_id=tokenizer.get_vocab()[END],
    )


def _functions_of(folder: Path) -> Iterator[str]:
    """Yield the functions and methods of a package in the order of its files, without docstrings and comments."""
    for file in sorted(p for p in folder.rglob("*.py") if not {"test", "tests"} & set(p.relative_to(folder).parts)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an invalid escape in somebody else's file is not our news
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for function in _outermost(tree):
            for node in ast.walk(function):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    if ast.get_docstring(node) is not None:
                        node.body = node.body[1:] or [ast.Pass()]
            text = ast.unparse(function)
            if len(text.split()) >= FEWEST_WORDS:
                yield text


def _outermost(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions of a module and of its classes, none of them twice."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _outermost(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _split_by_hash(rows: Rows, test_share: float) -> tuple[Rows, Rows]:
    """Split by the SHA-256 of the text, the same on every machine; equal texts stay together."""

    def held_back(text: str) -> bool:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < test_share

    return [row for row in rows if not held_back(row[0])], [row for row in rows if held_back(row[0])]


def _read(path: Path, text_column: str, label_column: str | None) -> Rows:
    """Read a file, or all files of a folder that can be read."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
        if not files:
            raise ValueError(f"{path} holds no file to read; known kinds are {', '.join(READERS)}.")
        return [row for file in files for row in _read(file, text_column, label_column)]
    kind = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if kind not in READERS:
        raise ValueError(f"{path} is of an unknown kind; known are {', '.join(READERS)}.")
    if kind == ".txt" and label_column is not None:
        raise ValueError(f"{path} is plain text without a column {label_column!r}; use .csv, .tsv, .json or .jsonl.")
    try:
        records = READERS[kind](path)
    except (ValueError, csv.Error) as error:  # JSON that is none, text that is not UTF-8
        raise ValueError(f"{path} cannot be read: {error}") from error
    return _pairs(records, f"{path},", "text" if kind == ".txt" else text_column, label_column)


def _pairs(records: Iterable[Any], where: str, text_column: str, label_column: str | None) -> Rows:
    """Take the columns of text and label out of records."""
    pairs = []
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise ValueError(f"{where} row {number} is no object with columns.")
        for column in filter(None, (text_column, label_column)):
            if record.get(column) is None:
                there = ", ".join(str(key) for key in record if key is not None)
                raise ValueError(f"{where} row {number} has no column {column!r}; there are {there or 'none'}.")
        pairs.append((str(record[text_column]), str(record[label_column]) if label_column else ""))
    if not any(text.strip() for text, _ in pairs):
        raise ValueError(f"{where.rstrip(',')} holds no text.")
    return pairs


def _hub_rows(split: Any, where: str, text_column: str, label_column: str | None) -> Rows:
    """Read a split of a data set, its classes by name."""
    rows = _pairs(split, where, text_column, label_column)
    names = getattr(split.features.get(label_column), "names", None) if label_column else None
    return rows if names is None else [(text, names[int(label)]) for text, label in rows]


def _lines(path: Path) -> list[Any]:
    """Read running text line by line, each with its end."""
    return [{"text": line} for line in io.StringIO(path.read_text(encoding="utf-8"))]


def _table(path: Path) -> list[Any]:
    """Read a table whose first row names the columns."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))


def _objects(path: Path) -> list[Any]:
    """Read JSON: a list of objects, or an object a line, whatever the file is called."""
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = [json.loads(line) for line in io.StringIO(text) if line.strip()]
    return found if isinstance(found, list) else [found]


READERS = {".txt": _lines, ".csv": _table, ".tsv": _table, ".json": _objects, ".jsonl": _objects}
