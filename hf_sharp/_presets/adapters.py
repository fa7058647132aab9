"""Methods made for LoRA adapters: presets named as in the literature."""

from __future__ import annotations

from hf_sharp._adapters import BAR, BiLoRA, FlatLoRA
from hf_sharp._methods import Method
from hf_sharp._perturbation.schedules import Cosine
from hf_sharp._presets.timing import Rho, scheduled, timed


def bi_lora(rho: Rho = 0.05, rank: int = 8, interval: int = 1, start: float = 0.0) -> Method:
    """Bi-LoRA (Liu et al., 2026): an auxiliary adapter climbs while the adapter descends, in one backward.

    Args:
        rho: radius of the auxiliary's product over all layers. The paper's 0.05; 0.1 for SuperGLUE and Qwen.
        rank: of the auxiliary; the paper's 8.
        interval: the auxiliary at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: an auxiliary adapter, with its gradient and optimizer state.
    """
    return timed(BiLoRA(rho, rank), interval, start)


def bar(mu: Rho = 0.5, kind: str = "n", interval: int = 1, start: float = 0.0) -> Method:
    """BAR (Li et al., 2024): before each update the two halves of every adapter are balanced; no perturbation at all.

    Args:
        mu: strength, times the learning rate. The paper searches 0.2 to 2 (0.05 for QQP, 0.1 to 0.3 for GPT-2).
        kind: "n" balances by the gradients (nBAR), "o" by the weights (oBAR).
        interval: the balancing at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: none.
    """
    return timed(BAR(mu, kind), interval, start)


def flat_lora(sigma: Rho = 0.05, interval: int = 1, start: float = 0.0) -> Method:
    """Flat-LoRA (Li et al., 2025): the adapters' gradient under random noise on the base weights.

    Args:
        sigma: the last noise, reached from zero along half a cosine, in units of a row's root mean square; or a
            schedule (`Constant(0.05)` for none). The authors' 0.05 for language models, 0.15 for CLIP.
        interval: the noise at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: a copy of the adapted base weights.
    """
    return timed(FlatLoRA(scheduled(sigma, lambda last: Cosine(0.0, last))), interval, start)
