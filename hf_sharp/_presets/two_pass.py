"""Methods that combine the gradients of two or more points: presets named as in the literature."""

from __future__ import annotations

from hf_sharp._methods import GAM, GSAM, TRAM, WSAM, FriendlySAM, Method, TRAMFisher, VaSSO
from hf_sharp._perturbation.balls import AdaptiveBall
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._perturbation.references import NoisyInputs, PretrainedWeights, PreviousWeights
from hf_sharp._perturbation.schedules import FollowsLearningRate
from hf_sharp._presets.timing import Rho, scheduled, timed


def gsam(
    rho: Rho = 0.05,
    rho_min: float | None = None,
    alpha: float = 0.4,
    minimize_fp: bool = True,
    interval: int = 1,
    start: float = 0.0,
) -> Method:
    """Surrogate-gap guided SAM (Zhuang et al., 2022): gs - alpha (the part of g orthogonal to gs).

    Args:
        rho: the radius at the largest learning rate; it follows the learning rate. The paper's ViT from scratch: 0.6.
        rho_min: the radius at learning rate zero; a sixth of rho if None, as the paper's 0.1 is of its 0.6.
        alpha: how much of the orthogonal part is removed; 0 gives SAM. The paper's ViT: 0.6.
        minimize_fp: True descends the perturbed loss, as in the paper; False is the official code's other form.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 2 copies.

    Raises:
        ValueError: if `rho_min` is given beside a schedule.
    """
    if callable(rho) and rho_min is not None:
        raise ValueError(
            "rho_min belongs to the schedule that gsam has by itself, and rho is another schedule. Leave rho_min out, "
            "or give rho as a number."
        )
    schedule = scheduled(rho, lambda radius: FollowsLearningRate(radius, radius / 6 if rho_min is None else rho_min))
    return timed(GSAM(Perturbation(schedule), alpha, minimize_fp), interval, start)


def wsam(rho: Rho = 0.05, gamma: float = 0.9, interval: int = 1, start: float = 0.0) -> Method:
    """WSAM (Yue et al., 2023), coupled form: (1 - a) g + a gs with a = gamma / (1 - gamma).

    Args:
        rho: the radius; the authors' code has 0.05.
        gamma: weight of the sharpness in [0, 1); 0.5 gives SAM.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 2 copies.
    """
    return timed(WSAM(Perturbation(rho), gamma), interval, start)


def friendly_sam(
    rho: Rho = 0.05,
    sigma: float = 1.0,
    lam: float = 0.9,
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
) -> Method:
    """Friendly SAM (Li et al., 2024): the ascent leaves out the running mean of the gradient.

    Args:
        rho: the radius; class default of the official code.
        sigma: how much of the mean is taken away; 0 gives SAM.
        lam: how much of the old mean a step keeps; 0.9 in the official class, 0.95 on its command line.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 3 copies.
    """
    return timed(FriendlySAM(Perturbation(rho), fraction, sigma=sigma, lam=lam), interval, start)


def vasso(rho: Rho = 0.05, theta: float = 0.9, fraction: float = 1.0, interval: int = 1, start: float = 0.0) -> Method:
    """VaSSO (Li & Giannakis, 2023): the ascent follows a running mean of gradients.

    Args:
        rho: the radius; 0.2 on CIFAR-100 in the authors' code.
        theta: weight of the present gradient in (0, 1]; 1 gives SAM.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 3 copies.
    """
    return timed(VaSSO(Perturbation(rho), fraction, theta=theta), interval, start)


def gam(rho: Rho = 0.2, r: float = 0.02, alpha: float = 0.1, interval: int = 1, start: float = 0.0) -> Method:
    """GAM (Zhang et al., 2023): g + alpha rho grad ||grad L|| where that norm is largest nearby.

    Args:
        rho: radius of the neighbourhood; 0.2 in the authors' CIFAR runs (`grad_norm_rho`).
        r: length of the differences; 0.02 there (`grad_rho`).
        alpha: weight of the flatness; not settled between paper and code, this value is our choice.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 4; memory: 3 copies.
    """
    return timed(GAM(Perturbation(rho), r, alpha), interval, start)


def tram(
    reference: str = "previous",
    sigma: float = 0.1,
    kl: str = "forward",
    scale: float = 1.0,
    max_radius: float | None = None,
    rho: Rho = 0.1,
    eta: float | None = None,
    interval: int = 1,
    start: float = 0.0,
) -> Method:
    """TRAM (Sherborne et al., 2024): ASAM whose radius is the divergence of the outputs from a reference's.

    Args:
        reference: "previous" (TRAM-theta_{t-1}), "pretrained" (theta_0: the weights at its first step), "noise"
            (TRAM-x), or "fisher" (TRAM-Fisher, Fisher-metric SAM with the metric at noisy inputs; no divergence).
        sigma: standard deviation of the noise on the embedded inputs, for "noise" and "fisher"; R3F's value.
        kl: "forward" as in the paper, "reverse" or "symmetric".
        scale: times the divergence.
        max_radius: the radius is at most this; the paper has no limit.
        rho: the radius, for "fisher" only.
        eta: added to |w|, 0 as in the paper if None (LoRA, whose B starts as zero: 0.01); for "fisher" the weight of
            the Fisher diagonal, 0.1 if None.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2 + 1/3, "fisher" 3; memory: 3 copies for "previous" and "fisher", 2 for "pretrained", 1
        for "noise".

    Raises:
        ValueError: if there is no such reference, or it does not use an option that is set.
    """
    foreign = {"kl": (kl, "forward"), "scale": (scale, 1.0), "max_radius": (max_radius, None)}
    if reference != "fisher":
        foreign = {"rho": (rho, 0.1)} | ({} if reference == "noise" else {"sigma": (sigma, 0.1)})
    unused = [name for name, (value, default) in foreign.items() if value != default]
    if unused:
        raise ValueError(f"tram(reference={reference!r}) does not use {' and '.join(unused)}: leave it out.")
    if reference == "fisher":
        return timed(TRAMFisher(rho, sigma, 0.1 if eta is None else eta), interval, start)
    references = {"previous": PreviousWeights, "pretrained": PretrainedWeights, "noise": lambda: NoisyInputs(sigma)}
    if reference not in references:
        raise ValueError(f"reference is one of {', '.join([*references, 'fisher'])}; got {reference!r}.")
    ball = AdaptiveBall(eta=0.0 if eta is None else eta, on="all")
    return timed(TRAM(references[reference](), kl, scale, max_radius, ball), interval, start)
