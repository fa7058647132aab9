"""SAM on models with adapters, in every integration: only the trainables are touched, and move as in textbook SAM."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from hf_sharp import SharpOptimizer, SharpStep, SharpTrainer, asam, sam
from models import causal_rows, mlp_rows, seeded, text_rows, tiny_bert, tiny_llama, tiny_mlp, windows_of
from peft_models import frozen, lora_llama, lora_mlp, peft, trainables, with_lora
from references import asam as reference_asam
from references import functional, sgd, trajectory
from references import sam as reference_sam
from training import build, train


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def adapted(model, config):
    with seeded(5), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
        model = peft.get_peft_model(model, config).double()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def two_adapters():
    model = lora_mlp()
    with seeded(6):
        model.add_adapter("second", peft.LoraConfig(r=1, target_modules=["head"]))
        model.base_model.set_adapter(["default", "second"])
    return model.double()


def prompt_tuning():
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = adapted(tiny_bert(dropout=0.0), config)
    model.accepts_loss_kwargs = False
    return model


IA3 = ["hidden", "head"]
ADAPTERS = {
    "lora": lora_mlp,
    "lora, B zero": lambda: lora_mlp(start=False),
    "dora": lambda: lora_mlp(use_dora=True),
    "ia3": lambda: adapted(tiny_mlp(), peft.IA3Config(target_modules=IA3, feedforward_modules=IA3[1:])),
    "modules_to_save": lambda: with_lora(tiny_mlp(), target_modules=["hidden"], modules_to_save=["head", "norm"]),
    "two adapters": two_adapters,
    "prompt tuning": prompt_tuning,
}
SIZES = {"lora": 50, "dora": 61, "ia3": 16, "modules_to_save": 71, "two adapters": 61, "prompt tuning": 99}


def rows_for(name):
    return text_rows(40) if name == "prompt tuning" else mlp_rows(40)


def momentum_sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def expected(model, rows, rule, accumulate=1, **settings):
    w, layout, loss_fn = functional(model)
    windows = windows_of(rows, micro=4, accumulate=accumulate)
    return trajectory(rule, loss_fn, w, windows, sgd(0.05, momentum=0.9), 5, layout=layout, **settings)[-1]


def by_trainer(model, rows, method, folder, accumulate=1):
    settings = {"optimizers": (momentum_sgd(model), None), "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return train(SharpTrainer, model, rows, folder, method=method, gradient_accumulation_steps=accumulate, **settings)


def by_loop(model, rows, method):
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, momentum_sgd(model))
    sharp = SharpStep(method, prepared, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    for window in windows_of(rows, micro=4, accumulate=1)[:5]:
        sharp.backward(window[0])
        optimizer.step()
        optimizer.zero_grad()


def by_closure(model, rows, method):
    optimizer = SharpOptimizer(momentum_sgd(model), method, model)
    for window in windows_of(rows, micro=4, accumulate=1)[:5]:

        def closure(batch=window[0]):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", ADAPTERS)
def test_sam_is_textbook_sam_on_the_trainables_in_every_integration(name, tmp_path):
    model, rows = ADAPTERS[name](), rows_for(name)
    assert trainables(model).numel() == SIZES.get(name, 50) and trainables(model).dtype == torch.float64
    started, base, flags = trainables(model), frozen(model), [p.requires_grad for p in model.parameters()]
    goal = expected(model, rows, reference_sam, rho=0.1)
    runs = {"trainer": lambda m: by_trainer(m, rows, sam(0.1), tmp_path)}
    runs |= {"loop": lambda m: by_loop(m, rows, sam(0.1)), "optimizer": lambda m: by_closure(m, rows, sam(0.1))}
    for integration, run in runs.items():
        model = ADAPTERS[name]().train()
        run(model)
        assert (trainables(model) - goal).abs().max() < 1e-10, integration
        assert torch.equal(frozen(model), base) and [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    plain = expected(ADAPTERS[name](), rows, lambda grad_fn, w, *_, **__: grad_fn(w))
    assert (goal - started).abs().max() > 1e-3 and (goal - plain).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_windows_of_several_micro_batches(name, tmp_path):
    model, rows = ADAPTERS[name](), rows_for(name)
    goal = expected(model, rows, reference_sam, accumulate=2, rho=0.1)
    by_trainer(model, rows, sam(0.1), tmp_path, accumulate=2)
    torch.testing.assert_close(trainables(model), goal, rtol=0, atol=1e-10)


def test_the_adaptive_ball_moves_a_b_that_starts_at_zero(tmp_path):
    """At the start the gradient of A is zero, so that with eta = 0 nothing would move at all."""
    gaps = {}
    for name, method in {"default": asam(rho=0.5), "eta 0": asam(rho=0.5, eta=0.0, on="all")}.items():
        model = lora_mlp(start=False)
        goal = expected(model, mlp_rows(40), reference_asam, rho=0.5, eta=0.01 * (name == "default"), on="weights")
        trainer = by_trainer(model, mlp_rows(40), method, tmp_path)
        gaps[name] = [line["sharp_gap"] for line in trainer.state.log_history if "sharp_gap" in line]
        if name == "default":
            torch.testing.assert_close(trainables(model), goal, rtol=0, atol=1e-10)
    assert gaps["default"][0] > 1e-4 and gaps["eta 0"][0] == 0.0


def test_the_note_at_the_start_counts_the_adapters_only(tmp_path):
    trainer = build(SharpTrainer, lora_llama(), causal_rows(8), tmp_path, method=sam(0.01))
    size = trainables(trainer.model).numel()
    assert f"28 of 28 trainable tensors ({size:,} of {size:,} entries, 100.0 %)" in trainer.describe_method()


def test_the_shift_of_float32_adapters_is_exact_on_a_16_bit_base(tmp_path):
    model = tiny_llama(dropout=0.0).to(torch.bfloat16)
    with seeded(5), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    base = frozen(model)
    trainer = train(SharpTrainer, model, causal_rows(20), tmp_path, method=sam(0.01), learning_rate=1e-3)
    lines = [line for line in trainer.state.log_history if "sharp_component" in line]
    assert trainables(model).dtype == torch.float32 and torch.equal(frozen(model), base)
    assert all(line["sharp_component"] == pytest.approx(1, abs=1e-3) for line in lines)
    assert all(line["sharp_noise"] < 1e-3 for line in lines)
