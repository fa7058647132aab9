"""Methods that look at outputs, on the models and losses where looking goes wrong most easily."""

import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMultipleChoice,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import family_outputs
from hf_sharp import Constant, Landscape, SharpConfig, SharpTrainer, make_sharp, mesa, msam, plain, saf, sam, tram
from hf_sharp._integrations.labels import shifts_labels
from hf_sharp._perturbation.noise import noisy_inputs
from hf_sharp._tensors.divergences import kl_sum, positions
from models import batch_of, causal_rows, mlp_rows, seeded, text_rows, tiny_bert, tiny_llama, tiny_mlp, windows_of
from references import functional, sgd, trajectory
from toy import ToyHost, opened
from training import build, train, weights

SIZES = {"vocab_size": 32, "d_model": 16}


def t5():
    shape = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0, **SIZES}
    with seeded(0):
        return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **shape))


def bart():
    shape = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    shape |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "dropout": 0.0}
    with seeded(0):
        return BartForConditionalGeneration(BartConfig(init_std=0.3, **shape, **SIZES))


def gpt2():
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with seeded(0):
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2, **off))


def radii(trainer):
    return [line["sharp_radius"] for line in trainer.state.log_history if "sharp_radius" in line]


@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
def test_noise_reaches_encoder_decoders(make, tmp_path):
    for sigma, moved in ((0.0, False), (1.0, True)):
        settings = {"method": tram("noise", sigma=sigma), "max_steps": 2, "learning_rate": 1e-3}
        trainer = train(SharpTrainer, make(), causal_rows(8, tokens=6), tmp_path, **settings)
        assert (min(radii(trainer)) > 1e-6) == moved  # kernels with and without gradients round differently
    fisher = []
    for sigma in (0.0, 1.0):
        settings = {"method": tram("fisher", sigma=sigma), "max_steps": 2}
        fisher.append(weights(train(SharpTrainer, make(), causal_rows(8, tokens=6), tmp_path, **settings)))
    assert not torch.equal(*fisher)


def test_noise_that_reaches_nothing_is_an_error(tmp_path):
    model = tiny_llama(dropout=0.0)
    rows = [
        {"inputs_embeds": model.get_input_embeddings()(row["input_ids"]).detach(), "labels": row["labels"]}
        for row in causal_rows(8)
    ]
    with pytest.raises(ValueError, match="reached nothing"):
        train(SharpTrainer, model, rows, tmp_path, method=tram("noise"))


def test_several_embedded_rows_a_sample_have_their_own_noise(tmp_path):
    runs = []
    rows = [{"input_ids": r["input_ids"].expand(3, -1).contiguous(), "labels": r["labels"]} for r in text_rows(16)]
    for micro, accumulate in ((4, 1), (2, 2), (1, 4)):
        with seeded(0):
            model = BertForMultipleChoice(tiny_bert(dropout=0.0).config).double()
        model.accepts_loss_kwargs = False
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "max_steps": 3}
        sizes["optim"] = "sgd"
        runs.append(weights(train(SharpTrainer, model, rows, tmp_path, method=tram("noise", sigma=0.5), **sizes)))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_ranks_draws_the_noise_of_its_own_rows(rank, monkeypatch):
    """Rows 0, 1 and 4, 5 of a window of two micro-batches are on rank 0, rows 2, 3 and 6, 7 on rank 1."""

    def noisy(window):
        model, seen = tiny_mlp(), []
        landscape, _ = opened(model, window)
        landscape.evaluate()
        model.hidden.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        with noisy_inputs(landscape, 0.5):
            landscape.evaluate()
        return torch.cat(seen)

    rows = mlp_rows(1) * 8  # all alike, so that the noise alone tells them apart
    whole = noisy([batch_of(rows[:4])] * 2)
    monkeypatch.setattr(ToyHost, "rank", rank)
    monkeypatch.setattr(ToyHost, "ranks", 2)
    assert torch.equal(noisy([batch_of(rows[:2])] * 2), whole[[2 * rank, 2 * rank + 1, 2 * rank + 4, 2 * rank + 5]])
    assert len({tuple(row.tolist()) for row in whole}) == 8


def test_which_labels_are_shifted():
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = RobertaConfig(intermediate_size=32, **shape)
    both = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(tiny, tiny))
    assert shifts_labels(tiny_llama()) and shifts_labels(gpt2())
    sharded = gpt2()
    sharded.__class__ = type("FSDPGPT2LMHeadModel", (type(sharded),), {})  # as FSDP2 does it
    assert shifts_labels(sharded)
    assert not any(shifts_labels(model) for model in (t5(), bart(), both, tiny_bert(), tiny_mlp()))


def test_the_radius_of_gpt2_is_that_of_its_shifted_labels(tmp_path):
    rows, model = causal_rows(8, ragged=True), gpt2()
    settings = {"method": tram("noise", sigma=0.5), "max_steps": 1, "learning_rate": 0.0}
    [radius] = radii(train(SharpTrainer, model, rows, tmp_path, **settings))
    reference = build(SharpTrainer, gpt2(), rows, tmp_path, **settings)
    batch = batch_of(rows[:4])
    landscape = Landscape(reference._sharp_host, [batch])
    with noisy_inputs(landscape, 0.5), torch.no_grad():
        noisy = reference.model.train()(**batch).logits
    with torch.no_grad():
        clean = reference.model(**batch).logits
    marks = batch["labels"][:, 1:] != -100
    p, q = (F.log_softmax(x[:, :-1].double(), -1)[marks] for x in (noisy, clean))
    assert radius == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_prompt_tuning_looks_at_the_labels_positions(tmp_path):
    peft = pytest.importorskip("peft")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21.2
    warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    logits = torch.randn(2, 11, 5)
    labels = torch.randint(5, (2, 8))
    short = kl_sum({"logits": logits[:, 3:] * 2}, {"logits": logits[:, 3:]}, {"labels": labels}, True)
    assert torch.equal(kl_sum({"logits": logits * 2}, {"logits": logits}, {"labels": labels}, True), short)
    model = peft.get_peft_model(tiny_llama(dropout=0.0), config)
    trainer = train(SharpTrainer, model, causal_rows(8), tmp_path, method=tram("previous"), max_steps=2)
    assert len(radii(trainer)) == 2


def test_what_is_no_distribution_over_the_labels_is_refused(tmp_path):
    rows = [{**row, "labels": row["labels"].float()} for row in text_rows(8)]
    for method in (tram("previous"), mesa()):
        with pytest.raises(ValueError, match="two classes or more"):
            train(SharpTrainer, tiny_bert(classes=1), rows, tmp_path, method=method)
    maps, labels = torch.randn(2, 4, 6, 6), torch.zeros(2, 6, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="do not belong"):
        kl_sum({"logits": maps}, {"logits": maps}, {"labels": labels}, False)


def test_impossible_classes_add_nothing():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    other = torch.tensor([[2.0, 1.0, -torch.inf]])
    whole = kl_sum({"logits": other}, {"logits": logits}, {"labels": torch.zeros(1)}, False)
    assert whole == pytest.approx(float(kl_sum({"logits": other[:, :2]}, {"logits": logits[:, :2]}, {}, False)))
    logits.requires_grad_(True)
    kl_sum({"logits": other}, {"logits": logits}, {}, False).backward()
    assert torch.isfinite(logits.grad).all()
    assert positions({"labels": torch.tensor([[1, -100, 2]])}, shifted=True) == 1


# ---- losses of the user's own ------------------------------------------------------------------------------------


def test_a_loss_that_keeps_something_from_the_model(tmp_path):
    """`look` calls the model with what the model was called with, not with what `compute_loss` was given."""

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weight = inputs.pop("weight")
            outputs = model(**inputs)
            loss = (F.cross_entropy(outputs["logits"], inputs["labels"], reduction="none") * weight).mean()
            return (loss, outputs) if return_outputs else loss

    rows = [{**row, "weight": torch.tensor(0.5)} for row in mlp_rows(24)]
    for method in (tram("noise"), tram("previous"), mesa()):
        settings = {"method": method, "remove_unused_columns": False, "max_steps": 2}
        trainer = train(make_sharp(Weighted), tiny_mlp(), rows, tmp_path, **settings)
        assert trainer.state.global_step == 2


def test_a_loss_without_return_outputs_is_named(tmp_path):
    class Bare(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None):
            return model(**inputs)["loss"]

    with pytest.raises(ValueError, match="return_outputs"):
        train(make_sharp(Bare), tiny_mlp(), mlp_rows(8), tmp_path, method=mesa())
    train(make_sharp(Bare), tiny_mlp(), mlp_rows(8), tmp_path, method=sam(), max_steps=1)


def test_compiled_models_measure_the_same(tmp_path):
    runs = {}
    for compiled in (False, True):
        settings = {
            "max_steps": 2,
            "optim": "sgd",
            "torch_compile": compiled,
            "torch_compile_backend": "eager" if compiled else None,
        }
        for name, method in (
            ("fisher", tram("fisher", sigma=3.0, rho=1.0, eta=100.0)),
            ("noise", tram("noise", sigma=1.0)),
        ):
            runs[compiled, name] = weights(
                train(SharpTrainer, tiny_llama(dropout=0.0), causal_rows(8), tmp_path, method=method, **settings)
            )
    for name in ("fisher", "noise"):
        torch.testing.assert_close(runs[True, name], runs[False, name], rtol=0, atol=1e-5)  # float32
    settings = {"method": tram("fisher", sigma=0.0, rho=1.0, eta=100.0), "max_steps": 2, "optim": "sgd"}
    clean = train(SharpTrainer, tiny_llama(dropout=0.0), causal_rows(8), tmp_path, **settings)
    assert (weights(clean) - runs[True, "fisher"]).abs().max() > 1e-4


# ---- memory and settings ----------------------------------------------------------------------------------------


def test_mesas_teacher_moves_in_bf16_weights(tmp_path):
    model = tiny_bert(dropout=0.0).bfloat16()
    model.accepts_loss_kwargs = False
    trainer = train(SharpTrainer, model, text_rows(24), tmp_path, method=mesa(decay=0.999), learning_rate=1e-3)
    teacher = trainer.method._state["teacher"]
    assert all(t.dtype == torch.float32 for t in teacher.values())
    assert sum(int((t != t.bfloat16().float()).sum()) for t in teacher.values()) > 100


@pytest.mark.parametrize("times", [{"start": 0.5}, {"interval": 3}])
def test_mesas_average_is_taken_at_every_step_and_its_term_when_it_is_due(times, tmp_path):
    """Du et al.'s program: the average moves from the first step on, the divergence is added later."""

    def rule(grad_fn, w, layout, state, step, **settings):
        g = family_outputs.mesa(grad_fn, w, layout, state, step, **settings)
        due = step >= 3 if "start" in times else step % 3 == 0
        return g if due else grad_fn(w)

    rows, model, kept = mlp_rows(24), tiny_mlp(), {}
    w0, layout, loss_fn = functional(model)
    options = {"lam": 2.0, "decay": 0.7, "temperature": 2.0}
    sgd_of = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = train(SharpTrainer, model, rows, tmp_path, method=mesa(**options, **times), max_steps=6, **sgd_of)
    logits_fn = family_outputs.mlp_logits({n: p.shape for n, p in model.named_parameters()})
    path = trajectory(
        rule,
        loss_fn,
        w0,
        windows_of(rows, 4, 1),
        sgd(0.1),
        6,
        layout=layout,
        state=kept,
        logits_fn=logits_fn,
        **options,
    )
    torch.testing.assert_close(weights(trainer), path[-1], rtol=0, atol=1e-12)
    teacher = [part._state["teacher"] for _, part in trainer.method.named_parts() if "teacher" in part._state]
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in teacher[0].values()]), kept["teacher"])


def test_the_first_weights_are_those_of_the_start_of_training(tmp_path):
    model = tiny_mlp(seed=1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(SharpTrainer, model, mlp_rows(40), tmp_path, method=tram("pretrained", start=0.5))
    kept = trainer.method.method.reference._state["weights"]
    assert all(torch.equal(kept[name], start[name]) for name in start)


def test_a_schedule_can_be_switched_off():
    config = SharpConfig(method="msam", rho=0.5, rho_schedule="constant")
    assert config.build() == msam(Constant(0.5))
    with pytest.raises(ValueError, match="at most rho"):
        SharpConfig(method="gsam", rho=0.01, rho_min=0.05).build()
    assert SharpConfig(method="gsam", rho=0.006).build().perturbation.rho.rho_min == pytest.approx(0.001)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"reference": "previous", "rho": 5.0}, "rho"),
        ({"reference": "previous", "sigma": 0.5}, "sigma"),
        ({"reference": "fisher", "kl": "reverse"}, "kl"),
        ({"reference": "fisher", "scale": 5.0}, "scale"),
    ],
)
def test_options_that_would_do_nothing_are_refused(settings, name):
    with pytest.raises(ValueError, match=f"does not use {name}"):
        tram(**settings)


def test_only_methods_that_know_samples_take_their_numbers(tmp_path):
    class Numbered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = tiny_mlp(), []

        def forward(self, x, sample_index, labels=None):
            self.seen.append(sample_index)
            return self.inner(x, labels)

    rows = [{**row, "sample_index": torch.tensor(i)} for i, row in enumerate(mlp_rows(8))]
    for method in (plain(), sam()):
        model = Numbered()
        train(SharpTrainer, model, rows, tmp_path, method=method, max_steps=1)
        assert model.seen


def test_saf_refuses_a_vocabulary_and_rows_without_numbers(tmp_path):
    numbered = [{**row, "sample_index": torch.tensor(i)} for i, row in enumerate(causal_rows(8))]
    with pytest.raises(ValueError, match="Use MESA"):
        train(SharpTrainer, tiny_llama(), numbered, tmp_path, method=saf())
    with pytest.raises(ValueError, match="add_column"):
        train(SharpTrainer, tiny_mlp(), mlp_rows(8), tmp_path, method=saf())
