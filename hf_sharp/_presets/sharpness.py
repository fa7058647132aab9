"""SAM and its relatives that differ in where they look: presets named as in the literature."""

from __future__ import annotations

from hf_sharp._methods import SAM, Method, Plain
from hf_sharp._perturbation.balls import AdaptiveBall, Ball, FisherBall, L2Ball
from hf_sharp._perturbation.entry_masks import FisherMask
from hf_sharp._perturbation.masks import NormLayers
from hf_sharp._perturbation.perturbation import Perturbation
from hf_sharp._presets.timing import Rho, timed


def plain() -> Method:
    """Plain training.

    Returns:
        The method, of cost 1; memory: none.
    """
    return Plain()


def sam(
    rho: Rho = 0.05,
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
    per_rank: bool = False,
) -> Method:
    """Sharpness-aware minimisation (Foret et al., 2021, Eq. 2 with p = 2): e = rho g / ||g||.

    Args:
        rho: the radius; the paper's 0.05. BERT-like encoders with AdamW: 0.005 to 0.05; T5: 0.05 to 0.15.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: SAM at every so many steps only, plain training between.
        start: the share of training that is plain before.
        per_rank: under DDP each rank ascends by its own rows (m-sharpness), without communication.

    Returns:
        The method, of cost 2; memory: 1 copy.
    """
    return timed(SAM(Perturbation(rho=rho), fraction, per_rank), interval, start)


def asam(
    rho: Rho = 0.5,
    eta: float = 0.01,
    on: str = "weights",
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
    per_rank: bool = False,
) -> Method:
    """Adaptive SAM (Kwon et al., 2021, Eq. 8): e = rho T^2 g / ||T g||, invariant to rescaling of the weights.

    Args:
        rho: the radius, about ten times that of SAM; 0.5 and eta 0.01 are the authors' defaults.
        eta: added to |w| in T.
        on: "weights": T = |w| + eta on tensors named `weight`, 1 elsewhere (the authors' code); "all": everywhere
            (with eta = 0 the variant of davda54/sam).
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: SAM at every so many steps only, plain training between.
        start: the share of training that is plain before.
        per_rank: under DDP each rank ascends by its own rows (m-sharpness), without communication.

    Returns:
        The method, of cost 2; memory: 1 copy.
    """
    return timed(SAM(Perturbation(rho=rho, ball=AdaptiveBall(eta=eta, on=on)), fraction, per_rank), interval, start)


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
    """FSAM, SAM on a Fisher *mask* (Zhong et al., EMNLP Findings 2022): e = rho m g / ||g||, m the largest Fisher.

    Not Fisher-*metric* SAM (Kim et al., 2022: `fisher_sam`), and not Friendly SAM (Li et al., 2024).

    Args:
        rho: the radius of the perturbation before masking; the paper tunes it in {0.001, 0.005, 0.01} on GLUE, its
            code says 0.05.
        keep: the share of eligible entries that is perturbed.
        every: how many steps a mask is used.
        fisher: "batch" (the authors' code: no cost) or "per_sample" (the paper: one backward a row at each refresh).
        scope: the largest entries of the whole network ("global") or of each tensor ("tensor").
        outside: biases, embeddings and BatchNorm are "always" perturbed (the authors' code) or "never".
        embeddings: what counts as one: what `nn.Embedding` "modules" own, or, by "names", what is called `embed` (the
            authors' code, which misses GPT-2's `wte` and takes BERT's `embeddings.LayerNorm` for one).
        renormalise: True gives the masked perturbation the full radius.
        samples: rows for "per_sample".
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: SAM at every so many steps only, plain training between.
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
    """SAM-ON, perturbing normalisation layers only (Mueller et al., 2023): almost no memory, a cheaper ascent.

    Args:
        rho: the radius over the subset; larger than SAM's, since the subset is tiny.
        ball: "l2" or "adaptive" (as in ASAM).
        eta: of the adaptive ball.
        on: of the adaptive ball: T = |w| + eta on the scales and 1 on the shifts ("weights"), or on both ("all"). The
            authors' command has radius 10 with "all" and eta 0.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: SAM at every so many steps only, plain training between.
        start: the share of training that is plain before.
        per_rank: under DDP each rank ascends by its own rows (m-sharpness), without communication.

    Returns:
        The method, of cost 2; memory: about 0. The ascent is cheaper than a pass (measured: about 0.8 of one), where
        the host allows it to skip the other weight gradients.

    Raises:
        ValueError: if there is no such ball, or `on` is set for one that does not use it.
    """
    balls: dict[str, Ball] = {"l2": L2Ball(), "adaptive": AdaptiveBall(eta=eta, on=on)}
    if ball not in balls:
        raise ValueError(f"ball is one of {tuple(balls)}; got {ball!r}.")
    if ball == "l2" and on != "weights":
        raise ValueError(f"on belongs to the adaptive ball: add ball='adaptive', or leave it out; got {on!r}.")
    return timed(SAM(Perturbation(rho=rho, ball=balls[ball], mask=NormLayers()), fraction, per_rank), interval, start)


def fisher_sam(
    rho: Rho = 0.1,
    eta: float = 0.1,
    fraction: float = 1.0,
    interval: int = 1,
    start: float = 0.0,
    per_rank: bool = False,
) -> Method:
    """Fisher-*metric* SAM (Kim et al., ICML 2022): e = rho D g / sqrt(g' D g), D = 1 / (1 + eta F).

    Args:
        rho: the radius in the Fisher metric.
        eta: weight of the Fisher diagonal F, the squared gradient of the window; 0 gives SAM.
        fraction: the share of the window that the ascent gradient is taken on; below 1 a step costs 1 + fraction.
        interval: SAM at every so many steps only, plain training between.
        start: the share of training that is plain before.
        per_rank: under DDP each rank ascends by its own rows (m-sharpness), without communication.

    Returns:
        The method, of cost 2; memory: 1 copy.
    """
    return timed(SAM(Perturbation(rho=rho, ball=FisherBall(eta=eta)), fraction, per_rank), interval, start)
