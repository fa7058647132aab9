"""Rows of two terms, forget and retain, and how a Trainer is told of them: for tests of a loss of named terms."""

from models import batch_of, mlp_rows


def pairs(count, make=mlp_rows, **settings):
    """Rows of two terms, from different seeds."""
    both = zip(make(count, seed=1, **settings), make(count, seed=2, **settings), strict=True)
    return [{"forget": one, "retain": other} for one, other in both]


def collate(rows):
    return {term: batch_of([row[term] for row in rows]) for term in rows[0]}


SETTINGS = {"data_collator": collate, "remove_unused_columns": False}
