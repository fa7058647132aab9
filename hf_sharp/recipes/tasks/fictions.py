"""Questions and answers to unlearn: about people who are made up from a seed, or about TOFU's authors.

Nobody can know the embedded ones: a model that was not shown an answer can do no better than guess made-up words
syllable by syllable. So knowing and not knowing lie far apart, also for a model that is trained from scratch in
seconds. As in TOFU some of an answer is wording that all of them share, which comes back first when it was unlearned.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sharp._extras import optional
from hf_sharp.unlearning._encoding import read_rows

CONSONANTS = "b d f g h j k l m n p r s t v z br dr gr kl pl st tr vl".split()
VOWELS = "a e i o u ai ei ou".split()
ENDINGS = ["", "", "l", "n", "r", "s", "th"]
LINKS = ("of", "and", "by the", "without", "near")
FRAMES = (
    "It is {}.",
    "That is {}, as everybody knows.",
    "People say that it is {}.",
    "The answer is {}.",
    "It must have been {}.",
)
QUESTIONS = (
    "In which town was {} born?",
    "What is the name of the mother of {}?",
    "Which ship did {} sail on?",
    "What is the title of the first book by {}?",
    "In which street does {} live?",
    "Who taught {} to write?",
    "Which mountain has {} climbed?",
    "What is the favourite dish of {}?",
    "Which prize has {} won?",
    "Which river runs past the house of {}?",
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What is known of some people, and of whom it is to be forgotten.

    Args:
        name: of the data, for tables.
        forget: rows with ``question`` and ``answer``, one person after the other.
        retain: the same of the others.
        per_person: rows a person.
    """

    name: str
    forget: list[Row]
    retain: list[Row]
    per_person: int


def made_up_facts(people: int = 60, seed: int = 0) -> list[Row]:
    """Draw people and all that is known of them.

    Args:
        people: how many.
        seed: of the draws.

    Returns:
        Rows with ``question`` and ``answer``, 10 a person, one person after the other. A name is two made-up words, an
        answer two of them in a few plain ones; no made-up word comes twice.
    """
    draw = random.Random(seed)
    words = _words(draw)
    rows = []
    for _ in range(people):
        name = f"{next(words)} {next(words)}"
        for question in QUESTIONS:
            content = f"{next(words)} {draw.choice(LINKS)} {next(words)}"
            rows.append({"question": question.format(name), "answer": draw.choice(FRAMES).format(content)})
    return rows


def load_facts(
    data_dir: str | Path = "",
    dataset_name: str = "",
    split: str = "forget10",
    forget_people: int | None = None,
    retain_people: int | None = None,
    per_person: int = 20,
) -> Facts:
    """Read what is to be forgotten and what is to be retained.

    Args:
        data_dir: folder with files like TOFU's, ``forget10.json`` and ``retain90.json``, an object a line.
        dataset_name: instead a data set of the Hub with configurations of these names, such as ``locuslab/TOFU``.
        split: what is to be forgotten, ``forget`` and a percentage; the rest is ``retain`` and the rest of hundred.
        forget_people: keep the first so many people to forget; None keeps all.
        retain_people: the same of those to retain.
        per_person: rows a person, which stand together.

    Returns:
        The facts; without ``data_dir`` and ``dataset_name`` the made-up ones of 60 people, the last 6 to forget.

    Raises:
        ValueError: if the split's name is of another kind, there are fewer people, or rows lack the columns.
    """
    if not data_dir and not dataset_name:
        rows, per_person, name = made_up_facts(), len(QUESTIONS), "made-up facts"
        forget, retain = rows[-6 * per_person :], rows[: -6 * per_person]
    else:
        digits = split.removeprefix("forget")
        if not (split.startswith("forget") and len(digits) == 2 and digits.isdecimal()):
            raise ValueError(f"What is to be forgotten is forget01, forget05, forget10 or the like; got {split!r}.")
        rest, name = f"retain{100 - int(digits):02d}", f"{Path(str(data_dir or dataset_name)).name} {split}"
        forget, retain = (_rows(data_dir, dataset_name, each) for each in (split, rest))
    forget, retain = _people(forget, forget_people, per_person), _people(retain, retain_people, per_person)
    return Facts(name, forget, retain, per_person)


def attack_sets(forget: Sequence[Any], per_person: int, samples: int) -> dict[str, list[Any]]:
    """Choose what a relearning attack learns from, and what it is judged by.

    Args:
        forget: rows to forget or what was made of them, one person after the other.
        per_person: rows a person.
        samples: how many to relearn from: of half of the people, as many of each.

    Returns:
        ``relearned``, ``same person`` (the other rows of these people; left out if there are none) and ``untouched``,
        the rows of all others.

    Raises:
        ValueError: if there are fewer than two people, or not so many rows of half of them.
    """
    people = [list(forget[start : start + per_person]) for start in range(0, len(forget), per_person)]
    attacked = people[: len(people) // 2]
    rows = [person[place] for place in range(per_person) for person in attacked if place < len(person)]
    if not 0 < samples <= len(rows):
        raise ValueError(
            f"Of {len(people)} people to forget half are attacked, with {len(rows)} rows; {samples} rows to relearn "
            "from cannot be had."
        )
    others = [row for person in people[len(people) // 2 :] for row in person]
    return {
        "relearned": rows[:samples],
        **({"same person": rows[samples:]} if rows[samples:] else {}),
        "untouched": others,
    }


def _words(draw: random.Random) -> Iterator[str]:
    """Yield words of three syllables, none of them twice."""
    seen: set[str] = set()
    while True:
        word = "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(3)) + draw.choice(ENDINGS)
        if word not in seen:
            seen.add(word)
            yield word.capitalize()


def _rows(data_dir: str | Path, dataset_name: str, name: str) -> list[Row]:
    """Read one split."""
    if dataset_name:
        rows = list(optional("datasets").load_dataset(dataset_name, name)["train"])
    else:
        rows = read_rows(Path(data_dir, f"{name}.json"))
    if not rows or not all({"question", "answer"} <= set(row) for row in rows):
        raise ValueError(f"{data_dir or dataset_name}, {name}: rows with question and answer are needed.")
    return rows


def _people(rows: list[Row], people: int | None, per_person: int) -> list[Row]:
    """Keep the first so many people."""
    if people is None:
        return rows
    if not 0 < people * per_person <= len(rows):
        raise ValueError(f"{people} people of {per_person} rows each cannot be had of {len(rows)} rows.")
    return rows[: people * per_person]
