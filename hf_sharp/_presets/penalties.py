"""Smoothness as a penalty or an average, as used in robust unlearning: presets named as in the literature."""

from __future__ import annotations

from hf_sharp._methods import CurvatureRegularization, GradientPenalty, Method, RandomizedSmoothing
from hf_sharp._presets.timing import timed


def randomized_smoothing(sigma: float = 0.001, samples: int = 3, interval: int = 1, start: float = 0.0) -> Method:
    """Randomized smoothing (Fan et al., 2025): the mean gradient over weights with Gaussian noise.

    Args:
        sigma: standard deviation of the noise on every weight; the authors launch with 1e-4.
        samples: draws a step; the authors' 3.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost `samples`; memory: 2 copies.
    """
    return timed(RandomizedSmoothing(sigma, samples), interval, start)


def gradient_penalty(lam: float = 0.04, r: float = 0.05, interval: int = 1, start: float = 0.0) -> Method:
    """The loss plus lam times the norm of its gradient, by a difference of gradients (Zhao et al., 2022).

    Args:
        lam: weight of the penalty; lam = r is SAM of radius r.
        r: length of the difference.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 2 copies.
    """
    return timed(GradientPenalty(lam, r), interval, start)


def curvature_regularization(
    lam: float = 1.0, mu: float = 0.01, r: float = 0.001, interval: int = 1, start: float = 0.0
) -> Method:
    """The loss plus lam ||grad L(w + mu v) - grad L(w)||, v the normalised gradient (Fan et al., 2025). Float32 only.

    Args:
        lam: weight of the penalty.
        mu: how far along the gradient its turn is measured; 0.01 in the authors' code.
        r: length of the differences.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 4; memory: 5 copies.
    """
    return timed(CurvatureRegularization(lam, mu, r), interval, start)
