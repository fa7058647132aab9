"""Membership inference: can what a model was asked to forget be told from what it never saw?"""

from __future__ import annotations

from torch import Tensor


def auc(members: Tensor, others: Tensor) -> float:
    """Area under the ROC curve: the chance that a member scores higher than another, ties counting half.

    Args:
        members: scores such as `min_k` of rows that a model was trained on, shape [n].
        others: of rows that it never saw, shape [m].

    Returns:
        0.5 where the scores say nothing, 1 where all members lie above all others.

    Raises:
        ValueError: if there is nothing to compare.
    """
    if not len(members) or not len(others):
        raise ValueError("An AUC needs scores of members and of others.")
    above = (members[:, None] > others).double() + 0.5 * (members[:, None] == others).double()
    return float(above.mean())


def privleak(unlearned: float, retrained: float) -> float:
    """MUSE's PrivLeak (Shi et al., 2025, section 3.1): how far membership shows, against a model trained without.

    100 (A - A_retrained) / A_retrained, where A = 1 - AUC, as MUSE's code counts it (the paper writes AUC, and says of
    the sign what holds for A): negative if the forgotten rows still look like members (-100 before any unlearning of
    a model that knows them by heart), positive if they look stranger than rows never seen, which gives them away too.

    Args:
        unlearned: `auc` of the forgotten rows' scores over those of rows never seen, under the unlearned model.
        retrained: the same under the model that was trained without the forgotten rows; about 0.5.

    Returns:
        PrivLeak in per cent; 0 is best.

    Raises:
        ValueError: if under the retrained model every forgotten row looks like a member.
    """
    if retrained >= 1:
        raise ValueError(
            "Under the retrained model all rows look like members (AUC 1), so there is nothing to divide by."
        )
    return 100 * (retrained - unlearned) / (1 - retrained)
