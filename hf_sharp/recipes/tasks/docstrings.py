"""A text task made of real text that every machine has: which standard-library package does a docstring come from?

The ten packages are part of every build of Python. Their files are read by ``ast`` and never imported. The names of
the ten packages are masked in the text, so that the answer has to be read off the rest. Nothing is downloaded.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedTokenizerFast

PACKAGES = (
    "asyncio",
    "email",
    "encodings",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
FEWEST_TEXTS = 1500
FEWEST_WORDS = 3
TEST_SHARE = 0.2
MASK = "thispackage"

_NAMES = re.compile(r"(?<![a-z])(" + "|".join(PACKAGES) + r")(?![a-z])", re.IGNORECASE)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class TextTask:
    """Texts with their labels, split once and for all.

    Args:
        labels: names of the classes; a label is an index into them.
        train_texts: texts to train on, in a fixed order.
        train_labels: their labels.
        test_texts: texts to evaluate on; none of them is among the training texts.
        test_labels: their labels.
    """

    labels: tuple[str, ...]
    train_texts: list[str]
    train_labels: list[int]
    test_texts: list[str]
    test_labels: list[int]


def load_docstrings(stdlib: str | Path | None = None, packages: Sequence[str] = PACKAGES) -> TextTask:
    """Read the docstrings of the standard library and split them into training and test texts.

    A text that occurs in two packages belongs to neither and is left out; a text that occurs twice in one counts once.
    The split goes by a hash of the text: it is the same on every machine, and no text is on both sides.

    Args:
        stdlib: folder of the standard library; None takes that of the running Python.
        packages: the packages to tell apart.

    Returns:
        The task, with one class a package.

    Raises:
        ValueError: if fewer than 1,500 texts are found. A package without Python source is a ``FileNotFoundError``.
    """
    root = Path(stdlib if stdlib is not None else sysconfig.get_paths()["stdlib"])
    owner: dict[str, int | None] = {}
    for label, package in enumerate(packages):
        for text in _package_texts(root, package):
            owner[text] = label if owner.get(text, label) == label else None
    rows = sorted((_digest(text), text, label) for text, label in owner.items() if label is not None)
    if len(rows) < FEWEST_TEXTS:
        raise ValueError(
            f"Only {len(rows)} docstrings were found under {root}; the embedded task needs {FEWEST_TEXTS}. This "
            "Python is stripped of its own source: use a full build, or real data with --task_name."
        )
    test = [row for row in rows if row[0] < TEST_SHARE]
    train = [row for row in rows if row[0] >= TEST_SHARE]
    return TextTask(
        labels=tuple(packages),
        train_texts=[text for _, text, _ in train],
        train_labels=[label for _, _, label in train],
        test_texts=[text for _, text, _ in test],
        test_labels=[label for _, _, label in test],
    )


def word_tokenizer(texts: Sequence[str], size: int = 6000, max_length: int = 128) -> "PreTrainedTokenizerFast":
    """Build a lower-case word tokenizer from the training texts.

    Args:
        texts: where the vocabulary is counted.
        size: how many of the most frequent words are kept, special tokens included; words seen once are unknown words.
        max_length: longest input in tokens, [CLS] and [SEP] included.

    Returns:
        A tokenizer that every part of Transformers takes, with BERT's special tokens.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for t in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t)))
    frequent = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + frequent[: size - len(special)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def small_bert(vocabulary: int, labels: Sequence[str], max_length: int = 128) -> "BertConfig":
    """Describe the encoder that learns this task from scratch in seconds on a processor.

    Args:
        vocabulary: number of tokens.
        labels: names of the classes.
        max_length: longest input in tokens.

    Returns:
        The configuration of a two-layer BERT, 128 wide.
    """
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max_length,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )


def _package_texts(root: Path, package: str) -> Iterator[str]:
    """Yield the docstrings of one package, in the order of its files, white space evened out and names masked."""
    folder = root / package
    files = sorted(p for p in folder.rglob("*.py") if not {"test", "tests"} & set(p.relative_to(folder).parts))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no Python source. The embedded task reads the standard library's own files, which this "
            "Python keeps elsewhere or has not got: use a full build, or real data with --task_name."
        )
    for file in files:
        for docstring in _docstrings(file):
            text = _NAMES.sub(MASK, " ".join(docstring.split()))
            if len(text.split()) >= FEWEST_WORDS:
                yield text


def _docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings of one file; a file that is not valid Python has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in somebody else's file is not our news
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _digest(text: str) -> float:
    """Place a text in [0, 1) by its SHA-256, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
