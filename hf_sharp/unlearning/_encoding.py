"""Questions with answers, or running text, as tokens and labels, for training, for attacks and for measuring alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"
IGNORED = -100

Row = Mapping[str, Any]
Example = dict[str, Any]  # input_ids and labels, lists of equal length; a row may bring more


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read rows from a file of JSON: one object a line (also when it is called .json, as in TOFU), or one list.

    Args:
        path: the file.

    Returns:
        The rows.

    Raises:
        ValueError: if the file is no JSON, or a row is no object, or there is none.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is neither JSON lines nor a JSON list: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no rows, which are objects with columns such as question and answer.")
    return rows


@dataclass(frozen=True)
class Encoder:
    """Turns a row into tokens, with labels on what the model is to say: the answer and its EOS, or all of a text.

    The whole string is tokenized at once, as a model meets it, and the prompt alone; what both have in common at
    their beginning is the prompt, masked with -100. An answer ends with the tokenizer's EOS, unless it was cut; what a
    chat template writes after the EOS is left out.

    Args:
        tokenizer: of the model.
        max_length: longer rows are cut at their end, in tokens.
        template: how question and answer are put together, with both names in braces; None takes the tokenizer's chat
            template if it has one, else ``PLAIN_TEMPLATE``.
        system: system message for a chat template.
        question: column of the question.
        answer: column of the answer.
        text: column of running text, for rows that have no question and answer.
        alternative: column of another answer to the same question, such as a refusal; if a row has it, its example
            has the key ``alternative`` with ``input_ids`` and ``labels``.
        reference_nll: column of the answer's negative log-likelihood under a reference model, summed over its tokens,
            if it was computed beforehand; that of the alternative is in a column of this name after
            ``alternative`` and an underscore.

    Raises:
        ValueError: if the template, the length or the tokenizer cannot do this.

    Example:
        >>> from transformers import AutoTokenizer
        >>> encode = Encoder(AutoTokenizer.from_pretrained("gpt2"))  # doctest: +SKIP
        >>> example = encode({"question": "Who wrote it?", "answer": "Nobody."})  # doctest: +SKIP
    """

    tokenizer: Any
    max_length: int = 512
    template: str | None = None
    system: str | None = None
    question: str = "question"
    answer: str = "answer"
    text: str = "text"
    alternative: str = "alternative"
    reference_nll: str = "reference_nll"

    def __post_init__(self) -> None:
        template = self.template or PLAIN_TEMPLATE
        if template.count("{question}") != 1 or template.count("{answer}") != 1:
            raise ValueError(f"A template has {{question}} and {{answer}} once each; got {template!r}.")
        if template.index("{question}") > template.index("{answer}"):
            raise ValueError(f"In a template the question stands before the answer; got {template!r}.")
        if self.max_length < 2:
            raise ValueError(f"max_length is a number of tokens, at least 2; got {self.max_length}.")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token, so no answer could end. Set tokenizer.eos_token.")
        if self.system is not None and not self.uses_chat_template:
            raise ValueError("A system message needs a chat template; write it into the template instead.")

    @property
    def uses_chat_template(self) -> bool:
        """Whether rows are put together by the tokenizer's chat template."""
        return self.template is None and bool(getattr(self.tokenizer, "chat_template", None))

    def __call__(self, row: Row) -> Example:
        """Encode one row.

        Args:
            row: columns of question and answer, or of text.

        Returns:
            ``input_ids`` and ``labels``, and what the optional columns bring.

        Raises:
            ValueError: if the row lacks the columns, or nothing is left to be predicted.
        """
        if row.get(self.question) is not None and row.get(self.answer) is not None:
            example = self.answered(row[self.question], row[self.answer]) | self._reference(row, self.reference_nll)
            if row.get(self.alternative) is not None:
                known = self._reference(row, f"{self.alternative}_{self.reference_nll}")
                example["alternative"] = self.answered(row[self.question], row[self.alternative]) | known
        elif row.get(self.text) is not None:
            example = self._finished(self._tokens(str(row[self.text])), 0) | self._reference(row, self.reference_nll)
        else:
            raise ValueError(
                f"A row needs the columns {self.question!r} and {self.answer!r}, or {self.text!r}; this one has "
                f"{', '.join(map(str, row)) or 'none'}. Name others with Encoder(question=, answer=, text=)."
            )
        return example

    def answered(self, question: str, answer: str) -> Example:
        """Encode a question with an answer to it.

        Args:
            question: what is asked.
            answer: what is answered.

        Returns:
            ``input_ids`` and ``labels``. If nothing of the answer is left, or the chat template writes another prompt
            when an answer follows, that is a ``ValueError``.
        """
        prompt, whole = self._strings(str(question), str(answer))
        beginning, tokens = self._tokens(prompt), self._tokens(whole)
        pairs = zip(beginning, tokens, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self.uses_chat_template and self.tokenizer.eos_token_id in tokens[common:]:
            after_last = tokens[::-1].index(self.tokenizer.eos_token_id)
            tokens = tokens[: len(tokens) - after_last]
        return self._finished(tokens, common)

    def prompt(self, question: str) -> list[int]:
        """Encode a question alone, for the model to answer.

        Args:
            question: what is asked.

        Returns:
            The tokens before an answer.
        """
        return self._tokens(self._strings(str(question), "")[0])

    def _strings(self, question: str, answer: str) -> tuple[str, str]:
        """The prompt alone, and the prompt with the answer."""
        if not self.uses_chat_template:
            before, after = (self.template or PLAIN_TEMPLATE).split("{answer}")
            prompt = before.replace("{question}", question)
            # A space before the answer belongs to the answer's first token.
            return prompt.rstrip(" "), prompt + answer + after
        asked = [{"role": "user", "content": question}]
        if self.system is not None:
            asked.insert(0, {"role": "system", "content": self.system})
        render = self.tokenizer.apply_chat_template
        prompt = render(asked, tokenize=False, add_generation_prompt=True)
        whole = render([*asked, {"role": "assistant", "content": answer}], tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "This chat template writes another prompt when an answer follows, so the answer's tokens cannot be "
                f"told apart: {prompt!r} against {whole!r}. Give a template of your own: Encoder(template=...)."
            )
        return prompt, whole

    def _reference(self, row: Row, column: str) -> dict[str, float]:
        return {} if row.get(column) is None else {"reference_nll": float(row[column])}

    def _tokens(self, string: str) -> list[int]:
        """Tokens of a string, without the EOS that some tokenizers put at every end."""
        special = not self.uses_chat_template  # which writes special tokens itself
        ids = list(self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"])
        return ids[:-1] if special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _finished(self, tokens: list[int], prompt: int) -> Example:
        """End with one EOS, cut, and mask the prompt."""
        eos = self.tokenizer.eos_token_id
        tokens = tokens if tokens[prompt:][-1:] == [eos] else [*tokens, eos]
        tokens = tokens[: self.max_length]
        labels = [IGNORED] * min(prompt, len(tokens)) + tokens[prompt:]
        if all(label == IGNORED for label in labels[1:]):  # before the first token there is nothing to predict it from
            raise ValueError(
                f"With {prompt} tokens of prompt and max_length={self.max_length} nothing is left to be predicted. "
                "Raise max_length, or leave the row out."
            )
        return {"input_ids": tokens, "labels": labels}


def encode_rows(rows: Iterable[Row] | str | Path, encode: Encoder) -> list[Example]:
    """Encode all rows of a file, a list or a data set.

    Args:
        rows: a path for `read_rows`, or anything that gives rows one by one, such as a `datasets.Dataset`.
        encode: the encoder.

    Returns:
        One example a row, in order.

    Raises:
        ValueError: if there is no row, or one cannot be encoded; its number is named.
    """
    examples = []
    for number, row in enumerate(read_rows(rows) if isinstance(rows, (str, Path)) else rows, start=1):
        try:
            examples.append(encode(row))
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
    if not examples:
        raise ValueError("There are no rows.")
    return examples


def pad(examples: Sequence[Example], pad_token_id: int, multiple_of: int = 1) -> dict[str, Tensor]:
    """Make one batch of examples, padded on the right, whatever side the tokenizer generates on.

    Under a causal mask padding on the right changes nothing, while on the left it would shift learned positions.

    Args:
        examples: with ``input_ids`` and ``labels``.
        pad_token_id: fills up input_ids; it is masked out of attention and labels.
        multiple_of: the length is rounded up to a multiple of this.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, all int64 of shape [examples, length].
    """
    longest = max(len(example["input_ids"]) for example in examples)
    length = -(-longest // multiple_of) * multiple_of

    def filled(column: Iterator[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in column])

    return {
        "input_ids": filled((e["input_ids"] for e in examples), pad_token_id),
        "attention_mask": filled(([1] * len(e["input_ids"]) for e in examples), 0),
        "labels": filled((e["labels"] for e in examples), IGNORED),
    }
