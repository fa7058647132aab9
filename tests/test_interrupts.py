"""Ctrl-C anywhere in a step: everything is as it was before the step, and the step can be made again.

The interrupt is raised at the entry of a Python function, ours or anybody's, one entry after the other. By hand, all
of them: `python tests/test_interrupts.py trainer,loop [methods]`, which prints how many there are and which leave a
trace.
"""

import gc
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from hf_sharp import Constant, FlatLoRA, SharpStep, SharpTrainer, bi_lora, fsam, gsam, mesa, sam, tram, vasso
from hf_sharp._engine.switches import Switches
from hf_sharp._engine.undo import Undo
from models import batch_of, mlp_rows, tiny_mlp
from training import build

ROWS = mlp_rows(40)
METHODS = {
    "sam": lambda: sam(0.05),
    "fsam": lambda: fsam(0.05, keep=0.3, every=2),
    "fsam_per_sample": lambda: fsam(0.05, keep=0.3, every=1, fisher="per_sample", samples=2),
    "gsam": lambda: gsam(0.05),
    "vasso": lambda: vasso(0.05),
    "mesa": lambda: mesa(lam=2.0, decay=0.7),
    "tram_previous": lambda: tram("previous", scale=50.0),
    "tram_fisher": lambda: tram("fisher", sigma=0.3),
    "bi_lora": lambda: bi_lora(0.05),
    "flat_lora": lambda: FlatLoRA(sigma=Constant(0.2)),
}
STRIDE = 131  # between the entries that the suite tries


class Interrupt:
    """While open, raises KeyboardInterrupt at the n-th entry of a Python function; 0 only counts them."""

    def __init__(self, at=0):
        self.at, self.count, self.where = at, 0, None

    def __enter__(self):
        sys.settrace(self._look)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _look(self, frame, event, arg):
        self.count += event == "call"
        if self.count == self.at and event == "call":
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
            sys.settrace(None)
            raise KeyboardInterrupt


def network(name):
    settings = {"norm": "batch", "dropout": 0.2}
    if "lora" not in name:
        return tiny_mlp(**settings)
    from peft_models import lora_mlp  # skips where PEFT is missing

    return lora_mlp(model=settings)


def by_trainer(name, folder):
    """A Trainer whose steps are made one by one."""
    model, batch = network(name), batch_of(ROWS[:8])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    settings = {"optimizers": (optimizer, None), "gradient_accumulation_steps": 1}
    trainer = build(SharpTrainer, model, ROWS, folder, method=METHODS[name](), **settings)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step():
        (window, items) = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        return trainer.training_step(model, window[0], items)

    owners = (trainer, trainer.accelerator)
    return SimpleNamespace(
        model=model, step=step, optimizer=optimizer, method=trainer.method, owners=owners, again=lambda: None
    )


def by_loop(name, folder):
    """A loop of Accelerate's."""
    del folder
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator, model, batch = Accelerator(cpu=True), network(name), batch_of(ROWS[:8])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    method = METHODS[name]()
    sharp = SharpStep(method, prepared, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    host = sharp._host

    def again():
        host.step = 2

    return SimpleNamespace(
        model=model,
        step=lambda: sharp.backward(batch),
        optimizer=optimizer,
        method=method,
        owners=(accelerator, host),
        again=again,
    )


def tensors(run):
    """Everything with numbers: weights, buffers, the method's memory and parameters of its own."""
    found = {n: t.detach() for n, t in (*run.model.named_parameters(), *run.model.named_buffers())}
    found |= {f"memory {key}": torch.as_tensor(value) for key, value in run.method.state_dict().items()}
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    return found | {f"parameter {i}": p.detach() for i, p in enumerate(held)}


def gradients(run):
    return [p.grad for group in run.optimizer.param_groups for p in group["params"]]


def surroundings(run):
    """Everything without: names, hooks, switches, by which object they are where that matters."""
    modules = []
    for module in run.model.modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        modules.append((module.training, sorted(vars(module)), hooks, list(map(id, module._parameters.values()))))
    owners = [sorted(vars(owner)) for owner in run.owners]
    switches = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch._dynamo.eval_frame._stance.stance
    accelerator = next(o for o in run.owners if isinstance(o, Accelerator))
    steps = vars(run.owners[0]).get("current_gradient_accumulation_steps"), accelerator.gradient_state.plugin_kwargs
    return modules, [p.requires_grad for p in run.model.parameters()], owners, switches, steps


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def made(run):
    """One step's gradients and what it leaves, from the same random stream."""
    torch.manual_seed(5)
    loss = run.step()
    return loss, [None if g is None else g.clone() for g in gradients(run)], copies(tensors(run))


def copies(found):
    return {key: value.clone() for key, value in found.items()}


def alike(ours, theirs):
    grads = zip(ours[1], theirs[1], strict=True)
    same_grads = all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in grads)
    return torch.equal(ours[0], theirs[0]) and same_grads and same(ours[2], theirs[2])


class Sweep:
    """A training in its third step, which is interrupted again and again.

    Args:
        run: the training.
    """

    def __init__(self, run):
        self.run = run
        for _ in range(2):
            run.step()
            run.optimizer.step()
            run.optimizer.zero_grad()
        gc.collect()
        self.numbers, self.memory = copies(tensors(run)), run.method.snapshot()
        self.surroundings = surroundings(run)
        self.right = made(run)
        self.reset()
        assert alike(made(run), self.right)  # the step can be made again from here
        self.reset()
        torch.manual_seed(5)
        with Interrupt() as counted:
            run.step()
        self.entries = counted.count - 1  # the last one is that of leaving the `with`
        self.reset()

    def reset(self):
        self.run.optimizer.zero_grad()
        self.run.again()
        self.run.method.rollback(self.memory)
        with torch.no_grad():
            for key, tensor in tensors(self.run).items():
                tensor.copy_(self.numbers[key])

    def trace_of(self, at):
        """What an interrupt at an entry leaves behind: None, or a word for it and the entry."""
        torch.manual_seed(5)
        try:
            with Interrupt(at) as interrupt:
                self.run.step()
        except KeyboardInterrupt:
            found = self._found()
        else:  # raised where Python ignores it, in the end of a generator
            grads = zip(gradients(self.run), self.right[1], strict=True)
            found = None if all(a is b is None or torch.equal(a, b) for a, b in grads) else "swallowed"
        self.reset()
        return None if found is None else (found, interrupt.where)

    def _found(self):
        if not same(tensors(self.run), self.numbers):
            now = tensors(self.run)
            return [key for key in now if key not in self.numbers or not torch.equal(now[key], self.numbers[key])]
        if surroundings(self.run) != self.surroundings:
            pairs = zip(surroundings(self.run), self.surroundings, strict=True)
            return [(a, b) for a, b in pairs if a != b]
        if any(g is not None for g in gradients(self.run)):
            return "gradients"
        return None if alike(made(self.run), self.right) else "the next step differs"


PLACES = [(name, (by_trainer, by_loop)[index % 2]) for index, name in enumerate(METHODS)]


# An interrupt in a generator that is being thrown away goes no further: Python prints it, and pytest warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("name", "place"), [*PLACES, ("sam", by_loop)])
def test_an_interrupt_leaves_no_trace(name, place, tmp_path):
    sweep = Sweep(place(name, tmp_path))
    tried = range(1 + hash_of(name), sweep.entries + 1, STRIDE)
    assert len(tried) > 10
    traces = {at: trace for at in tried if (trace := sweep.trace_of(at)) is not None}
    assert not traces


def hash_of(name):
    return sum(map(ord, name)) % STRIDE  # other entries for every method


def test_what_was_moved_inside_a_region_is_put_back_first():
    """Also where an interrupt has kept the inner region from being left: the outer one knows the older values."""
    undo, done = Undo(), []
    with undo.region(lambda: done.append("outer")):
        inner = undo.region(lambda: done.append("inner"))
        inner.__enter__()
    assert done == ["inner", "outer"]
    inner.__exit__(None, None, None)  # as the garbage collector does later
    assert done == ["inner", "outer"]


def test_switches_of_torch_are_set_back():
    with torch.autocast("cpu", torch.bfloat16):
        inside = Switches.record()
    switches = Switches.record()
    torch.autocast("cpu", torch.float16, cache_enabled=False).__enter__()
    torch.set_grad_enabled(False)
    assert Switches.record() != switches
    switches.restore()
    assert Switches.record() == switches and torch.is_grad_enabled()
    assert inside.depth == switches.depth + 1
    assert torch.nn.Linear(2, 2)(torch.ones(2)).dtype == torch.float32


if __name__ == "__main__":
    import tempfile

    sys.path += ["tests", "tests/helpers"]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    places = {"trainer": by_trainer, "loop": by_loop}
    for place in map(places.get, sys.argv[1].split(",")):
        for name in sys.argv[2:] or METHODS:
            sweep = Sweep(place(name, tempfile.mkdtemp()))
            traces = {at: t for at in range(1, sweep.entries + 1) if (t := sweep.trace_of(at)) is not None}
            print(place.__name__, name, sweep.entries, "entries,", len(traces), "leave a trace", flush=True)
            for at, (found, where) in list(traces.items())[:4]:
                print("   ", at, where, str(found)[-200:], flush=True)
