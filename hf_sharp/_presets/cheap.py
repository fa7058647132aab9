"""Methods that cost less than two passes: presets named as in the literature."""

from __future__ import annotations

from hf_sharp._methods import MESA, MSAM, SAF, LookSAM, Method, PreviousGradientSAM
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._perturbation.schedules import ZeroDuringWarmup
from hf_sharp._presets.timing import Rho, scheduled, timed


def looksam(rho: Rho = 0.05, every: int = 5, alpha: float = 0.7, interval: int = 1, start: float = 0.0) -> Method:
    """LookSAM (Liu et al., 2022): SAM every few steps, what it adds to the gradient reused between.

    Args:
        rho: the radius.
        every: SAM at steps that this divides; the paper's 5.
        alpha: weight of the reused part; the paper's 0.7 (another group found 0.1 best).
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1 + 1/every; memory: 2 copies at SAM steps, 1 between.
    """
    return timed(LookSAM(Perturbation(rho), every, alpha), interval, start)


def msam(rho: Rho = 1.0, interval: int = 1, start: float = 0.0) -> Method:
    """Momentum-SAM (Becker et al., 2025): the gradient further along the momentum; no second pass.

    Args:
        rho: the radius, zero while the learning rate warms up. 1 is the authors' AdamW class default, 0.3 that for
            SGD; their runs use about fifteen times SAM's.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: 1 copy.
    """
    return timed(MSAM(Perturbation(scheduled(rho, ZeroDuringWarmup))), interval, start)


def previous_gradient_sam(rho: Rho = 0.05, interval: int = 1, start: float = 0.0) -> Method:
    """SAM along the last step's gradient (S2-SAM 2024, AsyncSAM, DP-SAT 2023); no second pass.

    Args:
        rho: the radius.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 1; memory: 2 copies.
    """
    return timed(PreviousGradientSAM(Perturbation(rho)), interval, start)


def mesa(
    lam: float = 0.8, decay: float = 0.999, temperature: float = 5.0, interval: int = 1, start: float = 0.0
) -> Method:
    """MESA (Du et al., 2022): the loss plus a divergence from the outputs of the averaged weights.

    Args:
        lam: weight of the divergence; the paper's 0.8.
        decay: how much of the old average a step keeps; the default of the authors' script is 0.9998.
        temperature: divides the logits; the paper's 5.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before, while the average is taken already; the paper starts after
            5 of its many epochs.

    Returns:
        The method, of cost 1 + 1/3; memory: 2 copies.
    """
    return timed(MESA(lam, decay, temperature), interval, start)


def saf(lam: float = 0.3, lag: int = 3, temperature: float = 5.0, interval: int = 1, start: float = 0.0) -> Method:
    """SAF (Du et al., 2022): the loss plus a divergence from each sample's own outputs some visits ago.

    Needs a column `sample_index` in the training data, and more epochs than `lag`.

    Args:
        lam: weight of the divergence; the paper's 0.3.
        lag: how many visits ago; the paper's 2 to 3.
        temperature: divides the logits; the paper's 5.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before; the paper starts after 5 of its many epochs.

    Returns:
        The method, of cost 1; memory: 0 copies, and the stored logits.
    """
    return timed(SAF(lam, lag, temperature), interval, start)
