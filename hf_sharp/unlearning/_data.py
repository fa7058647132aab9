"""Pairs of one row to forget and one to retain, for a loss of two named terms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_sharp.unlearning._encoding import Encoder, Example, Row, encode_rows, pad


class ForgetRetainDataset(Dataset):
    """Item i is the i-th row to forget with a row to retain that is drawn anew each epoch.

    The retained row is a function of (seed, epoch, i) and of nothing else: the rows are put into a random order that
    depends on seed and epoch, and item i takes the i-th, beginning again in another order when all are used. So within
    an epoch no row comes twice before all have come once; ranks, which get different i from the Trainer's sampler, get
    different rows; a resumed run draws what an uninterrupted one does; and the number of workers changes nothing.
    (Published code draws independently for every item, some of it the same rows on all ranks.)

    A new epoch has to be told: add `EpochCallback`, as `UnlearnTrainer` does by itself. Accelerate tells a data set of
    it only in a run of one process that was not resumed within an epoch.

    Args:
        forget: examples of `Encoder`, with ``input_ids`` and ``labels``.
        retain: the same.
        seed: of the draws.

    Raises:
        ValueError: if one of both is empty or holds something else.
    """

    def __init__(self, forget: Sequence[Example], retain: Sequence[Example], seed: int = 0) -> None:
        for name, examples in (("forget", forget), ("retain", retain)):
            if not len(examples):
                raise ValueError(f"There are no rows to {name}.")
            if not {"input_ids", "labels"} <= set(examples[0]):
                raise ValueError(
                    f"Examples to {name} have input_ids and labels; these have {', '.join(examples[0])}. "
                    "Encode rows first: ForgetRetainDataset.from_rows(forget, retain, Encoder(tokenizer))."
                )
        if seed < 0:
            raise ValueError(f"seed is not negative; got {seed}.")
        self.forget, self.retain, self.seed = forget, retain, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @classmethod
    def from_rows(
        cls, forget: Iterable[Row] | str | Path, retain: Iterable[Row] | str | Path, encode: Encoder, seed: int = 0
    ) -> ForgetRetainDataset:
        """Encode rows and pair them.

        Args:
            forget: rows, or the path of a file of them.
            retain: the same.
            encode: turns a row into an example.
            seed: of the draws.

        Returns:
            The data set.
        """
        return cls(encode_rows(forget, encode), encode_rows(retain, encode), seed)

    @property
    def epoch(self) -> int:
        """The epoch that is drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other rows to retain.

        Args:
            epoch: number of the epoch, from 0.
        """
        self._epoch.fill_(epoch)

    def retained(self, index: int) -> int:
        """Say which row is retained beside a row to forget.

        Args:
            index: of the row to forget.

        Returns:
            Index of the row to retain, in this epoch.
        """
        cycle, place = divmod(index, len(self.retain))
        key = (self.epoch, cycle)
        if key not in self._orders:
            self._orders = {k: order for k, order in self._orders.items() if k[0] == self.epoch}
            self._orders[key] = np.random.default_rng([self.seed, *key]).permutation(len(self.retain))
        return int(self._orders[key][place])

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Example]:
        return {"forget": self.forget[index], "retain": self.retain[self.retained(index)]}


class EpochCallback(TrainerCallback):
    """Tells a `ForgetRetainDataset` which epoch begins, also over several processes and after a resume."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch before its first batch is fetched."""
        dataset = kwargs["train_dataloader"].dataset
        if isinstance(dataset, ForgetRetainDataset):
            dataset.set_epoch(int(state.epoch or 0))


@dataclass(frozen=True)
class ForgetRetainCollator:
    """Makes ``{"forget": {...}, "retain": {...}}`` of pairs, each term padded by itself on the right.

    For `SharpTrainer(..., args=TrainingArguments(remove_unused_columns=False))` with a `Sum` of two terms.

    Args:
        tokenizer: its padding token, or else its EOS, fills up ``input_ids``.
        pad_to_multiple_of: lengths are rounded up to a multiple of this.

    Raises:
        ValueError: if the tokenizer has neither.
    """

    tokenizer: Any
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token and no EOS. Set tokenizer.pad_token.")

    @property
    def pad_token_id(self) -> Any:
        """What fills up ``input_ids``; it is masked out of attention and labels."""
        own = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if own is None else own

    def __call__(self, pairs: Sequence[dict[str, Example]]) -> dict[str, dict[str, Any]]:
        """Collate pairs.

        Args:
            pairs: items of `ForgetRetainDataset`.

        Returns:
            For each term ``input_ids``, ``attention_mask`` and ``labels`` of shape [pairs, length]; beside them, where
            the examples bring them, ``reference_nll`` of shape [pairs] and ``alternative``, such a batch of its own.
            An optional column that only some examples have is an error.

        """
        return {term: self._batch([pair[term] for pair in pairs], term) for term in ("forget", "retain")}

    def _batch(self, examples: Sequence[Example], term: str) -> dict[str, Any]:
        batch: dict[str, Any] = pad(examples, self.pad_token_id, self.pad_to_multiple_of)
        for column in ("reference_nll", "alternative"):
            there = [example[column] for example in examples if column in example]
            if there and len(there) < len(examples):
                raise ValueError(f"Of {len(examples)} examples to {term} {len(there)} have {column}; all or none do.")
            if there:
                batch[column] = torch.tensor(there) if column == "reference_nll" else self._batch(there, term)
        return batch
