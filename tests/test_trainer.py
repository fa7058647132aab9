"""SharpTrainer: everything a Trainer does still works, and what it writes says how the gradient was got."""

import json
import pickle
from dataclasses import dataclass

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import BatchEncoding, EarlyStoppingCallback, Seq2SeqTrainer, Trainer, TrainerCallback

from hf_sharp import (
    SAM,
    ByName,
    FirstPass,
    Method,
    Perturbation,
    SharpSeq2SeqTrainer,
    SharpTrainer,
    fsam,
    looksam,
    make_sharp,
    mesa,
    sam,
    sam_on,
    tram,
)
from models import (
    batch_of,
    causal_rows,
    image_rows,
    mean_bert,
    mlp_rows,
    text_rows,
    tiny_bert,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    windows_of,
)
from references import functional, window_gradient
from training import Recorder, Tripwire, build, exact_logs, train, weights


def hand_sam(model, batches, rho, lr, steps):
    """Textbook SAM with SGD, one micro-batch a step, the dropout of the first pass repeated."""
    for batch in batches[:steps]:
        stream = torch.get_rng_state()
        model(**batch)["loss"].backward()
        old = [p.detach().clone() for p in model.parameters()]
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(rho * p.grad / norm)
        model.zero_grad()
        after = torch.get_rng_state()
        torch.set_rng_state(stream)
        model(**batch)["loss"].backward()
        torch.set_rng_state(after)
        with torch.no_grad():
            for p, o in zip(model.parameters(), old, strict=True):
                p.copy_(o - lr * p.grad)
        model.zero_grad()


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_real_models_agree_with_a_textbook_loop_with_dropout(kind, tmp_path):
    make, rows = {
        "bert": (lambda: tiny_bert(dropout=0.1, float64=True), text_rows(20)),
        "vit": (lambda: tiny_vit(dropout=0.1, float64=True), image_rows(20, float64=True)),
    }[kind]
    ours, theirs = make(), make().train()
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3, "seed": 11}
    trainer = build(SharpTrainer, ours, rows, tmp_path, method=sam(0.1), **settings)
    ours.accepts_loss_kwargs = False
    start = []
    trainer.add_callback(StreamAtFirstStep(start))
    trainer.train()
    torch.set_rng_state(start[0])
    hand_sam(theirs, [window[0] for window in windows_of(rows, 4, 1)], rho=0.1, lr=0.05, steps=3)
    expected = torch.cat([p.detach().reshape(-1) for p in theirs.parameters()])
    torch.testing.assert_close(weights(trainer), expected, rtol=0, atol=1e-11)


class StreamAtFirstStep(TrainerCallback):
    def __init__(self, kept):
        self.kept = kept

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.kept:
            self.kept.append(torch.get_rng_state())


@pytest.mark.fast
def test_a_causal_lm_with_token_counts_agrees_across_windows(tmp_path):
    runs = []
    for micro, accumulate in ((8, 1), (2, 4)):
        model = tiny_llama(dropout=0.0, float64=True)
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "optim": "sgd"}
        trainer = train(SharpTrainer, model, causal_rows(40, ragged=True), tmp_path, method=sam(0.1), **sizes)
        runs.append((weights(trainer), [line["loss"] for line in trainer.state.log_history if "loss" in line]))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=1e-7)  # its loss and norms are float32
    numpy.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
    ],
    ids=["label smoothing", "NEFTune", "checkpointing", "reentrant checkpointing", "bf16"],
)
def test_a_trainers_options_keep_working(settings, tmp_path):
    pair = []
    for cls, options in ((Trainer, {}), (SharpTrainer, {"method": sam(0.0)})):
        trainer = train(
            cls, mean_bert(), text_rows(40), tmp_path, gradient_accumulation_steps=2, **settings, **options
        )
        pair.append((weights(trainer), exact_logs(trainer)))
    assert torch.equal(pair[0][0], pair[1][0]) and pair[0][1] == pair[1][1]
    moved = train(SharpTrainer, mean_bert(), text_rows(40), tmp_path, method=sam(0.2), **settings)
    gaps = [line["sharp_gap"] for line in moved.state.log_history if "sharp_gap" in line]
    assert len(gaps) == 5 and max(gaps) > 0 and not torch.equal(weights(moved), pair[0][0])


def test_checkpointed_sam_on_asks_for_a_subset_where_it_can_and_says_where_it_cannot(tmp_path):
    plain = train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=sam_on(0.1))
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    torch.testing.assert_close(
        weights(train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=sam_on(0.1), **settings)),
        weights(plain),
    )
    settings["activation_checkpointing_kwargs"] = {"use_reentrant": True}
    with pytest.warns(UserWarning, match="reentrant gradient checkpointing needs the full backward"):
        trainer = train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=sam_on(0.1), **settings)
    torch.testing.assert_close(weights(trainer), weights(plain))


def test_a_custom_loss_function_is_used_in_every_pass(tmp_path):
    calls = []

    def focal(outputs, labels, num_items_in_batch=None):
        calls.append(1)
        logp = torch.log_softmax(outputs["logits"], -1).gather(1, labels[:, None])
        return -((1 - logp.exp()) ** 2 * logp).mean()

    train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method="sam", compute_loss_func=focal)
    assert len(calls) == 10


def test_compiled_models_give_the_same_weights_without_recompiling(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = mean_bert()
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    compiled = train(SharpTrainer, model, text_rows(20), tmp_path, method=sam(0.1), **settings)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(Trainer, mean_bert(), text_rows(20), tmp_path, **settings)
    assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    eager = train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=sam(0.1), max_steps=3)
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-3, atol=2e-3)


def test_auto_find_batch_size_goes_on_after_running_out_of_memory_in_the_second_pass(tmp_path):
    model = mean_bert()
    start = [p.detach().clone() for p in model.parameters()]
    wire = Tripwire(model, at=2, error=RuntimeError("CUDA out of memory. Tried to allocate"))
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            seen.append(all(torch.equal(p, o) for p, o in zip(model.parameters(), start, strict=True)))
            seen.append(all(p.grad is None for p in model.parameters()))

    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": 2}
    trainer = train(SharpTrainer, model, text_rows(40), tmp_path, method=fsam(0.1), callbacks=[Look()], **settings)
    assert seen == [True] * 4 and trainer._train_batch_size < 8 and trainer.state.global_step == 2
    assert wire.count == 2 + 4


def test_a_second_training_starts_the_method_afresh(tmp_path):
    method = fsam(0.1, every=100)
    trainer = train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=method)
    first = {k: v for k, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
    trainer.train()
    second = method.state_dict()
    assert second["perturbation.mask:refreshed"] == 0 and first.keys() <= second.keys()
    assert any(not torch.equal(first[k], second[k]) for k in first)


@pytest.mark.fast
def test_direct_calls_of_training_step_are_windows_of_one(tmp_path):
    trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method=sam(0.1), gradient_accumulation_steps=2)
    model, batch = trainer.model, batch_of(mlp_rows(4))
    wire = Tripwire(model)
    trainer.current_gradient_accumulation_steps = 1
    for _ in range(2):
        model.zero_grad()
        before = weights(trainer)
        loss = trainer.training_step(model, dict(batch))
        assert torch.equal(weights(trainer), before) and model.head.weight.grad is not None and loss.ndim == 0
    assert wire.count == 4


def test_direct_calls_add_to_the_gradients_that_are_there(tmp_path):
    sums = []
    for cls, options in ((Trainer, {}), (SharpTrainer, {"method": sam(0.0)})):
        trainer = train(cls, tiny_mlp(), mlp_rows(20), tmp_path, **options)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.zero_grad()
        for seed in (1, 2):
            trainer.training_step(trainer.model, batch_of(mlp_rows(4, seed=seed)))
        sums.append(torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()]))
    assert torch.equal(*sums)


def test_a_training_step_above_ours_may_make_new_batches(tmp_path):
    class Own(SharpTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, dict(inputs), num_items_in_batch)

    for method in (sam(0.0), sam(0.1)):
        pair = [
            train(cls, mean_bert(), text_rows(64), tmp_path, method=method, gradient_accumulation_steps=3)
            for cls in (SharpTrainer, Own)
        ]
        assert torch.equal(weights(pair[0]), weights(pair[1]))


def test_a_frozen_parameter_in_the_optimizer_is_left_alone(tmp_path):
    for method in (sam(0.1), sam_on(0.1), fsam(0.1)):
        model = tiny_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.norm.bias.requires_grad_(False)
        frozen = model.norm.bias.clone()
        trainer = train(SharpTrainer, model, mlp_rows(20), tmp_path, method=method, optimizers=(optimizer, None))
        assert torch.equal(model.norm.bias, frozen) and "of 6 trainable tensors" in trainer.describe_method()


@pytest.mark.fast
def test_schedules_see_the_trainers_facts(tmp_path):
    seen = []

    def rho(landscape):
        facts = landscape.lr, landscape.lr_max, landscape.step, landscape.total_steps, landscape.warmup_steps
        seen.append(facts)
        return 0.1

    settings = {"max_steps": 4, "warmup_steps": 2, "learning_rate": 0.4}
    train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method=SAM(Perturbation(rho)), **settings)
    assert seen == [(0.0, 0.4, 0, 4, 2), (0.2, 0.4, 1, 4, 2), (0.4, 0.4, 2, 4, 2), (0.2, 0.4, 3, 4, 2)]


@pytest.mark.fast
@pytest.mark.parametrize("lr", [0.4, 0.01])
def test_the_largest_learning_rate_is_that_of_an_optimizer_of_ones_own(lr, tmp_path):
    """Not that of the arguments, which such an optimizer does not follow; larger or smaller."""
    seen, model = [], tiny_mlp()

    def rho(landscape):
        seen.append((landscape.lr, landscape.lr_max))
        return 0.1

    settings = {"optimizers": (torch.optim.SGD(model.parameters(), lr=lr), None), "learning_rate": 0.05}
    train(SharpTrainer, model, mlp_rows(20), tmp_path, method=SAM(Perturbation(rho)), max_steps=4, **settings)
    assert seen == [(pytest.approx(lr * share), lr) for share in (1, 0.75, 0.5, 0.25)]


def test_a_window_that_the_data_cut_short_leaves_the_next_epoch_whole(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from mlp_rows(12)

    trainer = train(
        SharpTrainer, tiny_mlp(), Stream(), tmp_path, method=sam(0.1), gradient_accumulation_steps=2, max_steps=4
    )
    assert trainer.state.global_step == 4 and torch.isfinite(weights(trainer)).all()


@pytest.mark.fast
def test_early_stopping_and_the_best_model(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "max_steps": 20,
        "learning_rate": 0.5,
    }
    trainer = train(
        SharpTrainer,
        mean_bert(),
        text_rows(40),
        tmp_path,
        method="fsam",
        eval_dataset=text_rows(12, seed=5),
        callbacks=[EarlyStoppingCallback(2)],
        **settings,
    )
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert trainer.state.global_step < 20
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{min(losses, key=losses.get)}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)


def test_hyperparameter_search_starts_every_trial_afresh(tmp_path):
    made = []

    def fresh(trial=None):
        made.append(tiny_mlp(seed=2))
        return made[-1]

    method = fsam(0.1, every=100)
    trainer = build(SharpTrainer, None, mlp_rows(20), tmp_path, method=method, model_init=fresh)
    results = []
    for _ in range(2):  # what a search backend does for every trial
        trainer._hp_search_setup({"learning_rate": 0.05})
        trainer.train(trial=None)
        results.append((weights(trainer), method.state_dict()))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1].keys() == results[1][1].keys()


# ---- what is written


@pytest.mark.fast
def test_checkpoints_hold_the_method_its_settings_and_no_pickle_of_ours(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = train(
        SharpTrainer, mean_bert(), text_rows(20), tmp_path, method={"method": "fsam", "every": 3}, **settings
    )
    checkpoint = tmp_path / "checkpoint-4"
    record = json.loads((checkpoint / "sharp_config.json").read_text())
    assert record["repr"] == repr(trainer.method) and record["rounding"] == "stochastic"
    assert {"method": "fsam", "every": 3, "keep": 0.1}.items() <= record["settings"].items()
    masks = load_file(checkpoint / "sharp_state.safetensors")
    assert masks and all(m.dtype == torch.bool for m in masks.values())
    size = (checkpoint / "sharp_state.safetensors").stat().st_size
    eligible = sum(p.numel() for n, p in trainer.model.named_parameters() if "bias" not in n and "embed" not in n)
    assert size < eligible + 20_000  # one byte an entry
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "sharp_config.json").is_file()
    assert not (tmp_path / "final" / "sharp_state.safetensors").exists()
    plain = train(SharpTrainer, mean_bert(), text_rows(20), tmp_path / "plain", max_steps=1)
    plain.save_model(tmp_path / "final")
    assert not (tmp_path / "final" / "sharp_config.json").exists()  # it would speak of another training


def test_a_checkpoint_whose_state_is_gone_or_broken_is_named(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=fsam(0.1), **settings)
    state = tmp_path / "checkpoint-2" / "sharp_state.safetensors"
    state.write_bytes(state.read_bytes()[:50])
    trainer = build(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=fsam(0.1), **settings)
    with pytest.raises(ValueError, match=r"sharp_state.safetensors cannot be read"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state.unlink()
    with pytest.warns(UserWarning, match="starts afresh"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_method_without_state_adds_no_state_file(tmp_path):
    train(
        SharpTrainer,
        mean_bert(),
        text_rows(20),
        tmp_path,
        method="sam",
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
    )
    assert not (tmp_path / "checkpoint-2" / "sharp_state.safetensors").exists()


def test_resuming_with_another_method_warns_and_names_both(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=sam(0.1), **settings)
    trainer = build(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=sam(0.2), **settings)
    with pytest.warns(UserWarning, match=r"rho=0.1.*rho=0.2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_with_another_rounding_warns(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "method": sam(0.1)}
    train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, rounding="nearest", **settings)
    trainer = build(SharpTrainer, mean_bert(), text_rows(20), tmp_path, **settings)
    with pytest.warns(UserWarning, match=r"trained with rounding=nearest, and goes on with rounding=stochastic"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_state_of_another_method_is_refused_on_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=fsam(0.1), **settings)
    trainer = build(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method=sam(0.1), **settings)
    with (
        pytest.warns(UserWarning, match="goes on with"),
        pytest.raises(ValueError, match=r"has no part 'perturbation\.mask'"),
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.fast
def test_trackers_see_the_method_when_training_begins_and_the_arguments_stay_picklable(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(json.loads(args.to_json_string()))

    trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method="sam", callbacks=[Tracker()])
    assert seen[0]["sharp_method"] == "sam" and seen[0]["sharp_rho"] == 0.05
    assert "to_dict" not in vars(trainer.args) and pickle.loads(pickle.dumps(trainer.args)).seed == trainer.args.seed


def test_the_model_card_names_the_method(tmp_path):
    trainer = train(SharpTrainer, mean_bert(), text_rows(20), tmp_path, method="sam")
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "- sharpness-aware" in text and repr(trainer.method) in text and "2 passes a step" in text


@pytest.mark.fast
def test_the_start_says_once_what_is_moved(tmp_path, capsys):
    trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method=sam_on(0.3))
    trainer.train()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hf_sharp:")]
    assert notes == [trainer.describe_method()]
    assert "2 of 7 trainable tensors (16 of " in notes[0] and "rho=0.3" in notes[0] and "2 passes" in notes[0]
    sparse = build(SharpTrainer, tiny_mlp(), mlp_rows(4), tmp_path, method=fsam(0.1, keep=0.1)).describe_method()
    eligible, whole = 48 + 8 + 24, 66 + 8 + 8 + 3
    assert f"({round(0.1 * eligible + whole)} of {eligible + whole} entries" in sparse


@pytest.mark.fast
def test_flos_count_the_passes(tmp_path):
    flos = {}

    def collate(rows):  # what DataCollatorWithPadding returns is no dict
        return BatchEncoding({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

    rowwise = {"method": "fsam", "fisher": "per_sample", "samples": 4, "every": 100}
    for name, method in {None: None, "plain": "plain", "sam": "sam", "rows": rowwise}.items():
        settings = {"gradient_accumulation_steps": 2, "data_collator": collate}
        flos[name] = train(
            SharpTrainer, mean_bert(), text_rows(40), tmp_path, method=method, **settings
        ).state.total_flos
    assert flos["sam"] == 2 * flos["plain"] == 2 * flos[None] > 0
    assert flos["rows"] - flos["sam"] == pytest.approx(flos[None] / 5 / 2)  # 4 of the 8 rows of one of 5 steps


@dataclass(frozen=True)
class Onlooker(Method):
    """Plain training that asks for the outputs of the window once more, without gradients."""

    cost = 1 + 1 / 3

    def gradient(self, landscape):
        here = landscape.evaluate()
        landscape.forward(lambda outputs, batch: outputs["logits"].sum())
        return here


@pytest.mark.parametrize("method", [Onlooker(), tram("previous"), mesa()], ids=lambda method: type(method).__name__)
def test_a_forward_without_a_backward_is_a_third_of_a_pass(method, tmp_path):
    """One of three: a backward takes about two forwards. As a verb of its own, and within a pass."""
    flos = []
    for one in (None, method):
        settings = {"method": one, "gradient_accumulation_steps": 2}
        flos.append(train(SharpTrainer, mean_bert(), text_rows(40), tmp_path, **settings).state.total_flos)
    assert flos[1] / flos[0] == pytest.approx(method.cost, rel=1e-9) and flos[0] > 0
    assert method.cost % 1 == pytest.approx(1 / 3)


# ---- logs


@pytest.mark.parametrize("settings", [{"logging_steps": 2}, {"logging_steps": 3, "logging_first_step": True}])
def test_metrics_are_in_every_line_with_a_loss(settings, tmp_path):
    trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(40), tmp_path, method=sam(0.1), max_steps=7, **settings)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    names = {"sharp_gap", "sharp_cos", "sharp_kappa", "sharp_component", "sharp_noise", "sharp_evaluations"}
    assert len(lines) >= 3 and all(names <= line.keys() for line in lines)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("method", [sam(0.1, interval=4), looksam(0.1, every=4)])
def test_lines_tell_of_the_last_step_that_looked_around(method, strategy, tmp_path):
    settings = {"logging_strategy": strategy, "logging_steps": 4, "max_steps": 8}
    trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(16), tmp_path, method=method, **settings)  # 4 steps an epoch
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8]  # the sharp steps are the first and the fifth
    assert all(line["sharp_gap"] > 0 and line["sharp_evaluations"] == 1.25 for line in lines)


def test_metrics_are_logged_with_the_epoch_strategy(tmp_path):
    settings = {"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}
    trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method=sam(0.1), **settings)
    assert len([line for line in trainer.state.log_history if "sharp_gap" in line]) == 2


@dataclass(frozen=True)
class Growing(Method):
    """Makes one evaluation in step 0, two in step 1, ...: `sharp_evaluations` tells which steps were measured."""

    period: int = 1
    cost = 1.0

    def gradient(self, landscape):
        here = landscape.evaluate()
        for _ in range(landscape.facts.step):
            landscape.evaluate()
        return here


@pytest.mark.parametrize(
    "period, settings, expected",
    [
        # 5 batches an epoch, in windows of 2: 3 steps an epoch. Logged at the ends of epochs, and where training ends.
        (1, {"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}, {3: 3.0, 6: 6.0}),
        (1, {"logging_strategy": "epoch", "max_steps": 5}, {3: 3.0, 5: 5.0}),
        (1, {"logging_strategy": "epoch", "max_steps": 2}, {2: 2.0}),
        (2, {"logging_strategy": "epoch", "max_steps": 5}, {3: 2.5, 5: 4.5}),
        (1, {"logging_steps": 3, "max_steps": 7}, {3: 3.0, 6: 6.0}),
        (2, {"logging_steps": 3, "max_steps": 7}, {3: 2.5, 6: 5.5}),
        (1, {"logging_steps": 3, "logging_first_step": True, "max_steps": 6}, {1: 1.0, 3: 3.0, 6: 6.0}),
    ],
)
def test_the_steps_before_a_line_are_measured_as_many_as_the_period_has(period, settings, expected, tmp_path):
    """Each line tells the mean of these and of no other: neither of steps between, nor of what a line before told."""
    settings = {"method": Growing(period), "gradient_accumulation_steps": 2, **settings}
    trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, **settings)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert {line["step"]: line.get("sharp_evaluations") for line in lines} == expected


def test_bf16_weights_that_swallow_the_shift_are_named_once(tmp_path):
    model = tiny_bert(dropout=0.0).bfloat16()
    model.accepts_loss_kwargs = False
    with pytest.warns(UserWarning, match="rounds away in weights of") as warned:
        trainer = train(SharpTrainer, model, text_rows(20), tmp_path, method=sam(0.001))
    lines = [line for line in trainer.state.log_history if "sharp_component" in line]
    lost = [line for line in lines if abs(line["sharp_component"] - 1) > 0.25 or line["sharp_noise"] > 2]
    assert len(lines) == 5 and len(lost) > 1
    assert len([w for w in warned if "rounds away" in str(w.message)]) == 1


# ---- classes and refusals


def test_other_trainers_become_sharp():
    assert issubclass(SharpSeq2SeqTrainer, Seq2SeqTrainer) and make_sharp(SharpTrainer) is SharpTrainer

    class Own(Trainer):
        pass

    sharp = make_sharp(Own)
    assert sharp is make_sharp(Own) and issubclass(sharp, Own) and sharp.__name__ == "SharpOwn"


@pytest.mark.fast
def test_a_subclass_with_its_own_training_step_is_called_in_every_pass(tmp_path):
    calls = []

    class Own(Trainer):
        def training_step(self, *args, **kwargs):
            calls.append(1)
            return super().training_step(*args, **kwargs)

    trainer = train(make_sharp(Own), tiny_mlp(), mlp_rows(20), tmp_path, method="sam")
    assert len(calls) == 10 and trainer.state.global_step == 5


@pytest.mark.fast
def test_the_other_losses_and_forms_of_method(tmp_path):
    for form in (SAM(Perturbation(0.1, mask=ByName("head"))), {"method": "asam", "rho": 0.2}, "fisher_sam", None):
        trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method=form)
        assert (trainer.method is None) == (form is None) and (form is None or isinstance(trainer.method, Method))


@pytest.mark.fast
def test_a_mask_that_is_empty_for_the_model_is_refused_at_construction(tmp_path):
    with pytest.raises(ValueError, match="selects none of the 7 trainable parameters"):
        build(SharpTrainer, tiny_mlp(), mlp_rows(4), tmp_path, method=SAM(Perturbation(0.1, mask=ByName("nobody"))))


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no trainable parameter"):
        build(SharpTrainer, tiny_mlp().requires_grad_(False), mlp_rows(4), tmp_path, method="sam")


@pytest.mark.parametrize(
    "what, value, words",
    [
        ("is_deepspeed_enabled", True, "DeepSpeed makes its optimizer step inside"),
        ("is_fsdp_enabled", True, "Use FSDP2: fsdp_version: 2"),
    ],
)
def test_hosts_that_cannot_repeat_a_pass_are_refused_by_name(what, value, words, tmp_path):
    from hf_sharp._integrations.refusals import refuse

    trainer = build(Trainer, tiny_mlp(), mlp_rows(4), tmp_path)
    setattr(trainer, what, value)
    with pytest.raises(ValueError, match=words):
        refuse(trainer, sam())


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_the_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"'{optim}' steps inside the backward"):
        build(SharpTrainer, tiny_mlp(), mlp_rows(4), tmp_path, method="sam", optim=optim)
    assert build(SharpTrainer, tiny_mlp(), mlp_rows(4), tmp_path, method=None, optim=optim).method is None


def test_trainers_that_generate_their_data_are_refused(tmp_path):
    class GRPOTrainer(Trainer):
        pass

    with pytest.raises(ValueError, match="GRPOTrainer generates its data"):
        build(make_sharp(GRPOTrainer), tiny_mlp(), mlp_rows(4), tmp_path, method="sam")


@pytest.mark.fast
def test_the_gradient_is_the_trainers_to_clip(tmp_path):
    norms = []

    def look(state, model, **_):
        norms.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item())

    trainer = train(
        SharpTrainer,
        tiny_mlp(),
        mlp_rows(40),
        tmp_path,
        method=sam(0.1),
        max_grad_norm=0.01,
        callbacks=[Recorder(before=look)],
    )
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert norms == pytest.approx([0.01] * 5, rel=1e-3) and min(logged) > 0.01


# ---- methods to come: a first shift known before the data


@dataclass(frozen=True)
class CheapAscent(Method):
    """SAM whose ascent gradient is that of a part of the window: it opens at the shifted weights."""

    perturbation: Perturbation
    fraction: float

    @property
    def cost(self):
        return 1 + self.fraction

    def plan_first_pass(self, landscape):
        part = landscape.evaluate(fraction=self.fraction)
        return FirstPass(shift=self.perturbation(part.donate(), landscape))

    def gradient(self, landscape):
        return landscape.evaluate()


@pytest.mark.parametrize("micro, accumulate", [(4, 4), (8, 1)])
def test_a_method_that_opens_at_a_shift_costs_one_pass_and_the_part(micro, accumulate, tmp_path):
    model, rows = tiny_mlp(seed=1), mlp_rows(80)
    w0, _, loss_fn = functional(model)
    wire = Tripwire(model)
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
    method = CheapAscent(Perturbation(0.1), 0.25)
    trainer = train(SharpTrainer, model, rows, tmp_path, method=method, **sizes, **settings)
    assert wire.count == 5 * (accumulate + 1)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["sharp_evaluations"] for line in logged] == [1.25] * 5
    w, losses = w0.clone(), []
    for window in windows_of(rows, micro, accumulate)[:5]:
        part = window[:1] if accumulate > 1 else [{k: v[:2] for k, v in window[0].items()}]
        g = window_gradient(loss_fn, w, part)
        there = w + 0.1 * g / g.norm()
        losses.append(torch.stack([loss_fn(there, batch) for batch in window]).mean().item())
        w = w - 0.05 * window_gradient(loss_fn, there, window)
    torch.testing.assert_close(weights(trainer), w, rtol=0, atol=1e-12)
    assert [line["loss"] for line in logged] == pytest.approx(losses, rel=1e-6)


def test_a_part_of_a_window_is_normalised_by_its_own_tokens(tmp_path):
    seen = []

    @dataclass(frozen=True)
    class Look(Method):
        cost = 2.0

        def gradient(self, landscape):
            here = landscape.evaluate()
            part = landscape.evaluate(fraction=0.5)
            seen.append(
                (
                    here.loss.item(),
                    part.loss.item(),
                    [b["labels"].ne(-100).sum().item() for b in landscape.window.batches],
                )
            )
            return here

    model = tiny_llama(dropout=0.0)
    rows = causal_rows(16, ragged=True)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "learning_rate": 0.0}
    train(SharpTrainer, model, rows, tmp_path, method=Look(), **sizes)
    first = windows_of(rows, 2, 2)[0]
    model.eval()
    with torch.no_grad():
        expected = model(**first[0]).loss.item()  # a mean over the part's own tokens
    assert seen[0][1] == pytest.approx(expected, rel=1e-5) and seen[0][0] != pytest.approx(seen[0][1], rel=1e-3)


class Unrepeatable(torch.nn.Module):
    """Draws from a stream that it seeds anew by chance, as Reformer's hashing does."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x, labels=None):
        torch.seed()
        return {"loss": self.inner(x=x, labels=labels)["loss"] * (1 + torch.rand(()))}


def test_a_pass_that_cannot_be_repeated_is_noticed_once(tmp_path):
    settings = {"method": sam(0.05), "check_repeats": True}
    with pytest.warns(UserWarning, match="second pass over the first micro-batch") as warned:
        train(SharpTrainer, Unrepeatable(tiny_mlp()), mlp_rows(20), tmp_path, **settings)
    assert len(warned) == 1
    train(SharpTrainer, Unrepeatable(tiny_mlp()), mlp_rows(20), tmp_path, method=sam(0.05))  # switched off: no warning


def test_looking_whether_a_pass_repeats_changes_nothing(tmp_path):
    settings = {"method": sam(0.05), "gradient_accumulation_steps": 2}
    runs = [
        train(SharpTrainer, tiny_mlp(dropout=0.3), mlp_rows(40), tmp_path, check_repeats=check, **settings)
        for check in (True, False)
    ]
    assert torch.equal(weights(runs[0]), weights(runs[1]))
