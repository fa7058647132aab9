"""What goes wrong in silence when a step is made in several passes, against plain autograd written here.

State that a forward reads and moves, gradients that are there already, windows that end elsewhere than announced. The
right values are those of a host that could ask for the same gradient at two points without leaving a trace.
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from family import orthogonal, unit
from hf_sharp import MSAM, Perturbation, SharpStep, SharpTrainer, fsam, gsam, make_sharp, mesa, msam, plain, sam
from models import seeded
from references import fisher_mask, flat, layout_of
from stateful import KINDS, WIDTH, Carried, Centre, Cooling, Drawing, Frozen, Normed, Still, Tempered, Twice
from training import Tripwire, build, train

RHO, MICRO = 0.3, 4


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def numbers(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=draw, dtype=torch.float64)
    return [{"x": row, "labels": torch.randint(3, (), generator=draw)} for row in x]


def micro_batch(index, rows=None):
    part = (ROWS if rows is None else rows)[MICRO * index : MICRO * index + MICRO]
    return {key: torch.stack([row[key] for row in part]) for key in ("x", "labels")}


ROWS = numbers(64)


# ---- networks with state ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers with something between them."""

    accepts_loss_kwargs = False

    def __init__(self, kind=Still):
        super().__init__()
        with seeded(5):
            self.first, self.second = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.double()
        self.middle = Still() if kind in WRAPPERS else kind()
        if kind in WRAPPERS:
            with seeded(6):
                kind(self.first)

    def forward(self, x, labels=None):
        logits = self.second(self.middle(torch.tanh(self.first(x))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


WRAPPERS = (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm)


def own_loss(net, batch):
    return net(**batch)["loss"]


class TemperedLoss:
    """As the Trainer calls a `compute_loss_func`, for one network."""

    def __init__(self):
        self.inner = Tempered()

    def __call__(self, net, batch):
        return self.inner(net(x=batch["x"]), batch["labels"])


class CoolingLoss:
    def __init__(self):
        self.heat = 1.0

    def __call__(self, net, batch):
        loss = self.heat * own_loss(net, batch)
        self.heat *= 0.6
        return loss


def parts(net):
    return [p for p in net.parameters() if p.requires_grad]


def put(net, w):
    with torch.no_grad():
        for p, value in zip(parts(net), w.split([p.numel() for p in parts(net)]), strict=True):
            p.copy_(value.view_as(p))


def window_gradient(make, here, at, terms):
    """Plain autograd: the gradient at `at` of a window whose passes each begin as they began at `here`.

    Args:
        make: a fresh network and its loss.
        here: the weights of the first passes.
        at: the weights where the gradient is wanted.
        terms: micro-batches, each with its divisor.
    """
    gradient = 0.0
    for index, (batch, divisor) in enumerate(terms):
        net, loss_of = make()
        net.train()
        put(net, here)
        for earlier, _ in terms[:index]:
            loss_of(net, earlier)
        put(net, at)
        grads = torch.autograd.grad(loss_of(net, batch) / divisor, parts(net))
        gradient = gradient + torch.cat([g.reshape(-1) for g in grads])
    return gradient


def after_one_pass(make, here, terms):
    net, loss_of = make()
    net.train()
    put(net, here)
    for batch, _ in terms:
        loss_of(net, batch)
    return net, loss_of


def sam_gradient(make, here, terms, rho=RHO):
    return window_gradient(make, here, here + rho * unit(window_gradient(make, here, here, terms)), terms)


def sgd(net, lr=1.0):
    return torch.optim.SGD(parts(net), lr=lr)


SETTINGS = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "per_device_train_batch_size": MICRO}


def trained(net, method, folder, cls=SharpTrainer, rows=None, steps=1, **settings):
    return train(
        cls, net, ROWS if rows is None else rows, folder, method=method, optimizers=(sgd(net), None), max_steps=steps,
        **SETTINGS, **settings,
    )  # fmt: skip


def state_of(net):
    """What is not trained: buffers, frozen parameters, attributes, as comparable values."""
    found = {n: t.clone() for n, t in net.named_buffers()}
    found |= {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
    own = vars(net.middle)
    found |= {name: torch.as_tensor(own[name]) for name in ("carried", "calls", "seen") if name in own}
    if "average" in own:
        found["average"] = own["average"].mean.clone()
    if "draws" in own:
        found["draws"] = own["draws"].get_state()
    return found


def assert_close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", [*KINDS, *WRAPPERS])
def test_passes_begin_where_the_first_began(kind, accumulate, tmp_path):
    def make():
        return Net(kind), own_loss

    net = Net(kind)
    start = flat(net)
    terms = [(micro_batch(i), accumulate) for i in range(accumulate)]
    trained(net, sam(RHO), tmp_path, gradient_accumulation_steps=accumulate)
    right = sam_gradient(make, start, terms)
    assert_close(start - flat(net), right)
    assert (right - window_gradient(make, start, start, terms)).norm() > 0.01 * right.norm()
    left, _ = after_one_pass(make, start, terms)
    for name, value in state_of(left).items():
        assert_close(state_of(net)[name], value)


@pytest.mark.parametrize("kind", [*KINDS, *WRAPPERS])
def test_they_do_in_a_loop(kind):
    def make():
        return Net(kind), own_loss

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net(kind)
    start = flat(net)
    prepared, optimizer = accelerator.prepare(net, sgd(net))
    sharp = SharpStep(sam(RHO), prepared, optimizer, accelerator, own_loss)
    for index in range(2):
        with accelerator.accumulate(prepared):
            sharp.backward(micro_batch(index))
            optimizer.step()
    assert_close(start - flat(net), sam_gradient(make, start, [(micro_batch(i), 2) for i in range(2)]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_object_moves_once_and_is_read_as_it_was(accumulate, tmp_path):
    def make():
        return Net(), TemperedLoss()

    net, loss = Net(), Tempered()
    start = flat(net)
    terms = [(micro_batch(i), accumulate) for i in range(accumulate)]
    # The Trainer gives the loss the number of items of the window, and the state then sees smaller losses than a mean.

    class Counted(TemperedLoss):
        def __call__(self, net, batch):
            return self.inner(net(x=batch["x"]), batch["labels"], MICRO * accumulate) * accumulate

    trained(net, sam(RHO), tmp_path, compute_loss_func=loss, gradient_accumulation_steps=accumulate)
    assert_close(start - flat(net), sam_gradient(lambda: (Net(), Counted()), start, terms))
    _, left = after_one_pass(lambda: (Net(), Counted()), start, terms)
    assert_close(loss.temperature, left.inner.temperature)
    assert loss.calls == accumulate


def test_a_loss_object_in_a_loop():
    accelerator = Accelerator(cpu=True)
    net, loss = Net(), TemperedLoss()
    start = flat(net)
    prepared, optimizer = accelerator.prepare(net, sgd(net))
    SharpStep(sam(RHO), prepared, optimizer, accelerator, loss).backward(micro_batch(0))
    optimizer.step()
    assert_close(start - flat(net), sam_gradient(lambda: (Net(), TemperedLoss()), start, [(micro_batch(0), 1)]))
    assert loss.inner.calls == 1


class Cooled(Cooling, SharpTrainer):
    pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_attribute_of_the_trainer_that_its_loss_uses(accumulate, tmp_path):
    net = Net()
    start = flat(net)
    terms = [(micro_batch(i), accumulate) for i in range(accumulate)]
    trainer = trained(net, sam(RHO), tmp_path, cls=Cooled, gradient_accumulation_steps=accumulate)
    assert_close(start - flat(net), sam_gradient(lambda: (Net(), CoolingLoss()), start, terms))
    assert trainer.heat == pytest.approx(0.6**accumulate) and trainer.history == (MICRO,) * accumulate


def test_frequencies_of_dynamic_rope_are_those_of_the_length(tmp_path):
    """Theta' = theta ((f L / L0) - (f - 1))^(d / (d - 2)) for a text longer than L0, theta for a shorter one."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
    sizes |= {"vocab_size": 50, "intermediate_size": 32, "num_hidden_layers": 1}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    with seeded(0):
        model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))
    seen = []
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: seen.append(output[0][0].detach()))
    lengths = [16, 6] * 3
    rows = [{"input_ids": torch.full((n,), 7), "labels": torch.full((n,), 7)} for n in lengths for _ in range(MICRO)]
    settings = {"per_device_train_batch_size": MICRO, "gradient_accumulation_steps": 2, "max_steps": 3}
    train(SharpTrainer, model, rows, tmp_path, method=sam(0.05, fraction=0.5), optim="sgd", **settings)
    assert len(seen) > 6 and {len(cosines) for cosines in seen} == {16, 6}
    for cosines in seen:
        length, width, theta = len(cosines), 8, 10000.0
        if length > 8:
            theta *= (4 * length / 8 - 3) ** (width / (width - 2))
        frequencies = theta ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(length).unsqueeze(1) * frequencies
        torch.testing.assert_close(cosines, torch.cat([angles, angles], 1).cos(), rtol=0, atol=1e-5)


# ---- gradients that are there already ---------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    """Six micro-batches an epoch: with windows of four, two are left over for the step after the epoch's end."""

    def __iter__(self):
        yield from ROWS[: 6 * MICRO]


FIRST = [(i, 4) for i in range(4)]
BOTH = [(4, 2), (5, 2), *FIRST]  # what the Trainer steps on next, each micro-batch with the divisor of its own window


def on_a_stream(cls, folder, steps=3, momentum=0.0, lr=0.1, **settings):
    """The weights after each step, and the Trainer."""
    net, path = Net(), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            path.append(flat(net))

    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    given = {"optimizers": (optimizer, None), "callbacks": [Look()], "gradient_accumulation_steps": 4}
    trainer = train(cls, net, Stream(), folder, max_steps=steps, **SETTINGS, **given, **settings)
    return path, trainer


WEAK = {
    "sam": lambda: sam(0.0),
    "gsam": lambda: gsam(0.0, rho_min=0.0, alpha=0.3),
    "mesa": lambda: mesa(lam=0.0),
    "fsam": lambda: fsam(0.0, keep=0.3, every=1),
    "msam": lambda: msam(0.0),
}


@pytest.mark.parametrize("name", WEAK)
def test_a_window_left_over_joins_the_next_as_in_the_trainer(name, tmp_path):
    theirs, trainer = on_a_stream(Trainer, tmp_path, momentum=0.9)
    ours, sharp = on_a_stream(SharpTrainer, tmp_path, momentum=0.9, method=WEAK[name]())
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other) or name == "gsam"  # whose arithmetic of parallel vectors rounds
        assert_close(mine, other, 1e-14)
    logs = [
        [line[key] for line in t.state.log_history[:-1] for key in ("loss", "grad_norm")] for t in (trainer, sharp)
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-12)


def batches(terms):
    return [(micro_batch(i), divisor) for i, divisor in terms]


def gradient(w, terms):
    return window_gradient(lambda: (Net(), own_loss), w, w, batches(terms))


def mask_of(g):
    layout = layout_of({n: p.shape for n, p in Net().named_parameters()})
    return fisher_mask(g**2, layout, 0.3, "global", "always")


def taught(w, teacher, groups):
    """MESA with T = 2: the mean over each announced window of KL(teacher || now), besides the loss."""
    net = Net()
    put(net, teacher)
    grads = gradient(w, [term for group in groups for term in group])
    inner = Net()
    put(inner, w)
    term = 0.0
    for group in groups:
        x = torch.cat([micro_batch(i)["x"] for i, _ in group])
        target = F.softmax(net(x)["logits"].detach() / 2, -1)
        here = F.log_softmax(inner(x)["logits"] / 2, -1)
        term = term + 3.0 * 4 * (target * (target.log() - here)).sum(-1).mean()
    return grads + torch.cat([g.reshape(-1) for g in torch.autograd.grad(term, inner.parameters())])


def right_gradient(name, w, terms, memory):
    """What a method makes of the window, from its formula; `memory` is the momentum, or the teacher."""
    g = gradient(w, terms)
    if name == "msam":
        return gradient(w - RHO * unit(memory["buffer"]), terms) if "buffer" in memory else g
    if name == "mesa":
        groups = [FIRST] if len(terms) == 4 else [BOTH[:2], FIRST]
        memory["teacher"] = 0.5 * memory["teacher"] + 0.5 * w if "teacher" in memory else w
        return taught(w, memory["teacher"], groups)
    e = RHO * unit(g)
    if name == "fsam":
        e = torch.where(mask_of(g), e, torch.zeros_like(e))
    there = gradient(w + e, terms)
    return there - 0.3 * orthogonal(g, there) if name == "gsam" else there


STRONG = {
    "sam": lambda: sam(RHO),
    "gsam": lambda: gsam(RHO, rho_min=0.0, alpha=0.3),
    "mesa": lambda: mesa(lam=3.0, decay=0.5, temperature=2.0),
    "fsam": lambda: fsam(RHO, keep=0.3, every=1),
    "msam": lambda: MSAM(Perturbation(RHO)),
}


@pytest.mark.parametrize("name", STRONG)
def test_the_method_is_of_the_loss_that_the_host_steps_on(name, tmp_path):
    """The next epoch's first window comes with what was left over, each micro-batch with its own divisor."""
    path, _ = on_a_stream(SharpTrainer, tmp_path, steps=2, momentum=0.5, method=STRONG[name]())
    w, memory = flat(Net()), {}
    for terms, ours in zip((FIRST, BOTH), path, strict=True):
        g = right_gradient(name, w, terms, memory)
        memory["buffer"] = 0.5 * memory["buffer"] + g if "buffer" in memory else g
        w = w - 0.1 * memory["buffer"]
        assert_close(ours, w)


class Adds(TrainerCallback):
    """Adds to the gradients at some event."""

    def __init__(self, event, value=0.25):
        self.value = value
        setattr(self, event, self.add)

    def add(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            p.grad = torch.full_like(p, self.value) if p.grad is None else p.grad + self.value


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_callbacks_gradient_is_added_once(accumulate, tmp_path):
    net = Net()
    start, terms = flat(net), [(i, accumulate) for i in range(accumulate)]
    settings = {"gradient_accumulation_steps": accumulate, "callbacks": [Adds("on_step_begin")]}
    trained(net, sam(RHO), tmp_path, **settings)
    right = sam_gradient(lambda: (Net(), own_loss), start, batches(terms)) + 0.25
    assert_close(start - flat(net), right)
    same = Net()
    train(
        Trainer, same, ROWS, tmp_path, optimizers=(sgd(same), None), max_steps=1, **SETTINGS, **settings
    )  # the Trainer adds it once, too
    assert_close(start - flat(same), gradient(start, terms) + 0.25)


def test_gradients_changed_in_the_middle_of_a_window_are_refused(tmp_path):
    net = Net()
    start = flat(net)
    settings = {"gradient_accumulation_steps": 2, "callbacks": [Adds("on_substep_end")]}
    with pytest.raises(RuntimeError, match=r"changed between two micro-batches of a window .*on_pre_optimizer_step"):
        trained(net, sam(RHO), tmp_path, **settings)
    assert torch.equal(flat(net), start)


# ---- windows that end elsewhere ---------------------------------------------------------------------------------


def loop(accumulate=2, method=None):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    net = Net()
    prepared, optimizer = accelerator.prepare(net, sgd(net))
    sharp = SharpStep(sam(RHO) if method is None else method, prepared, optimizer, accelerator, own_loss)
    return accelerator, net, prepared, optimizer, sharp


def test_a_loop_that_leaves_the_last_micro_batch_out_is_told():
    accelerator, net, prepared, optimizer, sharp = loop()
    start = flat(net)
    with pytest.raises(RuntimeError, match=r"steps after 1 of 2 micro-batches of a window.*zero_grad"):
        for index in range(2):
            with accelerator.accumulate(prepared):
                if index == 0:
                    sharp.backward(micro_batch(index))
                optimizer.step()
                optimizer.zero_grad()
    assert torch.equal(flat(net), start)


def test_one_that_drops_the_window_as_told_goes_on_with_the_next():
    accelerator, net, prepared, optimizer, sharp = loop()
    start, kept = flat(net), []
    for index in range(4):
        with accelerator.accumulate(prepared):
            if index != 1:
                sharp.backward(micro_batch(index))
                kept.append(index)
            if index == 1:
                optimizer.zero_grad()
                continue
            optimizer.step()
            optimizer.zero_grad()
    assert_close(start - flat(net), sam_gradient(lambda: (Net(), own_loss), start, batches([(2, 2), (3, 2)])))


def test_a_dropped_window_leaves_no_memory():
    """MESA's teacher takes in the weights when a window begins: of one that was no step, it must not."""
    accelerator, net, prepared, optimizer, sharp = loop(accumulate=1, method=mesa(lam=3.0, decay=0.5))
    sharp.backward(micro_batch(0))
    optimizer.step()
    optimizer.zero_grad()
    known, stepper = flat(Net()), sharp._stepper
    stepper.begin_window([micro_batch(1), micro_batch(2)])
    with accelerator.no_sync(prepared):
        stepper.micro_batch(micro_batch(1), last=False)
    optimizer.zero_grad()
    stepper.begin_window([micro_batch(3)])
    stepper.micro_batch(micro_batch(3), last=True)
    teacher = torch.cat([t.reshape(-1) for t in sharp.method._state["teacher"].values()])
    assert not torch.equal(flat(net), known)
    assert_close(teacher, 0.5 * known + 0.5 * flat(net))


# ---- a class that passes a micro-batch twice --------------------------------------------------------------------


class Below(Twice, Trainer):
    pass


class Above(Twice, SharpTrainer):
    pass


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_two_passes_a_micro_batch_below_are_right_and_above_are_refused(accumulate, tmp_path):
    def both(net, batch):
        return own_loss(net, batch) + own_loss(net, {**batch, "x": batch["x"] + 0.1})

    net = Net()
    start, terms = flat(net), batches([(i, accumulate) for i in range(accumulate)])
    trained(net, sam(RHO), tmp_path, cls=make_sharp(Below), gradient_accumulation_steps=accumulate)
    assert_close(start - flat(net), sam_gradient(lambda: (Net(), both), start, terms))
    net = Net()
    with pytest.raises(RuntimeError, match=r"more than once.*make_sharp\(YourTrainer\)"):
        trained(net, sam(RHO), tmp_path, cls=Above, gradient_accumulation_steps=accumulate)
    assert torch.equal(flat(net), start)


# ---- after an exception -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [Normed, Centre, Carried, Frozen, Drawing])
def test_an_exception_undoes_what_the_first_passes_moved(kind, at, tmp_path):
    """A window of two micro-batches has four passes; whichever fails, nothing has happened but draws."""
    net = Net(kind)
    before, start = state_of(Net(kind)), flat(net)

    wire = Tripwire(net)

    def broken(*_):
        if wire.count == at:
            raise ValueError("broken")

    net.middle.register_forward_hook(broken)
    with pytest.raises(ValueError, match="broken"):
        trained(net, sam(RHO), tmp_path, gradient_accumulation_steps=2)
    assert torch.equal(flat(net), start) and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in state_of(net).items())


def test_the_random_stream_is_not_wound_back(tmp_path):
    net = Net()
    trainer = build(SharpTrainer, net, ROWS, tmp_path, method=sam(RHO), optimizers=(sgd(net), None))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def broken(*_):
        torch.rand(1)
        raise ValueError("broken")

    net.middle.register_forward_hook(broken)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="broken"):
        trainer.training_step(net, micro_batch(0))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.rand(1)
    assert torch.equal(after, torch.get_rng_state())


def test_the_end_of_training_leaves_what_plain_training_leaves(tmp_path):
    """A stream that ends in the middle of a window: its rest moved the statistics, in plain training as here."""

    class Short(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ROWS[: 6 * MICRO]

    means = []
    for cls, own in ((Trainer, {}), (SharpTrainer, {"method": plain()})):
        net = Net(Normed)
        settings = {"gradient_accumulation_steps": 4, "max_steps": 2, "optimizers": (sgd(net, 0.01), None)}
        train(cls, net, Short(), tmp_path, **SETTINGS, **settings, **own)
        means.append((net.middle.running_mean.clone(), int(net.middle.num_batches_tracked)))
    assert torch.equal(means[0][0], means[1][0]) and means[0][1] == means[1][1]
