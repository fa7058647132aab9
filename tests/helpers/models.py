"""Tiny models and data for the tests, built from seeds: no download, the global random stream is not moved."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

Rows = list[dict[str, Tensor]]


class TinyMLP(nn.Module):
    """The module twin of `references.mlp_loss`: same names, same order, same loss when `dropout` is 0.

    Args:
        vocab: number of tokens.
        width: size of the embedding.
        hidden: size of the tanh layer.
        classes: number of labels.
        dropout: after the tanh layer.
        norm: "layer", or "batch" for a layer with running statistics.
        unused: adds a parameter `spare.weight` that the loss does not use; its gradient must stay None.
        seed: of the initial weights.
    """

    accepts_loss_kwargs = False  # read by Trainer: the loss is a mean and ignores num_items_in_batch

    def __init__(
        self,
        vocab: int = 11,
        width: int = 6,
        hidden: int = 8,
        classes: int = 3,
        dropout: float = 0.0,
        norm: str = "layer",
        unused: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        with seeded(seed):
            self.embed = nn.Embedding(vocab, width)
            self.hidden = nn.Linear(width, hidden)
            self.norm = nn.LayerNorm(hidden) if norm == "layer" else nn.BatchNorm1d(hidden)
            self.head = nn.Linear(hidden, classes)
            if unused:
                self.spare = nn.Linear(2, 2, bias=False)
        self.dropout = nn.Dropout(dropout)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.dropout(torch.tanh(self.hidden(self.embed(x).mean(dim=1))))
        logits = self.head(self.norm(hidden))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def tiny_mlp(float64: bool = True, **settings: Any) -> TinyMLP:
    return _precise(TinyMLP(**settings), float64)


def tiny_bert(
    dropout: float = 0.1, float64: bool = False, classes: int = 3, layers: int = 2, seed: int = 0, **settings: Any
) -> BertForSequenceClassification:
    """BERT for classification, hidden 16. It takes loss kwargs and ignores them: see `accepts_loss_kwargs`."""
    options = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "num_labels": classes,
    }
    with seeded(seed):
        model = BertForSequenceClassification(BertConfig(**(options | settings)))
    return _precise(model, float64)


def mean_bert() -> BertForSequenceClassification:
    """tiny_bert with dropout, and with the word that its loss is a mean whatever the Trainer counts."""
    model = tiny_bert(dropout=0.1)
    model.accepts_loss_kwargs = False
    return model


def tiny_vit(
    dropout: float = 0.1, float64: bool = False, classes: int = 3, layers: int = 2, seed: int = 0, **settings: Any
) -> ViTForImageClassification:
    """ViT for classification of 8x8 images, hidden 16."""
    options = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "num_labels": classes,
    }
    with seeded(seed):
        model = ViTForImageClassification(ViTConfig(**(options | settings)))
    return _precise(model, float64)


def tiny_llama(
    dropout: float = 0.1, float64: bool = False, layers: int = 2, seed: int = 0, **settings: Any
) -> LlamaForCausalLM:
    """Llama for next-token prediction, hidden 16. Its RMSNorm, attention weights and loss are float32 in any case."""
    options = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "attention_dropout": dropout,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with seeded(seed):
        model = LlamaForCausalLM(LlamaConfig(**(options | settings)))
    return _precise(model, float64)


def mlp_rows(count: int, tokens: int = 5, vocab: int = 11, classes: int = 3, seed: int = 0) -> Rows:
    """Rows for `TinyMLP`: x and labels."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randint(vocab, (tokens,), generator=draw), "labels": torch.randint(classes, (), generator=draw)}
        for _ in range(count)
    ]


def text_rows(count: int, tokens: int = 8, vocab: int = 32, classes: int = 3, seed: int = 0) -> Rows:
    """Rows for `tiny_bert`: input_ids, attention_mask and labels; the last tokens of every other row are padding."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        seen = torch.ones(tokens, dtype=torch.long)
        seen[tokens - 2 * (index % 2) :] = 0
        ids = torch.randint(1, vocab, (tokens,), generator=draw) * seen
        rows.append({"input_ids": ids, "attention_mask": seen, "labels": torch.randint(classes, (), generator=draw)})
    return rows


def image_rows(count: int, size: int = 8, classes: int = 3, float64: bool = False, seed: int = 0) -> Rows:
    """Rows for `tiny_vit`: pixel_values and labels."""
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if float64 else torch.float32
    return [
        {
            "pixel_values": torch.randn(3, size, size, generator=draw, dtype=dtype),
            "labels": torch.randint(classes, (), generator=draw),
        }
        for _ in range(count)
    ]


def causal_rows(count: int, tokens: int = 8, vocab: int = 32, ragged: bool = False, seed: int = 0) -> Rows:
    """Rows for `tiny_llama`; with `ragged` the labels of some positions are -100, a different number in each row."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(3, vocab, (tokens,), generator=draw)
        labels = ids.clone()
        if ragged:
            labels[: 1 + index % (tokens - 2)] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def batch_of(rows: Rows) -> dict[str, Tensor]:
    """One batch, the rows stacked."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def windows_of(rows: Rows, micro: int, accumulate: int) -> list[list[dict[str, Tensor]]]:
    """Rows in order, as windows of `accumulate` micro-batches of `micro` rows; an incomplete last one is dropped."""
    size = micro * accumulate
    return [
        [batch_of(rows[at : at + micro]) for at in range(start, start + size, micro)]
        for start in range(0, len(rows) - size + 1, size)
    ]


class seeded:
    """Draws inside come from `seed`; the global CPU stream is left as it was."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.kept = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.kept)


def _precise(model: Any, float64: bool) -> Any:
    return model.double() if float64 else model
