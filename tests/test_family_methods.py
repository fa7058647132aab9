"""What is special to single methods of the family: identities, the penalties' exact gradients, bad input."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import family
from hf_sharp import (
    GAM,
    GSAM,
    MESA,
    MSAM,
    SAM,
    TRAM,
    WSAM,
    Adaptive,
    AdaptiveBall,
    After,
    ByName,
    CurvatureRegularization,
    Every,
    FisherMask,
    FriendlySAM,
    GradientPenalty,
    Landscape,
    LookSAM,
    NoisyInputs,
    Perturbation,
    Plain,
    RandomizedSmoothing,
    SharpTrainer,
    Sum,
    TRAMFisher,
    VaSSO,
    WithProbability,
    make_sharp,
    msam,
    previous_gradient_sam,
)
from models import batch_of, mlp_rows, tiny_bert, tiny_mlp, windows_of
from references import functional
from toy import ToyHost, flat
from training import Recorder, build, train, weights


def gradient(method, model, window, **settings):
    """What a method hands over at its first step."""
    landscape = opened_for(method, model, window, **settings)
    return flat(method.gradient(landscape).grad, model)


def opened_for(method, model, window, **settings):
    host = ToyHost(model, **settings)
    host.micro_batches = len(window)
    landscape = Landscape(host, window)
    landscape.plan = method.plan_first_pass(landscape)
    for batch in window:
        landscape.first_pass(batch)
    return landscape


WINDOW = windows_of(mlp_rows(8), micro=4, accumulate=2)[0]
P = Perturbation(0.1)
SAME = {
    "gsam alpha=0": (GSAM(P, alpha=0.0), SAM(P)),
    "wsam gamma=.5": (WSAM(P, gamma=0.5), SAM(P)),
    "vasso theta=1": (VaSSO(P, theta=1.0), SAM(P)),
    "friendly sigma=0": (FriendlySAM(P, sigma=0.0), SAM(P)),
    "looksam every=1": (LookSAM(P, every=1), SAM(P)),
    "fsam keep=1": (SAM(Perturbation(0.1, mask=FisherMask(keep=1.0))), SAM(P)),
    "sam-on all": (SAM(Perturbation(0.1, mask=ByName("."))), SAM(P)),
    "penalty lam=r": (GradientPenalty(lam=0.1, r=0.1), SAM(P)),
    "tram at a fixed radius": (
        TRAM(NoisyInputs(0.5), scale=1e6, max_radius=0.1),
        SAM(Perturbation(0.1, AdaptiveBall(eta=0.0, on="all"))),
    ),
    "tram-fisher eta=0": (TRAMFisher(0.1, eta=0.0), SAM(P)),
    "gam alpha=0": (GAM(P, alpha=0.0), Plain()),
    "smoothing sigma=0": (RandomizedSmoothing(0.0, samples=3), Plain()),
    "every": (Every(3, SAM(P)), SAM(P)),
    "after": (After(0.0, SAM(P)), SAM(P)),
    "with probability 1": (WithProbability(1.0, SAM(P)), SAM(P)),
    "with probability 0": (WithProbability(0.0, SAM(P)), Plain()),
    "adaptive at its first step": (Adaptive(SAM(P)), SAM(P)),
}


@pytest.mark.parametrize("which", SAME)
def test_identities(which):
    one, other = SAME[which]
    model = tiny_mlp(seed=1, dropout=0.2)
    torch.manual_seed(3)
    ours = gradient(one, model, WINDOW)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, gradient(other, model, WINDOW), rtol=1e-13, atol=1e-14)
    if not isinstance(other, Plain):
        torch.manual_seed(3)
        assert (ours - gradient(Plain(), model, WINDOW)).abs().max() > 1e-4


# ---- the penalties have the gradients that double backward gives them --------------------------------------------


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("which", ["gradient", "curvature"])
def test_penalties_approach_double_backward_linearly(which):
    model = tiny_mlp(seed=1)
    w, _, loss_fn = functional(model)
    plain = gradient(Plain(), model, WINDOW)
    if which == "gradient":
        exact = family.gradient_penalty_exact(loss_fn, w, WINDOW, lam=0.5) - plain
        errors = {
            r: relative(gradient(GradientPenalty(0.5, r), model, WINDOW) - plain, exact) for r in (1e-2, 1e-4, 1e-6)
        }
    else:
        exact = family.curvature_exact(loss_fn, w, WINDOW, lam=0.5, mu=0.1) - plain
        errors = {
            r: relative(gradient(CurvatureRegularization(0.5, 0.1, r), model, WINDOW) - plain, exact)
            for r in (1e-2, 1e-4, 1e-6)
        }
    assert exact.norm() > 1e-2 * plain.norm()
    assert errors[1e-6] < 1e-5
    assert 50 < errors[1e-2] / errors[1e-4] < 200 and errors[1e-6] < errors[1e-4] / 20


def test_curvature_refuses_16_bits(tmp_path):
    with pytest.raises(ValueError, match="autocast to"):
        build(SharpTrainer, tiny_bert(), mlp_rows(4), tmp_path, method=CurvatureRegularization(), bf16=True)
    with pytest.raises(ValueError, match="the weights"):
        build(SharpTrainer, tiny_bert().bfloat16(), mlp_rows(4), tmp_path, method=CurvatureRegularization())


# ---- methods without a second pass ------------------------------------------------------------------------------


class Shifts:
    """The distance of the weights from the step's beginning, at every forward pass."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, []
        self.base = weights(trainer)
        trainer.model.register_forward_pre_hook(self.look)

    def look(self, *_):
        at = weights(self.trainer)
        if self.trainer.state.global_step == len(self.seen):
            self.seen.append(0.0)
        shift = at - self.base
        self.seen[self.trainer.state.global_step] = shift


def steps_of(method, tmp_path, **settings):
    model = tiny_mlp(seed=1)
    trainer = build(SharpTrainer, model, mlp_rows(40), tmp_path, method=method, **settings)
    shifts = Shifts(trainer)

    trainer.add_callback(Recorder(lambda **_: setattr(shifts, "base", weights(trainer))))
    trainer.train()
    return trainer, shifts.seen


def test_msam_looks_against_the_momentum_after_the_warm_up(tmp_path):
    _, shifts = steps_of(msam(0.3), tmp_path, warmup_steps=2)
    lengths = [float(torch.as_tensor(s).norm()) for s in shifts]
    assert lengths[:2] == [0.0, 0.0] and lengths[2:] == pytest.approx([0.3] * 3, rel=1e-6)
    _, shifts = steps_of(msam(0.3), tmp_path)
    assert float(shifts[0].norm()) == 0.0  # no momentum yet
    assert float(shifts[1].norm()) == pytest.approx(0.3, rel=1e-6)


def test_the_weights_are_unshifted_where_others_look(tmp_path):
    trainer, _ = steps_of(msam(0.3), tmp_path, eval_strategy="steps", eval_steps=1, eval_dataset=mlp_rows(4))
    final = weights(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(torch.cat([saved[n].reshape(-1) for n, _ in trainer.model.named_parameters()]), final)
    with torch.no_grad():
        loss = trainer.model.eval()(**batch_of(mlp_rows(4)))["loss"]
    logged = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert logged[-1] == pytest.approx(float(loss), rel=1e-6)


UNREADABLE = {
    "plain sgd": (lambda p: torch.optim.SGD(p, lr=0.1), "keeps no momentum"),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.1), "keeps no momentum"),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), "cannot be read"),
    "adadelta": (lambda p: torch.optim.Adadelta(p, lr=0.1), "no readable momentum"),
}


@pytest.mark.parametrize("which", UNREADABLE)
def test_msam_refuses_an_optimizer_without_momentum(which, tmp_path):
    make, message = UNREADABLE[which]
    model = tiny_mlp()
    with pytest.raises(ValueError, match=message):
        train(SharpTrainer, model, mlp_rows(40), tmp_path, method=msam(), optimizers=(make(model.parameters()), None))


@pytest.mark.parametrize("name", ["adafactor", "sgd", "adamw_bnb_8bit", "rmsprop", "adagrad"])
def test_msam_refuses_by_name_before_training(name, tmp_path):
    with pytest.raises(ValueError, match="momentum"):
        build(SharpTrainer, tiny_mlp(), mlp_rows(4), tmp_path, method=msam(), optim=name)


def with_momentum(p):
    return torch.optim.SGD(p, lr=0.05, momentum=0.9)


class MakesItsOwn(SharpTrainer):
    """Makes an optimizer of which `args.optim` says nothing; without the inherited method, as tutorials do it."""

    make = staticmethod(with_momentum)

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = self.make(self.model.parameters())
        return self.optimizer


class FromElsewhere(Trainer):
    """The same below the library's class."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = with_momentum(self.model.parameters())
        return self.optimizer


def test_msam_takes_a_momentum_wherever_it_comes_from(tmp_path):
    """All of these are SGD with momentum .9 at a rate of .05, and so end at the same weights."""
    model, rows, ends = tiny_mlp(seed=3), mlp_rows(40), []
    ways = [
        (SharpTrainer, {"optimizers": (with_momentum(model.parameters()), None), "optim": "adafactor"}),
        (SharpTrainer, {"optim": "sgd", "optim_args": "momentum=0.9"}),
        (MakesItsOwn, {"optim": "sgd"}),
        (MakesItsOwn, {"optim": "adamw_bnb_8bit"}),
        (make_sharp(FromElsewhere), {"optim": "rmsprop"}),
    ]
    for cls, settings in ways:
        model = model if "optimizers" in settings else tiny_mlp(seed=3)
        method = MSAM(Perturbation(0.2))
        trainer = train(cls, model, rows, tmp_path, method=method, lr_scheduler_type="constant", **settings)
        ends.append(weights(trainer))
    assert all(torch.allclose(end, ends[0], rtol=0, atol=1e-14) for end in ends[1:])
    plain = {"optimizers": (with_momentum((still := tiny_mlp(seed=3)).parameters()), None)}
    trainer = train(Trainer, still, rows, tmp_path, lr_scheduler_type="constant", **plain)
    assert (weights(trainer) - ends[0]).abs().max() > 1e-4


def test_msam_refuses_an_optimizer_without_momentum_before_any_step_whoever_makes_it(tmp_path):
    class Without(MakesItsOwn):
        make = staticmethod(lambda p: torch.optim.SGD(p, lr=0.05))

    for cls, settings in ((Without, {}), (SharpTrainer, {"optim": "sgd", "optim_args": "momentum=0.0"})):
        trainer, calls = build(cls, tiny_mlp(), mlp_rows(8), tmp_path, method=MSAM(Perturbation(0.2)), **settings), []
        trainer.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with pytest.raises(ValueError, match="keeps no momentum with these settings"):
            trainer.train()
        assert not calls


def test_previous_gradient_is_that_before_clipping(tmp_path):
    trainer, shifts = steps_of(previous_gradient_sam(0.2), tmp_path, max_grad_norm=1e-3)
    assert float(shifts[0].norm()) == 0.0
    assert [float(s.norm()) for s in shifts[1:]] == pytest.approx([0.2] * 4, rel=1e-6)
    kept = torch.cat([t.reshape(-1) for t in trainer.method._state["previous"].values()])
    assert kept.norm() > 1e-2


# ---- bad input --------------------------------------------------------------------------------------------------

WRONG = {
    "alpha": lambda: GSAM(P, alpha=-1.0),
    "Perturbation": lambda: GSAM(0.05),  # type: ignore[arg-type]
    "every": lambda: LookSAM(P, every=0),
    "theta": lambda: VaSSO(P, theta=0.0),
    "gamma": lambda: WSAM(P, gamma=1.0),
    "lam": lambda: FriendlySAM(P, lam=1.5),
    "fraction": lambda: SAM(P, fraction=0.0),
    "sigma": lambda: RandomizedSmoothing(sigma=float("nan")),
    "samples": lambda: RandomizedSmoothing(samples=0),
    "r is": lambda: GradientPenalty(r=0.0),
    "mu": lambda: CurvatureRegularization(mu=-1.0),
    "kl": lambda: TRAM(kl="backward"),
    "max_radius": lambda: TRAM(max_radius=-1.0),
    "reference": lambda: TRAM("previous"),  # type: ignore[arg-type]
    "decay": lambda: MESA(decay=2.0),
    "interval": lambda: Every(0, Plain()),
    "p is": lambda: WithProbability(2.0, Plain()),
    "start": lambda: After(-0.1, Plain()),
    "method is": lambda: Every(2, "sam"),  # type: ignore[arg-type]
    "Adaptive decides": lambda: Adaptive(MSAM(P)),
    "names extra": lambda: Sum({"extra": 1.0}, forget=Plain()),
    "a method for each term": lambda: Sum(),
}


@pytest.mark.parametrize("which", WRONG)
def test_settings_that_cannot_be_right_are_refused(which):
    with pytest.raises(ValueError, match=which):
        WRONG[which]()
