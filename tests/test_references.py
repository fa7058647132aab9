"""The references are checked by closed form and against torch.optim, since everything else is checked against them."""

from functools import partial

import pytest
import torch

from models import mlp_rows, tiny_mlp, windows_of
from references import (
    adamw,
    asam,
    clip,
    entrywise,
    fisher_mask,
    fisher_sam,
    flat,
    fsam,
    layout_of,
    linear_decay,
    mlp_loss,
    mlp_shapes,
    plain,
    sam,
    sam_on,
    scaling,
    sgd,
    trajectory,
)

pytestmark = pytest.mark.fast

SHAPES = mlp_shapes()
LAYOUT = layout_of(SHAPES)
SIZE = max(part.stop for part in LAYOUT.values())


def equal(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def bowl():
    """L = 0.5 w'Hw on as many entries as the small model has: (H, gradient, w)."""
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64) / SIZE**0.5
    h = root @ root.T + 0.1 * torch.eye(SIZE, dtype=torch.float64)
    w = torch.randn(SIZE, generator=draw, dtype=torch.float64)
    return h, lambda v: h @ v, w


def perturbation(rule, bowl, **settings):
    """The e that a rule took, read from its state, and again from g_s - g = He."""
    h, grad, w = bowl
    state = {}
    shifted = rule(grad, w, LAYOUT, state, 0, **settings)
    equal(h @ state["e"], shifted - grad(w), 1e-10)
    return state["e"]


# ---- the rules --------------------------------------------------------------------------------------------------


def test_sam_on_a_quadratic_has_a_closed_form(bowl):
    h, grad, w = bowl
    expected = h @ w + 0.3 * (h @ h @ w) / (h @ w).norm()
    equal(sam(grad, w, LAYOUT, {}, 0, rho=0.3), expected)


def test_plain_and_zero_radius_are_the_gradient(bowl):
    _, grad, w = bowl
    settings = {
        sam: {},
        asam: {"eta": 0.01},
        fsam: {"keep": 0.1, "every": 1},
        sam_on: {"subset": {"norm.weight"}},
        fisher_sam: {"eta": 0.1},
    }
    assert torch.equal(plain(grad, w, LAYOUT, {}, 0), grad(w))
    for rule, others in settings.items():
        assert torch.equal(rule(grad, w, LAYOUT, {}, 0, rho=0.0, **others), grad(w))


def test_lengths_in_each_rules_own_norm(bowl):
    _, grad, w = bowl
    assert perturbation(sam, bowl, rho=0.3).norm() == pytest.approx(0.3, rel=1e-14)
    for on in ("weights", "all"):
        e = perturbation(asam, bowl, rho=0.3, eta=0.01, on=on)
        assert (e / scaling(w, LAYOUT, 0.01, on)).norm() == pytest.approx(0.3, rel=1e-13)
    e = perturbation(fisher_sam, bowl, rho=0.3, eta=0.5)
    metric = 1 + 0.5 * grad(w) ** 2
    assert (e @ (metric * e)).sqrt() == pytest.approx(0.3, rel=1e-13)


def test_asam_scales_tensors_named_weight_or_all(bowl):
    *_, w = bowl
    t = scaling(w, LAYOUT, 0.01, "weights")
    for name, part in LAYOUT.items():
        equal(t[part], w[part].abs() + 0.01 if name.endswith("weight") else torch.ones_like(w[part]))
    equal(scaling(w, LAYOUT, 0.0, "all"), w.abs())
    names = layout_of({"weights": (1,), "lstm.weight_ih": (1,), "a.weight.b": (1,), "reweight": (1,)})
    ones = torch.ones(4, dtype=torch.float64)
    assert scaling(ones, names, 1.0, "weights").tolist() == [1.0, 2.0, 2.0, 1.0]


def test_asam_without_eta_does_not_see_a_rescaling_of_the_weights(bowl):
    h, _, w = bowl
    rescale = torch.linspace(0.5, 2.0, SIZE, dtype=torch.float64)
    ours = perturbation(asam, bowl, rho=0.3, eta=0.0, on="all")
    rescaled_h = h / rescale[:, None] / rescale
    theirs = perturbation(asam, (rescaled_h, lambda v: rescaled_h @ v, w * rescale), rho=0.3, eta=0.0, on="all")
    equal(theirs / rescale, ours)


def test_fsam_that_keeps_all_is_sam(bowl):
    _, grad, w = bowl
    for scope in ("global", "tensor"):
        for outside, names in (("always", LAYOUT), ("never", {"a": slice(0, SIZE)})):
            g = fsam(grad, w, names, {}, 0, rho=0.3, keep=1.0, every=1, scope=scope, outside=outside)
            assert torch.equal(g, sam(grad, w, names, {}, 0, rho=0.3))


def test_fsam_norm_is_taken_before_the_mask_unless_renormalised(bowl):
    masked = perturbation(fsam, bowl, rho=0.3, keep=0.2, every=1)
    whole = perturbation(sam, bowl, rho=0.3)
    moved = masked != 0
    assert torch.equal(masked[moved], whole[moved]) and masked.norm() < 0.3
    renormalised = perturbation(fsam, bowl, rho=0.3, keep=0.2, every=1, renormalise=True)
    assert renormalised.norm() == pytest.approx(0.3, rel=1e-14)
    assert torch.equal(renormalised != 0, moved)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("outside", ["always", "never"])
def test_fisher_mask_counts_and_stands_aside(bowl, scope, outside):
    _, grad, w = bowl
    fisher = grad(w) ** 2
    mask = fisher_mask(fisher, LAYOUT, 0.3, scope, outside, batch_norm={"norm.weight", "norm.bias"})
    aside = {"embed.weight", "hidden.bias", "norm.weight", "norm.bias", "head.bias"}
    for name in aside:
        assert mask[LAYOUT[name]].all() if outside == "always" else not mask[LAYOUT[name]].any()
    inside = {name: mask[LAYOUT[name]] for name in LAYOUT if name not in aside}
    if scope == "global":
        total = sum(part.numel() for part in inside.values())
        assert sum(int(part.sum()) for part in inside.values()) == int(0.3 * total)
        kept = torch.cat([fisher[LAYOUT[name]][part] for name, part in inside.items()])
        dropped = torch.cat([fisher[LAYOUT[name]][~part] for name, part in inside.items()])
        assert kept.min() > dropped.max()
    else:
        assert all(int(part.sum()) == int(0.3 * part.numel()) for part in inside.values())


def test_fisher_mask_breaks_ties_by_index():
    layout = layout_of({"b": (3,), "a": (3,)})
    fisher = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    assert fisher_mask(fisher, layout, 0.5, "global", "never").tolist() == [True, True, False, False, True, False]
    assert fisher_mask(fisher, layout, 0.7, "tensor", "never").tolist() == [True, True, False, True, True, False]


def test_fsam_refreshes_at_its_steps_and_perturbs_there(bowl):
    _, grad, w = bowl
    state, masks = {}, []
    for step in range(5):
        fsam(grad, w * (-1.0) ** step + step, LAYOUT, state, step, rho=0.3, keep=0.1, every=2, outside="never")
        masks.append(state["mask"])
        assert state["e"].norm() > 0
    assert masks[0] is masks[1] and masks[2] is masks[3]
    assert not torch.equal(masks[1], masks[2]) and not torch.equal(masks[3], masks[4])


def test_sam_on_moves_its_subset_only_and_to_the_full_radius(bowl):
    _, grad, w = bowl
    norms = {"norm.weight", "norm.bias"}
    here = torch.zeros(SIZE, dtype=torch.bool)
    for name in norms:
        here[LAYOUT[name]] = True
    e = perturbation(sam_on, bowl, rho=0.3, subset=norms)
    assert e.norm() == pytest.approx(0.3, rel=1e-14) and torch.equal(e != 0, here)
    e = perturbation(sam_on, bowl, rho=0.3, subset=norms, ball="adaptive", eta=0.1)
    assert (e / scaling(w, LAYOUT, 0.1, "weights")).norm() == pytest.approx(0.3, rel=1e-13)
    assert torch.equal(e != 0, here)
    whole = sam_on(grad, w, LAYOUT, {}, 0, rho=0.3, subset=set(LAYOUT))
    assert torch.equal(whole, sam(grad, w, LAYOUT, {}, 0, rho=0.3))


def test_fisher_sam_without_eta_is_sam(bowl):
    _, grad, w = bowl
    equal(fisher_sam(grad, w, LAYOUT, {}, 0, rho=0.3, eta=0.0), sam(grad, w, LAYOUT, {}, 0, rho=0.3))


def test_a_zero_gradient_gives_no_nan():
    w = torch.zeros(SIZE, dtype=torch.float64)
    for rule, others in ((sam, {}), (asam, {"eta": 0.0, "on": "all"}), (fisher_sam, {"eta": 0.1})):
        assert torch.equal(rule(torch.zeros_like, w, LAYOUT, {}, 0, rho=0.3, **others), w)


@pytest.mark.parametrize(
    "rule", [partial(sam, rho=0.3), partial(asam, rho=0.3, eta=0.01), partial(fsam, rho=0.3, keep=0.2, every=1)]
)
def test_the_rules_are_of_degree_one_in_the_loss(bowl, rule):
    _, grad, w = bowl
    scaled = rule(lambda v: 2.0**16 * grad(v), w, LAYOUT, {}, 0)
    assert torch.equal(scaled, 2.0**16 * rule(grad, w, LAYOUT, {}, 0))


# ---- optimizers and clipping ------------------------------------------------------------------------------------

GROUPS = {
    "one": (lambda name: 0.05, lambda name: 0.02),
    "two": (lambda name: 0.05 if "bias" in name else 0.01, lambda name: 0.0 if "bias" in name else 0.1),
}
OPTIMIZERS = {
    "sgd": (sgd, torch.optim.SGD, {}),
    "momentum": (sgd, torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (adamw, torch.optim.AdamW, {"betas": (0.9, 0.98), "eps": 1e-6}),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trajectory_with_torchs_own_optimizer_clipping_and_schedule(optimizer, groups):
    """A module, autograd's backward, clip_grad_norm_, torch.optim and LambdaLR give the dense program's weights."""
    ours, theirs, settings = OPTIMIZERS[optimizer]
    lr, decay = GROUPS[groups]
    model = tiny_mlp(seed=3)
    windows = windows_of(mlp_rows(24), micro=4, accumulate=2)
    expected = trajectory(
        plain,
        mlp_loss(SHAPES),
        flat(model),
        windows,
        ours(entrywise(LAYOUT, lr), weight_decay=entrywise(LAYOUT, decay), **settings),
        steps=5,
        layout=LAYOUT,
        max_norm=0.2,
        lr_factor=linear_decay(5, warmup=2),
    )
    parameters = [{"params": [p], "lr": lr(n), "weight_decay": decay(n)} for n, p in model.named_parameters()]
    stepper = theirs(parameters, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, linear_decay(5, warmup=2))
    for step in range(5):
        for batch in windows[step % 3]:
            (model(**batch)["loss"] / 2).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2) > 0.2
        stepper.step()
        schedule.step()
        stepper.zero_grad()
        equal(flat(model), expected[step])


def test_clip_leaves_a_short_gradient_alone():
    g = torch.tensor([0.3, 0.4], dtype=torch.float64)
    assert torch.equal(clip(g, 1.0), g)
    equal(clip(g, 0.1), g * 0.1 / (0.5 + 1e-6))


def test_linear_decay_is_the_trainers_schedule():
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 7)
    for step in range(8):
        assert schedule.get_last_lr()[0] == pytest.approx(linear_decay(7, warmup=2)(step), abs=1e-15)
        optimizer.step()
        schedule.step()
