"""The promises of test_contract.py for the methods made for adapters, on a model with LoRA."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer

import adapter_references
import hf_sharp
from grad_scaler import Scaled
from hf_sharp import SharpOptimizer, SharpStep, SharpTrainer
from models import causal_rows, mlp_rows, tiny_mlp, windows_of
from peft_models import METHODS, RANK, SCALING, added, frozen, lora_llama, lora_mlp, trainables
from references import adamw, linear_decay, sgd
from training import Recorder, Tripwire, build, exact_logs, same_state, train

ROWS = mlp_rows(40)
NAME = "base_model.model.{}.default"
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def optimizers(kind, model):
    lists = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.05, "weight_decay": 0.1}]
    if kind == "sgd":
        return torch.optim.SGD(lists, momentum=0.9), (sgd(0.05, 0.9, 0.1), sgd(0.05, 0.9))
    return torch.optim.AdamW(lists), (adamw(0.05, weight_decay=0.1), adamw(0.05))


# ---- the reference's trajectory


def reference(name, model, aux, updates):
    base = torch.cat([p.detach().reshape(-1) for n, p in model.named_parameters() if "lora_" not in n])
    common = {"scaling": SCALING, "max_norm": 0.5, "lr_factor": linear_decay(5), "steps": 5}
    start, windows = (base, trainables(model)), windows_of(ROWS, micro=4, accumulate=2)
    if name == "bi_lora":
        path = adapter_references.bi_lora(*start, aux, windows, updates, rho=0.05, ranks=(RANK, 3), **common)
        return [torch.cat(pair) for pair in path]
    if name == "flat_lora":
        options = {"sigma": lambda step: 0.2, "seed": 42, "name": NAME}
        return adapter_references.flat_lora(*start, windows, updates[0], rank=RANK, **options, **common)
    mu = {"nbar": lambda step: 2.0, "obar": lambda step: 3.0 - 2.0 * step / 5}[name]
    options = {"mu": mu, "kind": name[0], "lr": 0.05}
    return adapter_references.bar(*start, windows, updates[0], rank=RANK, **options, **common)


@every_method
@pytest.mark.parametrize("kind", [pytest.param("sgd", marks=pytest.mark.fast), "adamw"])
@pytest.mark.parametrize("start", [False, True], ids=["B zero", "B drawn"])
def test_five_steps_are_the_references(name, kind, start, tmp_path):
    model, path, auxiliary = lora_mlp(start), [], []
    optimizer, updates = optimizers(kind, model)
    settings = {"optimizers": (optimizer, None), "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    trainer = build(SharpTrainer, model, ROWS, tmp_path, method=METHODS[name](), **settings)
    record = Recorder(lambda **_: path.append(torch.cat([trainables(model), added(trainer)])))
    record.on_train_begin = lambda *_, **__: auxiliary.append(added(trainer).clone())
    trainer.add_callback(record)
    twin = lora_mlp(start)
    trainer.train()
    expected = reference(name, twin, auxiliary[0], updates)
    for index, (ours, theirs) in enumerate(zip(path, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=lambda text, index=index: f"{index}: {text}")
    assert (of_the_trainer(kind, start, tmp_path) - trainables(model)).abs().max() > 1e-4
    assert torch.equal(frozen(model), frozen(twin))


def of_the_trainer(kind, start, folder, known={}):  # noqa: B006  one training for all methods
    if (kind, start) not in known:
        plain = lora_mlp(start)
        settings = {"optimizers": (optimizers(kind, plain)[0], None), "gradient_accumulation_steps": 2}
        train(Trainer, plain, ROWS, folder, max_grad_norm=0.5, **settings)
        known[kind, start] = trainables(plain)
    return known[kind, start]


# ---- a strength of zero is the Trainer's own training, and nothing but the adapters ever changes


def llama(dropout=0.1):
    return lora_llama(model={"dropout": 0.1}, lora_dropout=dropout)


@every_method
@pytest.mark.parametrize("accumulate, logging_steps", [(1, 1), (4, 5)])
def test_strength_zero_is_the_trainer_bitwise(name, accumulate, logging_steps, tmp_path):
    results = []
    for cls, options in ((Trainer, {}), (SharpTrainer, {"method": METHODS[name](0.0)})):
        steps = {"gradient_accumulation_steps": accumulate, "logging_steps": logging_steps, "learning_rate": 1e-3}
        trainer = train(cls, llama(), causal_rows(32), tmp_path, per_device_train_batch_size=2, **steps, **options)
        results.append((trainables(trainer.model), torch.get_rng_state(), exact_logs(trainer)))
    (w, stream, logs), (our_w, our_stream, our_logs) = results
    assert torch.equal(our_w, w) and torch.equal(our_stream, stream) and our_logs == logs


@every_method
@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_the_base_weights_are_bitwise_unchanged(name, settings, tmp_path):
    model = llama()
    before, names = frozen(model), list(model.state_dict())
    at_steps = []
    look = Recorder(lambda **_: at_steps.append(torch.equal(frozen(model), before)))
    started = trainables(model)
    train(SharpTrainer, model, causal_rows(32), tmp_path, method=METHODS[name](), callbacks=[look], **settings)
    assert at_steps == [True] * 5 and list(model.state_dict()) == names
    assert not torch.equal(trainables(model), started)


# ---- loss scale, windows, checkpoints, cost


def momentum_sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.5)


def scaled_run(name, scale, folder, model=None, **hooks):
    model = lora_mlp() if model is None else model
    settings = {"method": METHODS[name](), "optimizers": (momentum_sgd(model), None), **hooks}
    trainer = build(SharpTrainer, model, ROWS, folder, **settings)
    return trainer, Scaled(scale)(trainer)


@every_method
def test_the_loss_scale_does_not_change_the_trajectory(name, tmp_path):
    ends = []
    for scale in (1.0, 2.0**16):
        trainer, scaler = scaled_run(name, scale, tmp_path)
        trainer.train()
        ends.append(torch.cat([trainables(trainer.model), added(trainer)]))
        assert scaler.get_scale() == scale
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)
    assert (trainables(trainer.model) - trainables(lora_mlp())).abs().max() > 1e-3


@every_method
@pytest.mark.parametrize("step", [0, 1])
def test_an_overflow_skips_the_step_and_moves_nothing(name, step, tmp_path):
    model = lora_mlp()
    trainer, scaler = scaled_run(name, 2.0**10, tmp_path, model, max_steps=3)
    path = [torch.cat([trainables(model), added(trainer)])]

    def explode(module, inputs, output):
        return output * (torch.inf if len(path) == step + 1 else 1.0)

    hook = model.base_model.model.norm.register_forward_hook(explode)
    record = Recorder(lambda **_: path.append(torch.cat([trainables(model), added(trainer)])))
    record.on_train_begin = lambda *_, **__: path.__setitem__(0, torch.cat([trainables(model), added(trainer)]))
    trainer.add_callback(record)
    trainer.train()
    hook.remove()
    assert scaler.get_scale() == 2.0**9
    assert torch.equal(path[step + 1], path[step])
    assert torch.isfinite(path[-1]).all() and not torch.equal(path[step + 1], path[step + 2])


@every_method
def test_windows_of_8x1_4x2_and_2x4_agree(name, tmp_path):
    runs = []
    for micro, accumulate in ((8, 1), (4, 2), (2, 4)):
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
        trainer = train(SharpTrainer, lora_mlp(), ROWS, tmp_path, method=METHODS[name](), **sizes)
        runs.append(torch.cat([trainables(trainer.model), added(trainer)]))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-12)


@every_method
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(name, tmp_path):
    settings = {"max_steps": 8, "gradient_accumulation_steps": 2, "save_steps": 3, "save_strategy": "steps"}
    settings |= {"train_sampling_strategy": "random", "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    whole = train(SharpTrainer, llama(), causal_rows(24), tmp_path / "a", method=METHODS[name](), **settings)
    torch.manual_seed(99)
    again = build(SharpTrainer, llama(), causal_rows(24), tmp_path / "a", method=METHODS[name](), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(trainables(again.model), trainables(whole.model)) and torch.equal(added(again), added(whole))
    assert same_state(again.method.state_dict(), whole.method.state_dict())
    assert exact_logs(again)[-2] == exact_logs(whole)[-2]


@every_method
@pytest.mark.parametrize("accumulate", [1, 4])
def test_passes_are_what_the_cost_declares(name, accumulate, tmp_path):
    model, count = lora_mlp(), []
    model.base_model.model.register_forward_pre_hook(lambda *_: count.append(1))
    settings = {"max_steps": 2, "gradient_accumulation_steps": accumulate}
    trainer = train(SharpTrainer, model, ROWS, tmp_path, method=METHODS[name](), **settings)
    assert len(count) == 2 * accumulate and trainer.method.cost == 1.0
    logged = [line["sharp_evaluations"] for line in trainer.state.log_history if "sharp_evaluations" in line]
    assert logged == [1.0, 1.0]


# ---- what goes wrong


@every_method
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")], ids=["ctrl-c", "error"])
def test_an_exception_in_a_pass_leaves_nothing_behind(name, error, tmp_path):
    model = lora_mlp()
    trainer = build(SharpTrainer, model, ROWS, tmp_path, method=METHODS[name](), gradient_accumulation_steps=2)
    path = []
    trainer.add_callback(Recorder(lambda **_: path.append(trainables(model))))
    before, functions = frozen(model), [type(m).forward for m in model.modules()]
    wire = Tripwire(model.base_model.model.head, at=6, error=error)  # in the third step's second pass
    with pytest.raises(type(error)):
        trainer.train()
    assert wire.count == 6 and torch.equal(trainables(model), path[1]) and torch.equal(frozen(model), before)
    assert [type(m).forward for m in model.modules()] == functions
    assert not any("forward" in vars(m) for m in model.modules())
    assert all(p.grad is None for p in (*model.parameters(), *trainer._sharp_host.added.values()))


@every_method
def test_a_zero_gradient_gives_no_nan(name, tmp_path):
    def nothing(outputs, labels, num_items_in_batch=None):
        return 0.0 * outputs["logits"].sum()

    model = lora_mlp()
    trainer = train(SharpTrainer, model, ROWS, tmp_path, method=METHODS[name](), compute_loss_func=nothing)
    assert torch.isfinite(torch.cat([trainables(model), added(trainer)])).all()


@every_method
def test_the_repr_round_trips(name):
    assert eval(repr(METHODS[name]()), vars(hf_sharp)) == METHODS[name]()


@every_method
def test_a_model_without_adapters_is_refused_with_the_way_out(name, tmp_path):
    with pytest.raises(ValueError, match=r"get_peft_model\(model, LoraConfig"):
        build(SharpTrainer, tiny_mlp(), ROWS, tmp_path, method=METHODS[name]())


# ---- the loop and the optimizer


def loss_of(model, batch):
    return model(**batch)["loss"]


@every_method
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_gives_the_trainers_weights(name, accumulate, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = lora_mlp()
    prepared, optimizer = accelerator.prepare(model, momentum_sgd(model))
    sharp = SharpStep(METHODS[name](), prepared, optimizer, accelerator, loss_of, total_steps=5)
    for window in windows_of(ROWS, micro=4, accumulate=accumulate)[:5]:
        for batch in window:
            with accelerator.accumulate(prepared):
                sharp.backward(batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
    twin = lora_mlp()
    settings = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.3, "lr_scheduler_type": "constant"}
    settings |= {"optimizers": (momentum_sgd(twin), None), "method": METHODS[name]()}
    train(SharpTrainer, twin, ROWS, tmp_path, **settings)
    torch.testing.assert_close(trainables(model), trainables(twin), rtol=0, atol=1e-12)


@every_method
def test_a_checkpointed_loop_goes_on_bitwise(name, tmp_path):
    def run(split):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        model = lora_mlp()
        prepared, optimizer = accelerator.prepare(model, momentum_sgd(model))
        sharp = SharpStep(METHODS[name](), prepared, optimizer, accelerator, loss_of, total_steps=8)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 0.9**step)
        scheduler = accelerator.prepare(scheduler)  # made after SharpStep, which may add a group
        accelerator.register_for_checkpointing(sharp)
        for index, window in enumerate(windows_of(ROWS, micro=4, accumulate=1)[:8]):
            if index == 4 and split == "save":
                accelerator.save_state(str(tmp_path / "state"))
            if index < 4 and split == "load":
                continue
            if index == 4 and split == "load":
                accelerator.load_state(str(tmp_path / "state"))
            sharp.backward(window[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        own = [p.detach().reshape(-1) for p in sharp._host.added.values()]
        return torch.cat([trainables(model), *own])

    assert torch.equal(run("save"), run("load"))


@every_method
def test_the_optimizer_gives_the_trainers_weights(name, tmp_path):
    if name == "obar":  # its schedule needs the length of training
        with pytest.raises(ValueError, match="Linear needs the number of training steps"):
            by_closure(name, lora_mlp())
        return
    model, twin = lora_mlp(), lora_mlp()
    by_closure(name, model)
    settings = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "optimizers": (momentum_sgd(twin), None)}
    train(SharpTrainer, twin, ROWS, tmp_path, method=METHODS[name](), **settings)
    torch.testing.assert_close(trainables(model), trainables(twin), rtol=0, atol=1e-12)
    if name != "nbar":
        with pytest.raises(ValueError, match="needs the model's modules"):
            SharpOptimizer(momentum_sgd(model), METHODS[name]())


def by_closure(name, model):
    optimizer = SharpOptimizer(momentum_sgd(model), METHODS[name](), model)
    for window in windows_of(ROWS, micro=4, accumulate=1)[:5]:

        def closure(batch=window[0]):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
