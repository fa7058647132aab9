"""The references of the family, checked by closed form, by hand-unrolled steps and by what they must agree with."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

import family as f
import family_outputs as o
from models import batch_of, mlp_rows, tiny_mlp, windows_of
from references import (
    adamw,
    asam,
    fisher_sam,
    flat,
    layout_of,
    linear_decay,
    mlp_loss,
    mlp_shapes,
    plain,
    sam,
    sgd,
    trajectory,
    window_gradient,
)

SHAPES = mlp_shapes()
LAYOUT = layout_of(SHAPES)
SIZE = max(part.stop for part in LAYOUT.values())
LOSS, LOGITS = mlp_loss(SHAPES), o.mlp_logits(SHAPES)
WINDOW = windows_of(mlp_rows(8), micro=4, accumulate=2)[0]


def equal(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def unit(v):
    return v / v.norm()


def on_mlp(v):
    return window_gradient(LOSS, v, WINDOW)


def steps(rule, weights, grad=on_mlp, state=None, window=WINDOW, **settings):
    """What the rule returns at each of the given weights, one a step, and its state."""
    state = {} if state is None else state
    returned = []
    for step, w in enumerate(weights):
        state["now"] = {"lr_factor": 1.0, "memory": {}, "window": window, "steps": len(weights)}
        returned.append(rule(grad, w, LAYOUT, state, step, **settings))
    return returned, state


@pytest.fixture
def bowl():
    """L = 0.5 w'Hw: (H, gradient, w)."""
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64) / SIZE**0.5
    h = root @ root.T + 0.1 * torch.eye(SIZE, dtype=torch.float64)
    return h, lambda v: h @ v, torch.randn(SIZE, generator=draw, dtype=torch.float64)


@pytest.fixture
def walk():
    """Three places of the small model, some way apart."""
    w = flat(tiny_mlp(seed=3))
    draw = torch.Generator().manual_seed(1)
    return [w, *(w + 0.1 * torch.randn(SIZE, generator=draw, dtype=torch.float64) for _ in range(2))]


# ---- what the loop tells the rules, and private randomness ------------------------------------------------------


def test_the_loop_tells_the_factor_the_memory_the_window_and_the_number_of_steps():
    told = []

    def watch(grad_fn, w, layout, state, step):
        told.append({**state["now"], "memory": dict(state["now"]["memory"])})
        return grad_fn(w)

    windows = windows_of(mlp_rows(16), micro=4, accumulate=2)
    w0 = flat(tiny_mlp())
    for optimizer, key in ((sgd(0.1, momentum=0.9), "buffer"), (adamw(0.1), "m")):
        told.clear()
        trajectory(watch, LOSS, w0, windows, optimizer, 3, layout=LAYOUT, lr_factor=linear_decay(3))
        assert [now["lr_factor"] for now in told] == [1.0, 2 / 3, 1 / 3]
        assert [now["window"] for now in told] == [windows[0], windows[1], windows[0]]
        assert all(now["steps"] == 3 for now in told)
        assert [key in now["memory"] for now in told] == [False, True, True]


def test_private_numbers_depend_on_seed_step_and_tag_and_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    first = f.drawn(1, 2, "a", (3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, f.drawn(1, 2, "a", (3, 4))) and first.dtype == torch.float32
    for other in ((0, 2, "a"), (1, 0, "a"), (1, 2, "b")):
        assert not torch.equal(first, f.drawn(*other, (3, 4)))
    by_hand = torch.Generator().manual_seed(4757384534450244597)  # half of the little-endian 8-byte blake2b of "1/2/a"
    assert torch.equal(first, torch.randn(3, 4, generator=by_hand))
    many = f.drawn(0, 0, "many", (100_000,))
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02


# ---- identities -------------------------------------------------------------------------------------------------

AS_SAM = {
    "gsam": partial(f.gsam, rho=0.3, rho_min=0.1, alpha=0.0),
    "looksam": partial(f.looksam, rho=0.3, every=1, alpha=0.7),
    "wsam": partial(f.wsam, rho=0.3, gamma=0.5),
    "vasso": partial(f.vasso, rho=0.3, theta=1.0),
    "friendly": partial(f.friendly_sam, rho=0.3, sigma=0.0, lam=0.9),
    "penalty": partial(f.gradient_penalty, lam=0.3, r=0.3),
    "tram_fisher": partial(o.tram_fisher, noisy_loss_fn=o.noisy_loss(LOGITS), rho=0.3, sigma=0.1, eta=0.0),
    "every": partial(f.every, interval=1, inner=sam, rho=0.3),
    "after": partial(f.after, start=0.0, inner=sam, rho=0.3),
    "with_probability": partial(f.with_probability, p=1.0, seed=0, inner=sam, rho=0.3),
    "adaptive": partial(f.adaptive, lam1=-1e9, lam2=-1e9, inner=sam, rho=0.3),
    "fraction": partial(o.fraction, share=1.0, batch_loss=LOSS, rho=0.3),
}
AS_PLAIN = {
    "gsam": partial(f.gsam, rho=0.0, rho_min=0.0, alpha=0.0),
    "gsam_other": partial(f.gsam, rho=0.3, rho_min=0.0, alpha=0.0, minimize_fp=False),
    "wsam": partial(f.wsam, rho=0.3, gamma=0.0),
    "gam": partial(f.gam, rho=0.0, r=0.02, alpha=0.1),
    "msam": partial(f.msam, rho=0.3),
    "previous": partial(f.previous_gradient_sam, rho=0.0),
    "smoothing": partial(f.randomized_smoothing, sigma=0.0, samples=2, seed=0, shapes=SHAPES),
    "penalty": partial(f.gradient_penalty, lam=0.0, r=0.1),
    "curvature": partial(f.curvature_regularization, lam=0.0, mu=0.01, r=0.01),
    "tram_noisy": partial(o.tram, logits_fn=LOGITS, reference="noisy", sigma=0.0),
    "tram_zero": partial(o.tram, logits_fn=LOGITS, scale=0.0),
    "mesa": partial(o.mesa, logits_fn=LOGITS, lam=0.0, decay=0.5, temperature=5.0),
    "after": partial(f.after, start=1.0, inner=sam, rho=0.3),
    "with_probability": partial(f.with_probability, p=0.0, seed=0, inner=sam, rho=0.3),
}


@pytest.mark.parametrize("rule", AS_SAM.values(), ids=AS_SAM)
def test_settings_that_make_it_sam(rule, walk):
    equal(steps(rule, walk)[0], steps(sam, walk, rho=0.3)[0])


@pytest.mark.parametrize("rule", AS_PLAIN.values(), ids=AS_PLAIN)
def test_settings_that_make_it_the_gradient(rule, walk):
    equal(steps(rule, walk)[0], steps(plain, walk)[0])


def test_tram_with_a_constant_radius_is_asam_on_all_weights(walk):
    tram = partial(o.tram, logits_fn=LOGITS, scale=1e9, max_radius=0.3)
    expected = steps(asam, walk, rho=0.3, eta=0.0, on="all")[0]
    equal(steps(tram, walk, reference="noisy")[0], expected)
    for reference in ("previous", "pretrained"):
        returned = steps(tram, walk, reference=reference)[0]
        assert torch.equal(returned[0], on_mlp(walk[0]))
        equal(returned[1:], expected[1:])
    equal(steps(tram, walk, reference="noisy", eta=0.1)[0], steps(asam, walk, rho=0.3, eta=0.1, on="all")[0])


def test_tram_fisher_without_noise_is_fisher_sam(walk):
    fisher = partial(o.tram_fisher, noisy_loss_fn=o.noisy_loss(LOGITS), rho=0.3, eta=5.0)
    equal(steps(fisher, walk, sigma=0.0)[0], steps(fisher_sam, walk, rho=0.3, eta=5.0)[0])
    assert (steps(fisher, walk, sigma=0.5)[0][0] - steps(fisher, walk, sigma=0.0)[0][0]).norm() > 1e-6


DEGREE_ONE = [name for name in AS_SAM if name != "tram_fisher"]


@pytest.mark.parametrize("name", DEGREE_ONE)
def test_the_combining_rules_are_of_degree_one_in_the_loss(name, walk):
    general = {
        "gsam": partial(f.gsam, rho=0.3, rho_min=0.1, alpha=0.4),
        "looksam": partial(f.looksam, rho=0.3, every=2, alpha=0.7),
        "wsam": partial(f.wsam, rho=0.3, gamma=0.9),
        "vasso": partial(f.vasso, rho=0.3, theta=0.4),
        "friendly": partial(f.friendly_sam, rho=0.3, sigma=1.0, lam=0.9),
        "penalty": partial(f.gradient_penalty, lam=0.3, r=0.1),
        "adaptive": partial(f.adaptive, inner=sam, rho=0.3),
        "fraction": partial(o.fraction, share=0.5, batch_loss=LOSS, rho=0.3),
    }
    rule = general.get(name, AS_SAM[name])
    _scales(rule, walk)


@pytest.mark.parametrize(
    "rule",
    [
        partial(f.gam, rho=0.2, r=0.02, alpha=0.1),
        partial(f.previous_gradient_sam, rho=0.3),
        partial(f.randomized_smoothing, sigma=0.1, samples=2, seed=0, shapes=SHAPES),
        partial(f.curvature_regularization, lam=1.0, mu=0.1, r=0.01),
        partial(o.tram, logits_fn=LOGITS),
        partial(o.tram, logits_fn=LOGITS, reference="noisy"),
    ],
)
def test_the_other_rules_are_of_degree_one_in_the_loss(rule, walk):
    _scales(rule, walk)


def _scales(rule, walk):
    scaled = steps(rule, walk, grad=lambda v: 2.0**16 * on_mlp(v))[0]
    for high, low in zip(scaled, steps(rule, walk)[0], strict=True):
        assert torch.equal(high, 2.0**16 * low)


@pytest.mark.parametrize("rule", [r for r in (AS_SAM | AS_PLAIN).values() if r.func not in (o.fraction, o.mesa)])
def test_a_zero_gradient_gives_no_nan(rule, walk):
    if rule.func is o.tram_fisher:
        rule = partial(rule, noisy_loss_fn=lambda w, batch, noise: (w * 0).sum())
    for g in steps(rule, walk, grad=torch.zeros_like)[0]:
        assert torch.equal(g, torch.zeros_like(g))


# ---- closed forms -----------------------------------------------------------------------------------------------


def test_gsam_takes_off_or_adds_the_orthogonal_part(bowl):
    h, grad, w = bowl
    g, gs = h @ w, sam(grad, w, LAYOUT, {}, 0, rho=0.3)
    cosine = (g @ gs) / g.norm() / gs.norm()
    ours = f.gsam(grad, w, LAYOUT, {}, 0, rho=0.3, rho_min=0.0, alpha=0.4)
    equal(ours, gs - 0.4 * (g - g.norm() * cosine * unit(gs)))
    assert float((ours - gs) @ gs) == pytest.approx(0.0, abs=1e-10)
    other = f.gsam(grad, w, LAYOUT, {}, 0, rho=0.3, rho_min=0.0, alpha=0.4, minimize_fp=False)
    equal(other, g + 0.4 * (gs - gs.norm() * cosine * unit(g)))
    assert (other @ gs) > (g @ gs)


@pytest.mark.parametrize(("factor", "radius"), [(1.0, 0.5), (0.5, 0.3), (0.0, 0.1), (2.0, 0.5), (-1.0, 0.1)])
def test_gsams_radius_follows_the_learning_rate(bowl, factor, radius):
    _, grad, w = bowl
    state = {"now": {"lr_factor": factor}}
    f.gsam(grad, w, LAYOUT, state, 0, rho=0.5, rho_min=0.1, alpha=0.4)
    assert state["e"].norm() == pytest.approx(radius, rel=1e-14)


def test_wsam_weighs_the_two_gradients(bowl):
    _, grad, w = bowl
    g, gs = grad(w), sam(grad, w, LAYOUT, {}, 0, rho=0.3)
    equal(f.wsam(grad, w, LAYOUT, {}, 0, rho=0.3, gamma=0.9), g + 9 * (gs - g), 1e-10)


def test_looksam_by_hand(bowl):
    h, grad, w = bowl
    weights = [w, 0.5 * w + 1, w - 2, w + 3]
    returned, state = steps(f.looksam, weights, grad, rho=0.3, every=3, alpha=0.7)
    g, gs = grad(w), grad(w) + 0.3 * h @ unit(grad(w))
    upright = unit(gs - (gs @ g) / (g @ g) * g)
    equal(returned[0], gs)
    for step in (1, 2):
        g = grad(weights[step])
        equal(returned[step], g + 0.7 * g.norm() * upright)
    equal(returned[3], sam(grad, weights[3], LAYOUT, {}, 0, rho=0.3))
    assert state["o"].norm() == pytest.approx(1.0, rel=1e-14)
    late = f.looksam(grad, w, LAYOUT, {}, 1, rho=0.3, every=3, alpha=0.7)
    equal(late, gs)


def test_looksam_counts_a_rounding_error_as_no_direction():
    w = torch.randn(SIZE, dtype=torch.float64)
    returned, state = steps(f.looksam, [w, w + 1], lambda v: 3 * v, rho=0.3, every=2, alpha=0.7)
    assert not state["o"].any() and torch.equal(returned[1], 3 * (w + 1))


def test_gam_on_a_quadratic_has_a_closed_form(bowl):
    h, grad, w = bowl
    there = w + 0.2 * unit(h @ unit(h @ w))
    expected = h @ w + 0.1 * 0.2 * h @ unit(h @ there)
    equal(f.gam(grad, w, LAYOUT, {}, 0, rho=0.2, r=0.02, alpha=0.1), expected, 1e-10)


def test_gam_close_by_is_the_gradient_penalty(walk):
    ours = f.gam(on_mlp, walk[1], LAYOUT, {}, 0, rho=1e-7, r=0.02, alpha=0.1 / 1e-7)
    equal(ours, f.gradient_penalty(on_mlp, walk[1], LAYOUT, {}, 0, lam=0.1, r=0.02), 1e-6)


def test_randomized_smoothing_on_a_quadratic_is_the_gradient_at_the_mean(bowl):
    _, grad, w = bowl
    settings = {"sigma": 0.1, "samples": 3, "seed": 7, "shapes": SHAPES}
    z = [torch.cat([f.drawn(7, 4, f"{k}/{name}", SHAPES[name]).flatten() for name in LAYOUT]) for k in range(3)]
    ours = f.randomized_smoothing(grad, w, LAYOUT, {}, 4, **settings)
    equal(ours, grad(w + 0.1 * torch.stack(z).double().mean(0)))


# ---- memory: unrolled by hand -----------------------------------------------------------------------------------


def test_vasso_by_hand(bowl):
    _, grad, w = bowl
    weights = [w, w + 1, w - 2]
    returned, _ = steps(f.vasso, weights, grad, rho=0.3, theta=0.4)
    g = [grad(v) for v in weights]
    d = [g[0], 0.6 * g[0] + 0.4 * g[1], 0.36 * g[0] + 0.24 * g[1] + 0.4 * g[2]]
    equal(returned, [grad(v + 0.3 * unit(direction)) for v, direction in zip(weights, d, strict=True)])


def test_friendly_sam_by_hand(bowl):
    _, grad, w = bowl
    weights = [w, w + 1, w - 2]
    returned, _ = steps(f.friendly_sam, weights, grad, rho=0.3, sigma=0.5, lam=0.9)
    g = [grad(v) for v in weights]
    d = [g[0], g[1] - 0.5 * g[0], g[2] - 0.5 * (0.9 * g[0] + 0.1 * g[1])]
    equal(returned, [grad(v + 0.3 * unit(direction)) for v, direction in zip(weights, d, strict=True)])


def test_previous_gradient_sam_by_hand(bowl):
    _, grad, w = bowl
    returned, _ = steps(f.previous_gradient_sam, [w, w + 1, w - 2], grad, rho=0.3)
    first = grad(w)
    second = grad(w + 1 + 0.3 * unit(first))
    equal(returned, [first, second, grad(w - 2 + 0.3 * unit(second))])


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_msam_by_hand_with_both_optimizers(bowl, warmup):
    h, grad, w = bowl

    def loss(v, batch):
        return 0.5 * v @ h @ v

    momentum = sgd(0.1, momentum=0.9, weight_decay=0.2)
    ours = trajectory(f.msam, loss, w, [[None]], momentum, 3, layout=LAYOUT, rho=0.3, warmup=warmup)
    buffer = grad(w) + 0.2 * w
    v = w - 0.1 * buffer
    equal(ours[0], v)
    for step in (1, 2):
        g = grad(v if step < warmup else v - 0.3 * unit(buffer))
        buffer = 0.9 * buffer + g + 0.2 * v
        v = v - 0.1 * buffer
        equal(ours[step], v)

    adam = adamw(0.1, betas=(0.9, 0.99), weight_decay=0.2)
    ours = trajectory(f.msam, loss, w, [[None]], adam, 2, layout=LAYOUT, rho=0.3, warmup=warmup)
    memory = {}
    v = adam(w, grad(w), memory, 1.0)
    g = grad(v if warmup == 2 else v - 0.3 * unit(0.1 * grad(w)))
    equal(ours, [v, adam(v, g, memory, 1.0)])


# ---- penalties against double backward --------------------------------------------------------------------------


def test_exact_penalties_on_a_quadratic(bowl):
    h, grad, w = bowl

    def loss(v, batch):
        return 0.5 * v @ h @ v

    exact = h @ w + 0.3 * h @ unit(h @ w)
    equal(f.gradient_penalty_exact(loss, w, [None], 0.3), exact)
    equal(f.gradient_penalty(grad, w, LAYOUT, {}, 0, lam=0.3, r=0.05), exact)
    equal(f.curvature_exact(loss, w, [None], 0.3, 0.01), h @ w)
    equal(f.curvature_regularization(grad, w, LAYOUT, {}, 0, lam=0.3, mu=0.01, r=0.01), h @ w, 1e-10)


def test_exact_penalties_are_the_slopes_of_the_penalised_losses(walk):
    w, mu, h = walk[1], 0.2, 1e-5
    v = unit(on_mlp(w))
    along = unit(torch.randn(SIZE, dtype=torch.float64))

    def height(at, penalty):
        return torch.stack([LOSS(at, batch) for batch in WINDOW]).mean() + 0.3 * penalty(at).norm()

    for penalty, exact in (
        (on_mlp, f.gradient_penalty_exact(LOSS, w, WINDOW, 0.3)),
        (lambda at: on_mlp(at + mu * v) - on_mlp(at), f.curvature_exact(LOSS, w, WINDOW, 0.3, mu)),
    ):
        slope = (height(w + h * along, penalty) - height(w - h * along, penalty)) / (2 * h)
        assert (exact - on_mlp(w)).norm() > 1e-3
        equal(slope, exact @ along, 1e-8)


def test_differences_come_to_the_exact_penalties_linearly(walk):
    w = walk[1]
    exact = f.gradient_penalty_exact(LOSS, w, WINDOW, 0.3)
    errors = [(f.gradient_penalty(on_mlp, w, LAYOUT, {}, 0, lam=0.3, r=r) - exact).norm() for r in (4e-4, 2e-4, 1e-4)]
    _halves(errors, exact)
    exact = f.curvature_exact(LOSS, w, WINDOW, 0.3, 0.1)
    ours = partial(f.curvature_regularization, on_mlp, w, LAYOUT, {}, 0, lam=0.3, mu=0.1)
    _halves([(ours(r=r) - exact).norm() for r in (4e-4, 2e-4, 1e-4)], exact)


def _halves(errors, exact):
    assert 0 < errors[-1] < 1e-3 * exact.norm()
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2.0, rel=0.02)


# ---- outputs ----------------------------------------------------------------------------------------------------


def test_mlp_logits_are_those_of_the_loss_and_of_the_module():
    model = tiny_mlp(seed=3)
    w, batch = flat(model), WINDOW[0]
    equal(LOGITS(w, batch), model(batch["x"])["logits"].detach())
    equal(o.noisy_loss(LOGITS)(w, batch), LOSS(w, batch))
    noise = torch.randn(4, 5, 6, dtype=torch.float64)
    hook = model.embed.register_forward_hook(lambda module, inputs, output: output + noise)
    equal(LOGITS(w, batch, noise), model(batch["x"])["logits"].detach())
    hook.remove()


def test_divergence_is_torchs_own():
    a, b = torch.randn(2, 7, 4, dtype=torch.float64)
    forward = kl_divergence(Categorical(logits=a), Categorical(logits=b))
    reverse = kl_divergence(Categorical(logits=b), Categorical(logits=a))
    equal(o.divergence(a, b), forward)
    equal(o.divergence(a, b, "reverse"), reverse)
    equal(o.divergence(a, b, "symmetric"), (forward + reverse) / 2)


def test_valid_positions_by_hand():
    logits = torch.arange(2 * 4).reshape(2, 4, 1)
    labels = torch.tensor([[-100, 1, 1, -100], [1, -100, -100, 1]])
    assert o.positions(logits, {"labels": labels}).flatten().tolist() == [1, 2, 4, 7]
    assert o.positions(logits, {"labels": labels}, causal=True).flatten().tolist() == [0, 1, 6]
    assert torch.equal(o.positions(logits[:, 0], {"labels": labels[:, 0]}), logits[:, 0])


def test_input_noise_goes_by_the_row_of_the_window():
    rows = mlp_rows(6)
    settings = {"sigma": 0.1, "width": 6, "seed": 3}
    whole = o.input_noise([batch_of(rows)], 2, **settings)
    cut = o.input_noise([batch_of(rows[:4]), batch_of(rows[4:])], 2, **settings)
    assert torch.equal(torch.cat(cut), whole[0])
    assert torch.equal(whole[0][5], 0.1 * f.drawn(3, 2, "input/5", (5, 6)).double())


@pytest.mark.parametrize("kl", ["forward", "reverse", "symmetric"])
def test_trams_radius_is_the_mean_divergence_from_its_reference(walk, kl):
    def apart(one, other):
        a, b = Categorical(logits=one), Categorical(logits=other)
        forward, reverse = kl_divergence(a, b), kl_divergence(b, a)
        return {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kl].mean()

    joint = {key: torch.cat([batch[key] for batch in WINDOW]) for key in WINDOW[0]}
    present = LOGITS(walk[2], joint)
    noise = torch.cat(o.input_noise(WINDOW, 2, sigma=0.1, width=6, seed=0))
    for reference, against in (
        ("previous", LOGITS(walk[1], joint)),
        ("pretrained", LOGITS(walk[0], joint)),
        ("noisy", LOGITS(walk[2], joint, noise)),
    ):
        tram = partial(o.tram, logits_fn=LOGITS, reference=reference, kl=kl, scale=3.0)
        _, state = steps(tram, walk)
        d = 3 * apart(against, present)
        equal(state["radius"], d)
        e = state["e"]
        equal((e[walk[2] != 0] / walk[2][walk[2] != 0]).norm(), d)
        assert (e @ on_mlp(walk[2])) > 0
        assert steps(tram, walk, max_radius=1e-9)[1]["radius"] == 1e-9


def test_trams_radius_counts_tokens_over_the_window():
    """Logits are the weights themselves here; the micro-batches have one and three valid next tokens."""
    shape = (1, 4, 3)
    labels = (torch.tensor([[1, -100, -100, 2]]), torch.tensor([[-100, 0, 1, 2]]))
    window = [{"labels": one, "at": torch.tensor(k)} for k, one in enumerate(labels)]
    layout = layout_of({"a": (24,)})

    def logits_fn(w, batch, noise=None):
        return w[:24].view(2, *shape)[int(batch["at"])]

    before, after = torch.randn(2, 24, dtype=torch.float64)
    state = {"now": {"window": window}}
    for step, w in enumerate((before, after)):
        o.tram(lambda v: v, w, layout, state, step, logits_fn=logits_fn, causal=True)
    a, b = before.view(8, 3), after.view(8, 3)
    each = F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="none").sum(-1)
    equal(state["radius"], each[[2, 4, 5, 6]].mean())


def test_mesa_by_hand(walk):
    returned, state = steps(o.mesa, walk, logits_fn=LOGITS, lam=0.8, decay=0.6, temperature=5.0)
    teachers = [walk[0], 0.6 * walk[0] + 0.4 * walk[1], 0.36 * walk[0] + 0.24 * walk[1] + 0.4 * walk[2]]
    for w, teacher, g in zip(walk, teachers, returned, strict=True):

        def loss(v, batch, teacher=teacher):
            taught = (LOGITS(teacher, batch) / 5).softmax(-1)
            return LOSS(v, batch) + 0.8 * 25 * F.kl_div(
                (LOGITS(v, batch) / 5).log_softmax(-1), taught, reduction="batchmean"
            )

        equal(g, window_gradient(loss, w, WINDOW))
    equal(returned[0], on_mlp(walk[0]))
    assert (returned[1] - on_mlp(walk[1])).norm() > 1e-4
    equal(state["teacher"], teachers[2])


@pytest.mark.parametrize("mean_over", ["all", "referenced"])
def test_saf_by_hand(walk, mean_over):
    """Lag 2: samples 0 and 1 come at every step, sample 2 at the second and third, sample 3 at the third."""
    rows = [row | {"sample_index": torch.tensor(k)} for k, row in enumerate(mlp_rows(4))]
    saf = partial(o.saf, logits_fn=LOGITS, lam=0.3, lag=2, temperature=5.0, mean_over=mean_over)
    state = {}
    for step, count in enumerate((2, 3, 4)):
        window = [batch_of(rows[:2]), batch_of(rows[2:count])] if count > 2 else [batch_of(rows[:2])]
        state["now"] = {"window": window}
        grad = partial(window_gradient, LOSS, window=window)
        g = saf(grad, walk[step], LAYOUT, state, step)
        if step < 2:
            assert torch.equal(g, grad(walk[step]))
    referenced = batch_of(rows[:2])
    taught = (LOGITS(walk[0], referenced) / 5).softmax(-1)

    def term(v, batch):
        each = F.kl_div((LOGITS(v, batch) / 5).log_softmax(-1), taught, reduction="none").sum()
        return 0.3 * 25 * each / (4 if mean_over == "all" else 2)

    equal(g, grad(walk[2]) + window_gradient(term, walk[2], [referenced]))
    assert (g - grad(walk[2])).norm() > 1e-4
    assert {sample: len(seen) for sample, seen in state["history"].items()} == {0: 3, 1: 3, 2: 2, 3: 1}


# ---- combinators ------------------------------------------------------------------------------------------------


def test_every_and_after_take_turns(walk):
    weights = [*walk, *walk]
    sharp, flat_ = steps(sam, weights, rho=0.3)[0], steps(plain, weights)[0]
    equal(steps(f.every, weights, interval=3, inner=sam, rho=0.3)[0], [sharp[0], *flat_[1:3], sharp[3], *flat_[4:]])
    equal(steps(f.after, weights, start=0.5, inner=sam, rho=0.3)[0], [*flat_[:3], *sharp[3:]])
    equal(steps(f.after, weights, start=0.51, inner=sam, rho=0.3)[0], [*flat_[:4], *sharp[4:]])
    nested = partial(f.after, start=0.5, inner=partial(f.every, interval=2, inner=sam))
    equal(steps(nested, weights, rho=0.3)[0], [*flat_[:4], sharp[4], flat_[5]])


def test_with_probability_takes_that_share():
    w = torch.ones(1, dtype=torch.float64)
    returned, state = steps(f.with_probability, [w] * 2000, lambda v: v, p=0.3, seed=5, inner=sam, rho=1.0)
    assert sum(state["taken"]) == pytest.approx(600, abs=80)
    assert [float(g) == 2.0 for g in returned] == state["taken"]
    assert steps(f.with_probability, [w] * 50, lambda v: v, p=0.3, seed=6, inner=plain)[1]["taken"] != state["taken"]


def test_ae_sam_decides_as_by_hand():
    """Squared norms 4, 1, 9, 4 with decay 1/2: at the last step 4 is below the mean, but c is then -1/2."""
    weights = [torch.tensor([s], dtype=torch.float64).sqrt() for s in (4.0, 1.0, 9.0, 4.0)]
    returned, state = steps(f.adaptive, weights, lambda v: v, decay=0.5, inner=sam, rho=1.0)
    assert state["taken"] == [True, False, True, True]
    equal(torch.cat(returned), torch.tensor([3.0, 1.0, 4.0, 3.0], dtype=torch.float64))
    mu, var = state["spread"]
    assert mu == pytest.approx(4.875, rel=1e-14) and var == pytest.approx(3.3046875, rel=1e-14)
    flipped = steps(f.adaptive, weights, lambda v: v, lam1=1.0, lam2=-1.0, decay=0.5, inner=plain)[1]
    assert flipped["taken"] == [True, False, True, False]


def test_the_leading_part_of_a_window():
    many = [batch_of(mlp_rows(2, seed=k)) for k in range(8)]
    one = [batch_of(mlp_rows(8))]
    for share, count in ((1.0, 8), (0.5, 4), (0.3, 2), (0.25, 2), (0.1, 1), (0.01, 1)):
        part = o.leading_part(many, share)
        assert len(part) == count and all(a is b for a, b in zip(part, many, strict=False))
        (part,) = o.leading_part(one, share)
        assert torch.equal(part["x"], one[0]["x"][:count]) and torch.equal(part["labels"], one[0]["labels"][:count])


def test_only_the_ascent_comes_from_the_leading_part(walk):
    w = walk[1]
    for window, part in (
        (WINDOW, WINDOW[:1]),
        ([batch_of(mlp_rows(8))], [batch_of(mlp_rows(8)[:4])]),
    ):
        grad = partial(window_gradient, LOSS, window=window)
        expected = grad(w + 0.3 * unit(window_gradient(LOSS, w, part)))
        state = {"now": {"window": window}}
        ours = o.fraction(grad, w, LAYOUT, state, 0, share=0.5, batch_loss=LOSS, rho=0.3)
        equal(ours, expected)
        others = partial(o.fraction, share=0.5, batch_loss=LOSS, inner=f.vasso, rho=0.3, theta=0.9)
        equal(others(grad, w, LAYOUT, state, 0), expected)


def test_all_of_them_run_in_the_loop_as_settings_of_trajectory():
    windows, w0 = windows_of(mlp_rows(16), micro=4, accumulate=2), flat(tiny_mlp())
    settings = {"interval": 2, "inner": o.fraction, "share": 0.5, "batch_loss": LOSS, "rho": 0.3}
    path = trajectory(f.every, LOSS, w0, windows, sgd(0.1), 3, layout=LAYOUT, **settings)
    flat_path = trajectory(plain, LOSS, w0, windows, sgd(0.1), 3, layout=LAYOUT)
    assert not torch.equal(path[0], flat_path[0]) and torch.isfinite(path[2]).all()
