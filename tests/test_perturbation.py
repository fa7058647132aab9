"""Radius, balls, masks and schedules: where a perturbation goes."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import hf_sharp
from hf_sharp import (
    AdaptiveBall,
    ByName,
    Cosine,
    Every,
    FisherBall,
    FisherMask,
    FollowsLearningRate,
    L2Ball,
    Linear,
    NormLayers,
    ParamVector,
    Perturbation,
    RandomMask,
    SharpTrainer,
    ZeroDuringWarmup,
    fsam,
)
from hf_sharp._engine.landscape import Landscape
from hf_sharp._perturbation.entry_masks import largest
from models import mlp_rows, tiny_bert, tiny_mlp, windows_of
from references import functional, window_gradient
from toy import ToyHost, flat, opened
from training import Recorder, build

pytestmark = pytest.mark.fast

WINDOW = windows_of(mlp_rows(8), micro=8, accumulate=1)[0]


def perturbed(perturbation, model=None, **settings):
    """Epsilon, the gradient it came from and the landscape."""
    landscape, _ = opened(model or tiny_mlp(), WINDOW, **settings)
    here = landscape.evaluate()
    return perturbation(here.grad, landscape).epsilon, here.grad, landscape


# ---- balls


def test_the_length_is_rho_in_the_balls_metric():
    model = tiny_mlp()
    epsilon, _, landscape = perturbed(Perturbation(0.3), model)
    assert epsilon.norm() == pytest.approx(0.3, abs=1e-12)
    epsilon, _, _ = perturbed(Perturbation(0.3, AdaptiveBall(eta=0.02)), model)
    scaled = [
        e / (w.abs() + 0.02 if "weight" in n else 1)
        for n, e, w in zip(landscape.facts.names, epsilon.tensors, landscape.weights.tensors, strict=True)
    ]
    assert ParamVector(scaled).norm() == pytest.approx(0.3, abs=1e-12)
    epsilon, grad, _ = perturbed(Perturbation(0.3, FisherBall(eta=3.0)), model)
    length = sum((e.square() * (1 + 3 * g.square())).sum() for e, g in zip(epsilon.tensors, grad.tensors, strict=True))
    assert length.sqrt() == pytest.approx(0.3, abs=1e-12)


def test_a_perturbation_does_not_change_a_gradient_it_was_not_given():
    landscape, _ = opened(tiny_mlp(), WINDOW)
    here = landscape.evaluate()
    before = flat(here.grad, landscape.model).clone()
    for ball in (L2Ball(), AdaptiveBall(), FisherBall()):
        Perturbation(0.1, ball)(here.grad, landscape)
    assert torch.equal(flat(here.grad, landscape.model), before)
    grad = here.donate()
    memory = grad.tensors[0]
    assert Perturbation(0.1)(grad, landscape).epsilon.tensors[0] is memory  # no copy


def test_asam_is_invariant_to_rescaling_and_sam_is_not():
    plain = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled[0].weight.mul_(4)
        scaled[2].weight.div_(4)

    class Net(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

    window = [{"x": torch.randn(6, 4, dtype=torch.float64), "labels": torch.arange(6) % 3}]
    gaps = {}
    for ball in (AdaptiveBall(eta=0.0), L2Ball()):
        for net in (plain, scaled):
            landscape, _ = opened(Net(net), window)
            here = landscape.evaluate()
            with landscape.shifted(Perturbation(0.2, ball)(here.grad, landscape)):
                gaps.setdefault(ball, []).append((landscape.evaluate().loss - here.loss).item())
    assert gaps[AdaptiveBall(eta=0.0)][0] == pytest.approx(gaps[AdaptiveBall(eta=0.0)][1], rel=1e-9)
    assert gaps[L2Ball()][0] != pytest.approx(gaps[L2Ball()][1], rel=0.05)


def test_the_asam_name_rule():
    from hf_sharp._perturbation.balls import WEIGHT

    adapted = (
        "weight",
        "bert.embeddings.LayerNorm.weight",
        "conv.weight_g",
        "rnn.weight_ih_l0",
        "lora_A.default.weight",
    )
    others = ("head.bias", "weighted.bias", "cls_token", "position_embeddings", "gamma")
    assert all(WEIGHT.search(n) for n in adapted) and not any(WEIGHT.search(n) for n in others)


def test_an_infinite_norm_makes_all_of_the_perturbation_nan():
    landscape, _ = opened(tiny_mlp(), WINDOW)
    grad = landscape.evaluate().donate()
    grad.tensors[3].view(-1)[0] = torch.inf
    epsilon = Perturbation(0.1)(grad, landscape).epsilon
    assert all(t.isnan().all() for t in epsilon.tensors)


# ---- masks


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm_named_linear = nn.Linear(4, 4)
        self.a, self.b, self.c = nn.LayerNorm(4), LlamaRMSNorm(4), T5LayerNorm(4)
        self.d, self.e, self.f = nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.RMSNorm(4)


def test_norm_layers_are_found_by_type():
    names = NormLayers().names(Landscape(ToyHost(Norms())))
    assert set(names) == {f"{n}.weight" for n in "abcdef"} | {f"{n}.bias" for n in "ade"}


def test_a_mask_over_parameters_takes_the_norm_over_them():
    for mask in (NormLayers(), ByName(r"^norm\.")):
        epsilon, _, landscape = perturbed(Perturbation(0.2, mask=mask))
        there = {n for n, t in zip(landscape.facts.names, epsilon.tensors, strict=True) if t is not None}
        assert there == {"norm.weight", "norm.bias"} and epsilon.norm() == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize("on", ["weights", "all"])
def test_sam_ons_adaptive_ball_adapts_to_scales_or_as_its_authors_to_shifts_too(on):
    """Over the norm layer alone e = rho T^2 g / ||T g||; T is |w| + eta on the scale, and on the shift if on="all"."""
    model = tiny_mlp()
    with torch.no_grad():
        model.norm.bias.copy_(torch.linspace(-0.3, 0.4, 8))
    epsilon, grad, landscape = perturbed(hf_sharp.sam_on(10.0, ball="adaptive", eta=0.02, on=on).perturbation, model)
    w, g = model.norm, dict(zip(landscape.facts.names, grad.tensors, strict=True))
    scale = w.weight.detach().abs() + 0.02
    shift = w.bias.detach().abs() + 0.02 if on == "all" else torch.ones(8, dtype=torch.float64)
    length = ((scale * g["norm.weight"]).square().sum() + (shift * g["norm.bias"]).square().sum()).sqrt()
    moved = dict(zip(landscape.facts.names, epsilon.tensors, strict=True))
    for name, t in (("norm.weight", scale), ("norm.bias", shift)):
        torch.testing.assert_close(moved[name], 10.0 * t.square() * g[name] / length, rtol=1e-12, atol=0)
    assert all(moved[name] is None for name in landscape.facts.names if not name.startswith("norm."))


@pytest.mark.parametrize("mask", [ByName("nobody"), NormLayers()])
def test_an_empty_mask_is_refused_before_training(mask):
    landscape = Landscape(ToyHost(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="selects none"):
        mask.check(landscape)


def test_a_share_that_rounds_to_nothing_is_refused_before_training():
    landscape = Landscape(ToyHost(tiny_mlp()))
    with pytest.raises(ValueError, match="keeps none"):
        FisherMask(keep=1e-5, outside="never").check(landscape)
    FisherMask(keep=1e-5, outside="always").check(landscape)  # biases and embeddings still move


def test_keeping_everything_is_sam_bitwise():
    for mask in (FisherMask(keep=1.0), RandomMask(keep=1.0)):
        masked, _, _ = perturbed(Perturbation(0.1, mask=mask))
        whole, _, landscape = perturbed(Perturbation(0.1))
        assert torch.equal(flat(masked, landscape.model), flat(whole, landscape.model))


def test_the_fisher_mask_keeps_its_support_between_refreshes_and_refresh_steps_perturb():
    model = tiny_mlp()
    method = Perturbation(0.1, mask=FisherMask(keep=0.2, every=3, outside="never"))
    supports = []
    for step in range(7):
        landscape, _ = opened(model, windows_of(mlp_rows(8, seed=step), 8, 1)[0], step=step)
        epsilon = method(landscape.evaluate().grad, landscape).epsilon
        assert epsilon.norm() > 0 and epsilon.norm() <= 0.1
        supports.append(flat(epsilon, model) != 0)
    eligible = sum(p.numel() for n, p in model.named_parameters() if "bias" not in n and "embed" not in n)
    masks = method.state_dict()
    assert sum(m.sum() for k, m in masks.items() if k.startswith("mask:mask/")) == int(0.2 * eligible)
    assert all(m.dtype == torch.bool for k, m in masks.items() if k.startswith("mask:mask/"))
    assert masks["mask:refreshed"] == 6
    assert not torch.equal(supports[0], supports[3]) and not torch.equal(supports[3], supports[6])
    for first, second in ((0, 1), (1, 2), (3, 4), (4, 5)):
        assert (supports[second] & ~supports[first]).sum() == 0


def test_a_mask_in_a_step_now_and_then_is_drawn_anew_once_it_is_old(tmp_path):
    """Used at steps 0, 3 and 6 only, a mask of two steps is old each time, though 2 does not divide 3."""
    method, refreshed = Every(3, fsam(every=2)), []
    trainer = build(SharpTrainer, tiny_mlp(), mlp_rows(28), tmp_path, max_steps=7, method=method)
    trainer.add_callback(
        Recorder(lambda **_: refreshed.extend(v for k, v in method.state_dict().items() if "refreshed" in k))
    )
    trainer.train()
    assert refreshed == [0, 0, 0, 3, 3, 3, 6]


def test_renormalising_gives_the_full_radius():
    epsilon, _, _ = perturbed(Perturbation(0.1, mask=FisherMask(keep=0.2, outside="never", renormalise=True)))
    assert epsilon.norm() == pytest.approx(0.1, abs=1e-12)


def test_batch_norm_is_outside_the_fisher_mask():
    model = tiny_mlp(norm="batch")
    epsilon, grad, landscape = perturbed(Perturbation(0.1, mask=FisherMask(keep=0.01)), model)
    at = landscape.facts.names.index("norm.weight")
    assert (epsilon.tensors[at] != 0).eq(grad.tensors[at] != 0).all()
    epsilon, _, _ = perturbed(Perturbation(0.1, mask=FisherMask(keep=0.01, outside="never")), model)
    assert epsilon.tensors[at] is None


# Which parameters stand outside the mask, read off the models' architectures and not found by a rule.
OUTSIDE = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "t5": {
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
    },
}
BY_NAME = {
    "gpt2": set(),
    "t5": OUTSIDE["t5"] - {"shared.weight"},
    "bert": OUTSIDE["bert"] | {"bert.embeddings.LayerNorm.weight"},
}


@pytest.mark.parametrize("embeddings, expected", [("modules", OUTSIDE), ("names", BY_NAME)])
@pytest.mark.parametrize("name", OUTSIDE)
def test_embeddings_are_told_by_module_or_as_the_authors_do_by_name(name, embeddings, expected):
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=8)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        "bert": tiny_bert,
    }[name]()
    landscape = Landscape(ToyHost(model))
    mask = FisherMask(keep=0.5, embeddings=embeddings)
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert mask.whole(landscape) == expected[name] | biases
    never = FisherMask(keep=0.5, embeddings=embeddings, outside="never").perturbed(landscape)
    assert set(landscape.facts.names) - set(never) == expected[name] | biases


def test_the_per_sample_fisher_is_the_mean_of_squared_row_gradients():
    model = tiny_mlp(dropout=0.5)
    rows = mlp_rows(8)
    landscape, host = opened(model, windows_of(rows, 8, 1)[0], scale=64.0)
    grad = landscape.evaluate().grad
    stream = torch.get_rng_state()
    Perturbation(0.1, mask=(mask := FisherMask(keep=0.3, fisher="per_sample", samples=5)))(grad, landscape)
    assert host.calls == [8, *["row"] * 5] and torch.equal(torch.get_rng_state(), stream)
    quiet = tiny_mlp(dropout=0.5).eval()
    w0, layout, loss_fn = functional(quiet)
    per_row = [window_gradient(loss_fn, w0, [{k: v[None] for k, v in row.items()}]) for row in rows[:5]]
    fisher = torch.stack(per_row).square().mean(0)
    names = [n for n in layout if "bias" not in n and "embed" not in n]
    pool = torch.cat([fisher[layout[n]] for n in names])
    kept = torch.zeros_like(pool, dtype=torch.bool)
    kept[pool.sort(descending=True, stable=True).indices[: int(0.3 * pool.numel())]] = True
    ours = torch.cat([mask._state["mask"][n].reshape(-1) for n in names])
    assert torch.equal(ours, kept)
    batch = FisherMask(keep=0.3)
    batch.entries(grad, landscape)
    assert not torch.equal(torch.cat([batch._state["mask"][n].reshape(-1) for n in names]), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keep", [0.003, 0.1, 0.5, 1.0])
def test_the_largest_are_exact_and_ties_go_to_the_first(dtype, keep):
    draw = torch.Generator().manual_seed(1)
    scores = {"a": torch.rand(40, 5, generator=draw), "b": torch.randint(3, (300,), generator=draw).float() / 4}
    scores = {name: s.to(dtype) for name, s in scores.items()}
    pool = torch.cat([s.double().reshape(-1) for s in scores.values()])
    expected = torch.zeros_like(pool, dtype=torch.bool)
    expected[pool.sort(descending=True, stable=True).indices[: int(keep * 500)]] = True
    ours = largest(scores, keep)
    assert torch.equal(torch.cat([m.reshape(-1) for m in ours.values()]), expected)
    assert ours["a"].shape == (40, 5)


def test_a_random_mask_is_the_same_for_the_same_seed_and_step_and_spares_the_stream():
    stream = torch.get_rng_state()
    supports = []
    for _ in range(2):
        epsilon, _, landscape = perturbed(Perturbation(0.1, mask=RandomMask(keep=0.25)))
        supports.append(flat(epsilon, landscape.model) != 0)
    assert torch.equal(supports[0], supports[1]) and torch.equal(torch.get_rng_state(), stream)
    assert 0 < supports[0].sum() <= int(0.25 * supports[0].numel())


def test_an_eligible_tensor_without_gradient_at_the_refresh_does_not_move_until_the_next():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, labels):
            return {"loss": (self.a if labels[0] == 0 else self.b)(x).square().mean()}

    model, mask = Experts(), FisherMask(keep=0.25, every=10)
    for which, name in ((0, "a"), (1, "b")):
        window = [{"x": torch.randn(3, 4), "labels": torch.full((3,), which)}]
        landscape, host = opened(model, window)
        host.step = which
        epsilon = Perturbation(0.1, mask=mask)(landscape.evaluate().grad, landscape).epsilon
        moved = dict(zip(landscape.facts.names, epsilon.tensors, strict=True))
        weight = moved[f"{name}.weight"]
        assert (0 if weight is None else int((weight != 0).sum())) == (4 if which == 0 else 0)
        assert moved[f"{name}.bias"].ne(0).all()  # outside: always


def test_a_row_whose_gradient_is_infinite_spoils_the_step():
    model = tiny_mlp()
    landscape, host = opened(model, WINDOW)
    whole = host.row_backward

    def broken(row):
        whole(row)
        model.hidden.weight.grad[0, 0] = torch.inf

    host.row_backward = broken
    here = landscape.evaluate()
    epsilon, _ = Perturbation(0.1, mask=FisherMask(fisher="per_sample", samples=2))(here.grad, landscape)
    with landscape.shifted(epsilon):
        there = landscape.evaluate()
    assert landscape.hand_over(there).norm().isnan() and model.head.bias.grad.isnan().all()


def test_a_model_without_eligible_entries_is_refused():
    model = tiny_mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    with pytest.raises(ValueError, match="no eligible parameter"):
        FisherMask().check(Landscape(ToyHost(model)))


@pytest.mark.parametrize("mask", [None, FisherMask(keep=0.2), FisherMask(keep=0.2, renormalise=True), NormLayers()])
@pytest.mark.parametrize("ball", [L2Ball(), AdaptiveBall(eta=0.02), FisherBall(eta=3.0)])
def test_the_slope_is_that_of_the_perturbation(mask, ball):
    landscape, _ = opened(tiny_mlp(), WINDOW)
    grad = landscape.evaluate().grad
    epsilon, slope = Perturbation(0.1, ball, mask)(grad, landscape)
    torch.testing.assert_close(slope, grad.dot(epsilon), rtol=1e-10, atol=0)
    assert Perturbation(0.1, ball, mask)(grad.scale(1.0), landscape).slope is None  # nobody knows it for the gradient


def test_what_moves_is_told_by_share():
    landscape = Landscape(ToyHost(tiny_mlp()))
    shares = Perturbation(0.1, mask=FisherMask(keep=0.2)).perturbed(landscape)
    assert shares["hidden.weight"] == 0.2 and shares["hidden.bias"] == shares["embed.weight"] == 1.0
    assert "hidden.bias" not in Perturbation(0.1, mask=FisherMask(outside="never")).perturbed(landscape)
    assert Perturbation(0.1, mask=NormLayers()).perturbed(landscape) == {"norm.weight": 1.0, "norm.bias": 1.0}
    assert set(Perturbation(0.1, mask=RandomMask(keep=0.3)).perturbed(landscape).values()) == {0.3}


# ---- schedules


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_a_schedule_that_gives_no_radius_is_refused(value):
    with pytest.raises(ValueError, match="what the schedule gives"):
        radii(lambda landscape: value, (0,))


def radii(schedule, steps, **facts):
    host = ToyHost(tiny_mlp())
    for name, value in facts.items():
        setattr(host, name, value)
    values = []
    for step in steps:
        host.step = step
        values.append(Perturbation(schedule).radius(Landscape(host)))
    return values


def test_schedules_follow_their_formulas():
    assert radii(Linear(1.0, 0.0, steps=4), (0, 1, 4, 9)) == [1.0, 0.75, 0.0, 0.0]
    assert radii(Linear(1.0, 0.0), (0, 5)) == [1.0, 0.5]  # ten steps of training
    assert radii(Cosine(1.0, 0.0), (0, 5, 10)) == pytest.approx([1.0, 0.5, 0.0])
    assert radii(FollowsLearningRate(0.6, 0.1), (0,)) == pytest.approx([0.35])  # lr is half of its largest
    assert radii(FollowsLearningRate(0.6, 0.1), (0,), lr=0.0, lr_max=0.0) == pytest.approx([0.6])
    assert radii(ZeroDuringWarmup(0.3), (0, 1, 2, 3)) == [0.0, 0.0, 0.3, 0.3]


def test_a_schedule_that_needs_an_unknown_length_says_so():
    for schedule, fact in (
        (Linear(1, 0), "total_steps"),
        (Cosine(1, 0), "total_steps"),
        (ZeroDuringWarmup(1), "warmup_steps"),
    ):
        with pytest.raises(ValueError, match="steps="):
            radii(schedule, (0,), **{fact: None})


# ---- bad input


@pytest.mark.parametrize(
    "make",
    [
        lambda: Perturbation(-0.1),
        lambda: Perturbation(float("nan")),
        lambda: Perturbation(float("inf")),
        lambda: Perturbation("0.1"),
        lambda: Perturbation(0.1, ball="l2"),
        lambda: Perturbation(0.1, mask="norm"),
        lambda: AdaptiveBall(eta=-1),
        lambda: AdaptiveBall(on="norms"),
        lambda: FisherBall(eta=float("nan")),
        lambda: FisherMask(keep=0),
        lambda: FisherMask(keep=1.5),
        lambda: FisherMask(keep=float("nan")),
        lambda: FisherMask(every=0),
        lambda: FisherMask(fisher="exact"),
        lambda: FisherMask(scope="layer"),
        lambda: FisherMask(outside="sometimes"),
        lambda: FisherMask(embeddings="types"),
        lambda: hf_sharp.sam_on(on="all"),
        lambda: hf_sharp.sam_on(ball="adaptive", on="shifts"),
        lambda: FisherMask(samples=0),
        lambda: RandomMask(keep=-1),
        lambda: ByName("("),
        lambda: Linear(-1, 0),
        lambda: Cosine(0, float("nan")),
        lambda: FollowsLearningRate(-0.1),
        lambda: ZeroDuringWarmup(-0.1),
        lambda: hf_sharp.sam_on(ball="linf"),
        lambda: FisherMask(renormalise="false"),
        lambda: hf_sharp.SAM(0.05),
        lambda: hf_sharp.SAM(None),
        lambda: Perturbation(Linear),
        lambda: Linear(1, 0, steps="x"),
        lambda: Linear(1, 0, steps=-3),
        lambda: ZeroDuringWarmup(0.1, steps=float("nan")),
    ],
)
def test_what_cannot_be_right_is_refused_at_construction(make):
    with pytest.raises(ValueError, match=r"got|regular expression"):
        make()
