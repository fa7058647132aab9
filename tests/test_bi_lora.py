"""What is special to Bi-LoRA: the auxiliary is in the training passes and nowhere else."""

import copy
import warnings

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_sharp import BiLoRA, Constant, Every, FlatLoRA, Linear, SharpTrainer, bi_lora
from hf_sharp._adapters.bi_lora import Joined, JointLinear, clip_, joined
from hf_sharp._adapters.lora import lora_linears
from hf_sharp._engine.undo import Undo
from models import batch_of, causal_rows, mlp_rows, seeded, tiny_bert, tiny_llama
from peft_models import added, frozen, lora_llama, lora_mlp, peft, trainables, with_lora
from training import Recorder, build, train

ROWS = causal_rows(40)
BATCH = batch_of(ROWS[:4])
METHOD = BiLoRA(rho=2.0, rank=3)  # large, so that its presence shows


def llama(**settings):
    return lora_llama(model={"dropout": 0.0}, **settings)


def logits(model, **settings):
    with torch.no_grad():
        return model(**BATCH, **settings).logits


def half_way(folder, model, look, **settings):
    """Trains four steps and calls `look` after the second, in the middle of training."""

    def at_end(state, **_):
        if state.global_step == 2:
            look()

    settings = {"method": METHOD, "max_steps": 4, "learning_rate": 1e-2, **settings}
    return train(SharpTrainer, model, ROWS, folder, callbacks=[Recorder(at_end)], **settings)


def twin_of(model):
    """A fresh model with the same adapters, that no method has touched."""
    twin = llama()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    return twin


# ---- in the passes


def test_the_passes_see_both_adapters(tmp_path):
    """The logged loss of the third step is that of W + s B1 A1 + s B2 A2, written out in full."""
    model, seen = llama(), {}

    def look():
        merged = twin_of(model).merge_and_unload()
        added = trainer_of[0]._sharp_host.added
        layers = [Joined(layer, added[f"{layer.name}.A2"], added[f"{layer.name}.B2"]) for layer in linears(model)]
        products = [(layer.linear.name, layer.b.detach() @ layer.a.detach()) for layer in layers]
        assert float(sum(p.square().sum() for _, p in products).sqrt()) <= METHOD.rho * (1 + 1e-5)
        modules = dict(merged.named_modules())
        for name, product in products:
            modules[name.removeprefix("base_model.model.").removesuffix(".default")].weight.data += 2 * product
        with torch.no_grad():
            seen["loss"] = float(merged.train()(**batch_of(ROWS[8:12])).loss)
            seen["without"] = float(twin_of(model).train()(**batch_of(ROWS[8:12])).loss)

    trainer_of = []
    record = Recorder(lambda state, **_: look() if state.global_step == 2 else None)
    settings = {"method": METHOD, "max_steps": 3, "learning_rate": 1e-2}
    trainer_of.append(build(SharpTrainer, model, ROWS, tmp_path, callbacks=[record], **settings))
    trainer_of[0].train()
    logged = [line["loss"] for line in trainer_of[0].state.log_history if "loss" in line]
    assert logged[2] == pytest.approx(seen["loss"], abs=1e-5)
    assert abs(seen["loss"] - seen["without"]) > 1e-3


def linears(model):
    return lora_linears(model, "Bi-LoRA")


def test_the_auxiliary_starts_like_lora(tmp_path):
    trainer = build(SharpTrainer, lora_llama(start=False), ROWS, tmp_path, method=BiLoRA(rank=64))
    trainer.create_optimizer()
    found = {name: parameter.detach() for name, parameter in trainer._sharp_host.added.items()}
    assert len(found) == 2 * 14 and all(b.eq(0).all() for n, b in found.items() if n.endswith("B2"))
    draws = torch.cat([a.reshape(-1) * a.shape[1] ** 0.5 for n, a in found.items() if n.endswith("A2")])
    assert draws.abs().max() <= 1 and abs(draws.mean()) < 0.02
    assert draws.var() == pytest.approx(1 / 3, rel=0.03)  # uniform in (-1, 1): kaiming with a = sqrt(5), as PEFT
    again = build(SharpTrainer, lora_llama(start=False), ROWS, tmp_path, method=BiLoRA(rank=64))
    again.create_optimizer()
    assert all(torch.equal(found[n], again._sharp_host.added[n]) for n in found)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_joint_product_and_its_gradients(dim):
    with seeded(2):
        shapes = ((2, 5, 4 + 2 * dim), (3, 4), [(2, 4), (3, 2)][dim])
        tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: JointLinear.apply(*t, dim), tensors)
    narrow = [t.detach().float().requires_grad_() for t in tensors]
    results = []
    for product in (
        lambda x, main, extra: JointLinear.apply(x.bfloat16(), main, extra, dim),
        lambda x, main, extra: nn.functional.linear(x, torch.cat([main, extra], dim)),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            out = product(*narrow)
        results.append([out, *torch.autograd.grad(out.sum(), narrow)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)  # the format's own rounding


@pytest.mark.parametrize("rho", [0.5, 1e6])
def test_the_clip_is_global_and_only_once(rho):
    with seeded(1):
        pairs = [(torch.randn(3, 5), torch.randn(7, 3)), (torch.randn(4, 6), torch.randn(2, 4))]
    parameters = [(nn.Parameter(a.clone()), nn.Parameter(b.clone())) for a, b in pairs]
    dense = torch.cat([(b.double() @ a.double()).reshape(-1) for a, b in pairs]).norm()
    factor = min(1.0, float((rho / dense).sqrt()))
    with torch.autocast("cpu", torch.bfloat16):  # an outer autocast region does not blur the norm
        clip_(parameters, rho)
    for ours, (a, b) in zip(parameters, pairs, strict=True):
        torch.testing.assert_close(ours[0].detach(), a * factor, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours[1].detach(), b * factor, rtol=1e-5, atol=0)


def test_what_was_clipped_is_not_clipped_again():
    with seeded(1):
        for _ in range(50):
            a, b = nn.Parameter(torch.randn(8, 200)), nn.Parameter(torch.randn(100, 8))
            clip_([(a, b)], 0.05)
            once = a.detach().clone()
            clip_([(a, b)], 0.05)
            assert torch.equal(a, once)


def test_a_radius_may_shrink(tmp_path):
    norms, model = [], lora_mlp()
    trainer = build(SharpTrainer, model, mlp_rows(40), tmp_path, method=BiLoRA(rho=Linear(0.2, 0.01, steps=4)))

    def look(*_):
        added = trainer._sharp_host.added
        names = [n.removesuffix("A2") for n in added if n.endswith("A2")]
        norms.append(torch.cat([(added[f"{n}B2"] @ added[f"{n}A2"]).reshape(-1) for n in names]).norm().item())

    model.base_model.model.register_forward_pre_hook(look)
    trainer.train()
    radii = [0.2 - 0.19 * step / 4 for step in range(4)]  # each bounds the update of its step
    assert norms[0] == 0 and norms[1:] == pytest.approx(radii, rel=1e-9)


def test_weight_decay_and_clipping_pass_it_by(tmp_path):
    """With a decay that would halve it and a clip that would stop it, the auxiliary moves as without both."""
    ends = []
    for settings in ({}, {"weight_decay": 10.0, "max_grad_norm": 1e-9}):
        settings = {"method": METHOD, "max_steps": 1, "learning_rate": 0.05, "optim": "adamw_torch", **settings}
        ends.append(added(train(SharpTrainer, lora_mlp(), mlp_rows(8), tmp_path, **settings)))
    assert torch.equal(*ends)


# ---- and nowhere else


def test_evaluation_in_the_middle_of_training_does_not_see_it(tmp_path):
    model, seen = llama(), []

    def look():
        twin = twin_of(model)
        for training in (True, False):  # also in training mode
            seen.append(torch.equal(logits(model.train(training)), logits(twin.train(training))))
        with model.disable_adapter(), twin.disable_adapter():
            seen.append(torch.equal(logits(model), logits(twin)))
        tokens = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        prompt = BATCH["input_ids"][:, :3]
        seen.append(torch.equal(model.generate(input_ids=prompt, **tokens), twin.generate(input_ids=prompt, **tokens)))

    trainer = half_way(tmp_path, model, look, eval_strategy="steps", eval_steps=1, eval_dataset=ROWS[:8])
    assert seen == [True] * 4 and added(trainer).norm() > 0.1
    twin = twin_of(model).eval()
    last = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line][-1]
    with torch.no_grad():
        expected = torch.stack([twin(**batch_of(ROWS[:8])).loss]).mean()
    assert last == pytest.approx(float(expected), abs=1e-6)


def test_switching_modes_in_a_callback_changes_nothing(tmp_path):
    first, second = llama(), llama()
    one = half_way(tmp_path, first, lambda: first.eval())
    other = half_way(tmp_path, second, lambda: None)
    assert torch.equal(trainables(first), trainables(second)) and torch.equal(added(one), added(other))


def test_what_is_saved_is_the_adapter(tmp_path):
    model = llama()
    trainer = half_way(tmp_path / "run", model, lambda: None, save_steps=2, save_strategy="steps")
    trainer.save_model(str(tmp_path / "saved"))
    plain = llama()
    train(Trainer, plain, ROWS, tmp_path / "plain", max_steps=1).save_model(str(tmp_path / "other"))
    ours = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(ours[k].shape == theirs[k].shape for k in ours)
    files = {p.name for p in (tmp_path / "saved").iterdir()} - {p.name for p in (tmp_path / "other").iterdir()}
    assert files == {"sharp_config.json"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
        again = peft.PeftModel.from_pretrained(tiny_llama(dropout=0.0), str(tmp_path / "saved"))
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    state = load_file(tmp_path / "run" / "checkpoint-2" / "sharp_state.safetensors")
    assert len(state) == 28 and all(name.startswith("added/") for name in state)


def test_merging_gives_the_model_without_the_auxiliary(tmp_path):
    model = llama()
    trainer = half_way(tmp_path, model, lambda: None)
    assert added(trainer).norm() > 0.1
    apart = logits(model.eval())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), apart, rtol=0, atol=1e-6)
    assert not any("forward" in vars(m) for m in merged.modules())


def test_a_reference_pass_inside_the_step_does_not_see_it(tmp_path):
    """As in preference optimisation: the model without its adapter, or with another one, inside the loss."""
    model, seen = llama(), []
    twin = llama()
    twin.eval()

    def loss(outputs, labels, num_items_in_batch=None):
        with torch.no_grad(), model.disable_adapter(), twin.disable_adapter():
            seen.append(torch.equal(logits(model), logits(twin)))
        return outputs.logits.float().square().mean()

    train(SharpTrainer, model, ROWS, tmp_path, method=METHOD, compute_loss_func=loss)
    assert seen == [True] * 5


# ---- other models, other settings


def drawn(model):
    """Its layers with auxiliaries of rank 3."""
    shapes = [(x, (3, x.down.in_features), (x.up.out_features, 3)) for x in linears(model)]
    kind = {"dtype": next(model.parameters()).dtype}
    return [
        Joined(x, nn.Parameter(torch.randn(*a, **kind)), nn.Parameter(torch.randn(*b, **kind))) for x, a, b in shapes
    ]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo of torch 2.13
def test_compiled_models_take_the_auxiliary_in_and_leave_it_out():
    model, batch = lora_mlp(), batch_of(mlp_rows(4))
    with seeded(3):
        layers = drawn(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)

    def gradients(function):
        model.zero_grad()
        function(**batch)["loss"].backward()
        found = [p.grad for layer in layers for p in (layer.a, layer.b) if p.grad is not None]
        found += [p.grad for p in model.parameters() if p.grad is not None]
        for layer in layers:
            layer.a.grad = layer.b.grad = None
        return found

    frames = []
    for _ in range(3):
        with joined(layers, Undo().region):
            inside, expected = gradients(compiled), gradients(model)
        outside, without = gradients(compiled), gradients(model)
        assert (len(inside), len(outside)) == (8, 4) and not torch.allclose(inside[-1], outside[-1])
        for ours, theirs in zip(inside + outside, expected + without, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3  # compiled once for each of the two


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(reentrant, tmp_path):
    ends = []
    for settings in ({}, {"activation_checkpointing": True}):
        model = llama()
        if settings:
            settings["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}
            model.enable_input_require_grads()
        trainer = train(SharpTrainer, model, ROWS, tmp_path, method=METHOD, learning_rate=1e-3, **settings)
        ends.append(torch.cat([trainables(model), added(trainer)]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)  # float32, other order of operations


@pytest.mark.parametrize("precise", [True, False], ids=["float32 adapters", "bf16 adapters"])
def test_16_bit_base_weights(precise, tmp_path):
    model = llama().to(torch.bfloat16)
    if precise:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    before = frozen(model)
    trainer = train(SharpTrainer, model, ROWS, tmp_path, method=METHOD, learning_rate=1e-2)
    assert torch.equal(frozen(model), before) and added(trainer).dtype == torch.float32
    assert added(trainer).norm() > 0.1 and torch.isfinite(trainables(model)).all()


def test_gpt2s_transposed_weights(tmp_path):
    with seeded(0):
        config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0)
        gpt = GPT2LMHeadModel(config)
    model = with_lora(gpt, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = train(SharpTrainer, model, ROWS, tmp_path, method=METHOD, learning_rate=1e-2)
    assert added(trainer).norm() > 0.1 and len(trainer._sharp_host.added) == 8


def test_biases_rank_stabilisation_and_a_head_beside_the_adapter(tmp_path):
    model = with_lora(
        tiny_bert(dropout=0.0), target_modules=["query", "value"], lora_bias=True, use_rslora=True,
        modules_to_save=["classifier"], task_type="SEQ_CLS",
    )  # fmt: skip
    model.accepts_loss_kwargs = False
    layers = linears(model)
    assert len(layers) == 4 and layers[0].scaling == pytest.approx(4 / 2**0.5)
    with seeded(3):
        pairs = drawn(model)
    batch = {"input_ids": BATCH["input_ids"]}
    with torch.no_grad(), joined(pairs, Undo().region):
        inside = model(**batch).logits
    for layer, a, b in pairs:  # the same, the auxiliary put into the base weights
        with torch.no_grad():
            layer.layer.get_base_layer().weight += layer.scaling * b @ a
    torch.testing.assert_close(model(**batch).logits, inside, rtol=1e-4, atol=1e-4)


def dora():
    return lora_llama(use_dora=True)


def embedding():
    return lora_llama(target_modules=["embed_tokens"])


def switched_off():
    model = llama()
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    return model


def adalora():
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
        return peft.get_peft_model(tiny_llama(), config)


KINDS = {dora: "a variant of LoRA", embedding: "is a Embedding", adalora: "of another kind .SVDLinear"}
KINDS |= {switched_off: "none that is active"}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", [METHOD, FlatLoRA(0.1)], ids=["bi_lora", "flat_lora"])
def test_other_kinds_of_adapters_are_refused_by_name(make, method, tmp_path):
    with pytest.raises(ValueError, match=KINDS[make]):
        build(SharpTrainer, make(), ROWS, tmp_path, method=method)


def test_another_adapter_in_the_middle_of_training_is_refused(tmp_path):
    model = llama()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="not those that training began with"):
        half_way(tmp_path, model, lambda: model.set_adapter("other"))


def test_the_note_at_the_start_names_the_auxiliary(tmp_path, capsys):
    train(SharpTrainer, lora_mlp(), mlp_rows(8), tmp_path, method=Every(2, METHOD), max_steps=1)
    assert "climbs in 2 layers with an auxiliary adapter of 75 entries" in capsys.readouterr().out


def test_bad_settings_are_refused():
    for settings in ({"rho": -1.0}, {"rho": float("nan")}, {"rank": 0}, {"rank": 2.0}):
        with pytest.raises(ValueError):
            bi_lora(**settings)
    assert bi_lora(rho=Constant(0.1)).rho == Constant(0.1)
