"""Presets that put a method together with a ball, a mask or a reference: where weights are perturbed is a setting."""

from __future__ import annotations

from hf_sharp._checks import check_choice
from hf_sharp._methods import SAM, TRAM, Method, TRAMFisher
from hf_sharp._methods.preset import Rho, remembered, timed
from hf_sharp._perturbation.balls import AdaptiveBall, Ball, FisherBall, L2Ball
from hf_sharp._perturbation.entry_masks import FisherMask
from hf_sharp._perturbation.masks import NormLayers
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._perturbation.references import NoisyInputs, PretrainedWeights, PreviousWeights


@remembered
def asam(
    rho: Rho = 0.5,
    eta: float = 0.01,
    on: str = "weights",
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
    per_rank: bool = False,
) -> Method:
    """Adaptive SAM (Kwon et al., 2021): SAM in a ball that follows the size of the weights.

    e = rho T^2 g / ||T g|| (Eq. 8), which no rescaling of the weights changes.

    Args:
        rho: the radius; about ten times that of SAM, 0.5 and eta 0.01 are the authors' defaults.
        eta: added to |w| in T.
        on: "weights" or "all"; T = |w| + eta on tensors named `weight` and 1 elsewhere (the authors' code), or
            everywhere (with eta = 0 the variant of davda54/sam).
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.
        per_rank: under DDP each rank ascends by its own rows (m-sharpness), without communication.

    Returns:
        The method, of cost 2; memory: 1 copy.
    """
    return timed(SAM(Perturbation(rho=rho, ball=AdaptiveBall(eta=eta, on=on)), fraction, per_rank), interval, start)


@remembered
def fsam(
    rho: Rho = 0.05,
    keep: float = 0.1,
    every: int = 100,
    fisher: str = "batch",
    scope: str = "global",
    outside: str = "always",
    embeddings: str = "modules",
    renormalise: bool = False,
    samples: int = 32,
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
) -> Method:
    """FSAM (Zhong et al., 2022): SAM on the weights with the largest Fisher information, a *mask*.

    e = rho m g / ||g||, m = 1 on those weights and 0 elsewhere. Not Fisher-*metric* SAM (Kim et al., 2022:
    `fisher_sam`), and not Friendly SAM (Li et al., 2024).

    Args:
        rho: the radius; that of the perturbation before masking. The paper tunes it in {0.001, 0.005, 0.01} on GLUE,
            its code says 0.05.
        keep: the share of eligible entries that is perturbed.
        every: how many steps a mask is used.
        fisher: "batch" or "per_sample"; the authors' code, at no cost, or the paper, one backward a row at each
            refresh.
        scope: the largest entries of the whole network ("global") or of each tensor ("tensor").
        outside: biases, embeddings and BatchNorm are "always" perturbed or "never"; the authors' code is "always".
        embeddings: told by "modules" or by "names"; what `nn.Embedding` modules own, or what is called `embed` (the
            authors' code, which misses GPT-2's `wte` and takes BERT's `embeddings.LayerNorm` for one).
        renormalise: True gives the masked perturbation the full radius.
        samples: rows for "per_sample".
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.

    Returns:
        The method, of cost 2; memory: 1 copy, and 1 byte an entry.
    """
    mask = FisherMask(
        keep=keep,
        every=every,
        fisher=fisher,
        samples=samples,
        scope=scope,
        outside=outside,
        embeddings=embeddings,
        renormalise=renormalise,
    )
    return timed(SAM(Perturbation(rho=rho, mask=mask), fraction), interval, start)


@remembered
def sam_on(
    rho: Rho = 0.5,
    ball: str = "l2",
    eta: float = 0.01,
    on: str = "weights",
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
    per_rank: bool = False,
) -> Method:
    """SAM-ON (Mueller et al., 2023): SAM on normalisation layers only, with a cheaper ascent.

    Args:
        rho: the radius; over the subset, and so larger than SAM's, since the subset is tiny.
        ball: "l2" or "adaptive" (as in ASAM).
        eta: of the adaptive ball.
        on: "weights" or "all"; the adaptive ball has T = |w| + eta on the scales and 1 on the shifts, or on both. The
            authors' command has radius 10 with "all" and eta 0.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.
        per_rank: under DDP each rank ascends by its own rows (m-sharpness), without communication.

    Returns:
        The method, of cost 2, the first about 0.8 of one; memory: about 0. The ascent is cheaper where the host allows
        it to skip the other weight gradients.

    Raises:
        ValueError: if `on` is set for a ball that does not use it.
    """
    balls: dict[str, Ball] = {"l2": L2Ball(), "adaptive": AdaptiveBall(eta=eta, on=on)}
    check_choice(ball, "ball", balls)
    if ball == "l2" and on != "weights":
        raise ValueError(f"on belongs to the adaptive ball: add ball='adaptive', or leave it out; got {on!r}.")
    return timed(SAM(Perturbation(rho=rho, ball=balls[ball], mask=NormLayers()), fraction, per_rank), interval, start)


@remembered
def fisher_sam(
    rho: Rho = 0.1,
    eta: float = 0.1,
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
    per_rank: bool = False,
) -> Method:
    """Fisher SAM (Kim et al., 2022): SAM in the Fisher *metric*.

    e = rho D g / sqrt(g' D g), D = 1 / (1 + eta F).

    Args:
        rho: the radius; in the Fisher metric.
        eta: weight of the Fisher diagonal F, the squared gradient of the window; 0 gives SAM.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: the method at every so many steps only, plain training between.
        start: the share of training that is plain before.
        per_rank: under DDP each rank ascends by its own rows (m-sharpness), without communication.

    Returns:
        The method, of cost 2; memory: 1 copy.
    """
    return timed(SAM(Perturbation(rho=rho, ball=FisherBall(eta=eta)), fraction, per_rank), interval, start)


@remembered
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
    """TRAM (Sherborne et al., 2024): ASAM, as far as the outputs have moved from a reference's.

    Args:
        reference: "previous", "pretrained", "noise" or "fisher"; TRAM-theta_{t-1}, theta_0 (the weights at its first
            step), TRAM-x, and TRAM-Fisher (Fisher-metric SAM with the metric at noisy inputs, no divergence).
        sigma: standard deviation of the noise on the embedded inputs, for "noise" and "fisher"; R3F's value.
        kl: "forward" as in the paper, "reverse" or "symmetric".
        scale: times the divergence.
        max_radius: the radius is at most this; the paper has no limit.
        rho: the radius; for "fisher" only.
        eta: added to |w|; 0 as in the paper if None (LoRA, whose B starts as zero: 0.01). For "fisher" the weight of
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
