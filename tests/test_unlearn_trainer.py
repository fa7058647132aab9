"""`UnlearnTrainer`: every objective with every smoothing, and that their gradients are what the names say."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from hf_sharp import (
    NPO,
    RMU,
    GradientAscent,
    GradientDifference,
    Plain,
    SimNPO,
    Sum,
    asam,
    curvature_regularization,
    fsam,
    gradient_penalty,
    randomized_smoothing,
    sam,
    tram,
    vasso,
)
from hf_sharp.unlearning import ForgetRetainCollator, ForgetRetainDataset
from hf_sharp.unlearning._smoothing import sum_of
from models import tiny_llama
from references import flat, layout_of, sgd
from training import Tripwire, weights
from unlearn_runs import build, collate, lora, pairs, text, tiny_gpt2, unlearn

OBJECTIVES = {
    "gradient_ascent": GradientAscent(),
    "gradient_difference": GradientDifference(retain="kl"),
    "npo": NPO(beta=0.1),
    "simnpo": SimNPO(beta=0.5),
    "dpo": "dpo",
    "idk": "idk",
    "rmu": RMU(layer=0, c=2.0),
}
SMOOTHINGS = {  # with the forwards that a step makes of the forget part
    "sam": (lambda strength: sam(0.05 * strength), 2),
    "asam": (lambda strength: asam(0.5 * strength), 2),
    "fsam": (lambda strength: fsam(0.05 * strength, keep=0.5), 2),
    "tram": (lambda strength: tram("noise", sigma=0.5, scale=10.0 * strength), 3),
    "randomized_smoothing": (lambda strength: randomized_smoothing(0.02 * strength), 3),
    "gradient_penalty": (lambda strength: gradient_penalty(0.05 * strength), 2),
    "curvature_regularization": (lambda strength: curvature_regularization(0.5 * strength, mu=0.05, r=0.02), 4),
}
SETTINGS = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
PLAIN = {}


def plain(name, tmp_path):
    """The weights of a plain run, trained once an objective."""
    if name not in PLAIN:
        model = tiny_llama(dropout=0.1, layers=1)
        PLAIN[name] = weights(unlearn(model, tmp_path, objective=OBJECTIVES[name], **SETTINGS))
    return PLAIN[name]


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_cell_trains_counts_and_differs(name, smoothing, tmp_path):
    make, forwards = SMOOTHINGS[smoothing]
    model = tiny_llama(dropout=0.1, layers=1)
    wire = Tripwire(model)
    trainer = unlearn(model, tmp_path, objective=OBJECTIVES[name], method=make(1.0), **SETTINGS)
    retained = len(trainer.objective.terms) - 1
    calls = forwards * 2 - (smoothing == "tram") if name == "dpo" else forwards  # TRAM looks at one of two answers
    assert wire.count == 2 * (calls + retained)
    cost = (make(1.0).cost + retained) / (1 + retained)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert trainer.method.cost == cost and [line["sharp_evaluations"] for line in logs] == pytest.approx([cost] * 2)
    parts = [line["loss_forget"] + trainer.method.weights["retain"] * line["loss_retain"] for line in logs if retained]
    assert parts == pytest.approx([line["loss"] for line in logs if retained], rel=1e-5)
    moved = (weights(trainer) - plain(name, tmp_path)).abs().max()
    assert 1e-6 < moved < 1 and weights(trainer).isfinite().all()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("name", ["npo"])
def test_no_strength_is_plain_bitwise(name, smoothing, tmp_path):
    make, _ = SMOOTHINGS[smoothing]
    model = tiny_llama(dropout=0.1, layers=1)
    assert torch.equal(
        weights(unlearn(model, tmp_path, objective=OBJECTIVES[name], method=make(0.0), **SETTINGS)),
        plain(name, tmp_path),
    )


# ---- against programs of their own ------------------------------------------------------------------------------


def nll(logits, part):
    """Summed NLL of each row, and its number of tokens, by picking log probabilities one by one."""
    sums, counts = [], []
    for row, labels in zip(logits.log_softmax(-1), part["labels"], strict=True):
        picked = [-row[t, labels[t + 1]] for t in range(len(labels) - 1) if labels[t + 1] != -100]
        sums.append(torch.stack(picked).sum())
        counts.append(len(picked))
    return torch.stack(sums), torch.tensor(counts)


def forget_loss(logits, frozen, parts):
    ratios = [nll(x, part)[0] - nll(y, part)[0] for x, y, part in zip(logits, frozen, parts, strict=True)]
    return (2 / 0.1 * torch.log1p(torch.exp(-0.1 * torch.cat(ratios)))).mean()


def retain_loss(logits, parts):
    each = [nll(x, part) for x, part in zip(logits, parts, strict=True)]
    return torch.cat([sums for sums, _ in each]).sum() / torch.cat([counts for _, counts in each]).sum()


def reference_run(rows, rule, steps=3, micro=4, accumulate=2, weight=2.0):
    """NPO (beta 0.1) and cross-entropy on the retain part, momentum SGD with clipping, in float64."""
    model = tiny_gpt2()
    named = dict(model.named_parameters())
    layout = layout_of({name: p.shape for name, p in named.items()})
    start = flat(model)
    step, memory, w = sgd(0.05, momentum=0.9), {}, start

    def logits(w, part):
        tensors = {name: w[layout[name]].view(p.shape) for name, p in named.items()}
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
        inputs = {"input_ids": part["input_ids"], "attention_mask": part["attention_mask"]}
        return functional_call(model, tensors, kwargs=inputs).logits

    for index in range(steps):
        at = index * micro * accumulate
        window = [collate(rows[at + micro * k : at + micro * (k + 1)]) for k in range(accumulate)]
        forget, retain = [batch["forget"] for batch in window], [batch["retain"] for batch in window]
        with torch.no_grad():
            frozen = [logits(start, part) for part in forget]

        def forget_of(v, forget=forget, frozen=frozen):
            return forget_loss([logits(v, part) for part in forget], frozen, forget)

        def retain_of(v, retain=retain):
            return retain_loss([logits(v, part) for part in retain], retain)

        g = rule(forget_of, retain_of, w, weight)
        w = step(w, g * min(1.0, 1.0 / (g.norm().item() + 1e-6)), memory)  # clipped as torch does it
    return w


def gradient(f, w):
    w = w.detach().clone().requires_grad_(True)
    return torch.autograd.grad(f(w), w)[0]


def joint(forget, retain, w, weight):
    return gradient(lambda v: forget(v) + weight * retain(v), w)


def smoothed(forget, retain, w, weight):
    """The shift comes from the forget gradient alone, and the retain gradient is taken without it."""
    g = gradient(forget, w)
    return gradient(forget, w + 0.1 * g / g.norm()) + weight * gradient(retain, w)


def run(tmp_path, method, rows=None, micro=4, accumulate=2, **settings):
    model = tiny_gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "max_steps": 3}
    own = {"objective": NPO(beta=0.1, retain_weight=2.0), "method": method, "optimizers": (optimizer, None)}
    return unlearn(model, tmp_path, rows, lr_scheduler_type="constant", **(own | sizes | settings))


def test_without_smoothing_it_is_one_joint_backward(tmp_path):
    ours = weights(run(tmp_path, None))
    torch.testing.assert_close(ours, reference_run(pairs(), joint), rtol=0, atol=1e-12)


def test_sam_shifts_the_forget_term_alone_by_its_own_gradient(tmp_path):
    ours = weights(run(tmp_path, sam(0.1)))
    torch.testing.assert_close(ours, reference_run(pairs(), smoothed), rtol=0, atol=1e-10)
    assert (ours - reference_run(pairs(), joint)).abs().max() > 1e-3


@pytest.mark.parametrize("objective", ["npo", "dpo", "rmu"])
def test_windows_agree_however_they_are_cut(objective, tmp_path):
    """Rows of unequal length, padded to other widths: 8 x 1 = 2 x 4."""
    found = []
    for micro, accumulate in ((8, 1), (2, 4)):
        settings = {"objective": OBJECTIVES[objective], "method": sam(0.1), "micro": micro, "accumulate": accumulate}
        trainer = run(tmp_path, **settings)
        keys = ("loss", "loss_forget", "loss_retain")
        logs = torch.tensor([[line[key] for key in keys] for line in trainer.state.log_history[:3]])
        found.append((weights(trainer), logs))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)


def test_logged_losses_of_terms_are_means_since_the_last_log(tmp_path):
    every = [run(tmp_path, sam(0.1), max_steps=4, logging_steps=steps) for steps in (1, 2)]
    single, double = ([line for line in t.state.log_history if "loss" in line] for t in every)
    for key in ("loss", "loss_forget", "loss_retain"):
        pairs_of = [(single[2 * k][key] + single[2 * k + 1][key]) / 2 for k in range(2)]
        assert [line[key] for line in double] == pytest.approx(pairs_of, rel=1e-5)


def test_smoothing_on_forget_costs_three_half_batches(tmp_path):
    model = tiny_gpt2()
    wire = Tripwire(model)
    trainer = unlearn(model, tmp_path, objective="simnpo", method="sam", max_steps=2)
    assert wire.count == 2 * 3 and trainer.method.cost == 1.5
    both = unlearn(tiny_gpt2(), tmp_path, objective="simnpo", method=Sum(forget=sam(), retain=sam()), max_steps=2)
    assert both.method.cost == 2.0


# ---- the reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [NPO(beta=0.1), NPO(beta=0.1, retain="kl"), RMU(layer=0, c=2.0)], ids=repr)
def test_an_adapter_switched_off_is_a_frozen_copy(objective, tmp_path):
    settings = {"objective": objective, "method": sam(0.1), "max_steps": 3, "gradient_accumulation_steps": 2}
    runs = []
    for reference in (None, tiny_gpt2()):
        model = lora()
        by_hand = next(p for name, p in model.named_parameters() if "h.0.attn.c_attn.lora_A" in name)
        by_hand.requires_grad_(False)  # PEFT would switch it on again
        runs.append(unlearn(model, tmp_path, reference=reference, **settings))
        assert not by_hand.requires_grad
    ours, theirs = runs
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-12)
    assert (weights(ours) - weights(build(lora(), tmp_path, **settings))).abs().max() > 1e-4


def test_an_adapter_that_has_learned_is_no_reference_without_a_word(tmp_path):
    model = lora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    with pytest.warns(UserWarning, match="this adapter is not a fresh one"):
        build(model, tmp_path, objective="npo")
    build(model, tmp_path, objective="simnpo")


def test_the_reference_stays_and_is_asked_once_a_window(tmp_path):
    reference = tiny_gpt2(seed=3)
    before, wire = flat(reference), Tripwire(reference)
    unlearn(
        tiny_gpt2(),
        tmp_path,
        objective="npo",
        method=sam(0.1),
        reference=reference,
        max_steps=3,
        gradient_accumulation_steps=2,
    )
    assert not any(p.requires_grad for p in reference.parameters())
    assert wire.count == 3 * 2 and torch.equal(flat(reference.requires_grad_(True)), before)


def test_precomputed_likelihoods_need_no_reference(tmp_path):
    rows, frozen = pairs(24), tiny_gpt2(seed=3)
    for row in rows:
        for part in (row["forget"], row["forget"]["alternative"]):
            ids, labels = part["input_ids"][None], part["labels"][None]
            with torch.no_grad():
                logits = frozen(input_ids=ids).logits[0, :-1]
            part["reference_nll"] = F.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)

    def columns(rows):
        batch = collate(rows)
        for part, given in (
            (batch["forget"], [row["forget"] for row in rows]),
            (batch["forget"]["alternative"], [row["forget"]["alternative"] for row in rows]),
        ):
            part["reference_nll"] = torch.stack([row["reference_nll"] for row in given])
        return batch

    for objective in ("npo", "dpo"):
        settings = {"objective": objective, "method": sam(0.1), "max_steps": 3, "optim": "sgd"}
        trainer = build(tiny_gpt2(), tmp_path, rows, reference="precomputed", **settings)
        trainer.data_collator = columns
        trainer.train()
        theirs = unlearn(tiny_gpt2(), tmp_path, pairs(24), reference=frozen, **settings)
        torch.testing.assert_close(weights(trainer), weights(theirs), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="none was kept"):
        unlearn(tiny_gpt2(), tmp_path, reference="precomputed", objective="npo", max_steps=1)
    with pytest.raises(ValueError, match="compares whole outputs"):
        build(tiny_gpt2(), tmp_path, reference="precomputed", objective=NPO(retain="kl"))


# ---- what it does beside the step -------------------------------------------------------------------------------


def test_evaluation_is_over_the_data_set_and_not_over_batches(tmp_path):
    rows = pairs(11)
    trainer = build(
        tiny_gpt2(),
        tmp_path,
        rows,
        objective=NPO(beta=0.1, retain_weight=2.0),
        eval_dataset=rows,
        per_device_eval_batch_size=4,
        reference=tiny_gpt2(seed=3),
    )
    metrics = trainer.evaluate()
    part = collate(rows)

    def logits(model, name):
        inputs = {key: part[name][key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return model.eval()(**inputs).logits

    forget = forget_loss([logits(trainer.model, "forget")], [logits(tiny_gpt2(seed=3), "forget")], [part["forget"]])
    retain = retain_loss([logits(trainer.model, "retain")], [part["retain"]])
    assert metrics["eval_loss_forget"] == pytest.approx(forget.item(), abs=1e-10)
    assert metrics["eval_loss_retain"] == pytest.approx(retain.item(), abs=1e-10)
    assert metrics["eval_loss"] == pytest.approx((forget + 2 * retain).item(), abs=1e-10)
    held_out = [row["retain"] for row in rows]
    trainer.data_collator = lambda rows: collate([{"x": row} for row in rows])["x"]
    flat_metrics = trainer.evaluate(held_out)
    assert "eval_loss_forget" not in flat_metrics and flat_metrics["eval_loss"] > 0


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"objective": "npo", "optim": "adamw_torch"}
    for name, make in (("full", tiny_gpt2), ("lora", lora)):
        folder = tmp_path / name
        whole = unlearn(make(dropout=0.2), folder, method=vasso(0.05), **settings)
        again = build(make(dropout=0.2), folder, method=vasso(0.05), **settings)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert torch.equal(weights(again), weights(whole))


def test_another_reference_than_the_checkpoints_is_refused(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "objective": "npo"}
    first = unlearn(tiny_gpt2(), tmp_path, **settings)
    late = build(first.model, tmp_path, **settings)  # from the unlearned model: its copy is not the original
    with pytest.raises(ValueError, match="Build the trainer from the model as it was before"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_weights_of_16_bits_and_clipping(tmp_path):
    model = tiny_gpt2(float64=False).bfloat16()
    settings = {"objective": NPO(retain="kl"), "method": sam(0.5), "max_steps": 3, "max_grad_norm": 0.1}
    before = flat(model)
    trainer = unlearn(model, tmp_path, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", **settings)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert weights(trainer).dtype == torch.bfloat16 and not torch.equal(weights(trainer), before)
    assert all(line["grad_norm"] > 0.1 and line["loss_retain"] >= 0 for line in logs)
    assert (weights(trainer) - before).float().norm() < 3 * 0.1 * 1.3  # three clipped steps, and rounding
    assert logs[0]["sharp_component_forget"] == pytest.approx(1, abs=0.25)


def test_gradient_ascent_that_diverges_is_stopped_in_time(tmp_path):
    settings = {"max_steps": 60, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e4}
    settings |= {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    model = tiny_gpt2(float64=False)
    trainer = build(model, tmp_path, objective="gradient_ascent", **settings)
    with pytest.raises(FloatingPointError, match="has diverged: at step") as caught:
        trainer.train()
    step = trainer.state.global_step
    assert f"at step {step + 1} " in str(caught.value) and all(p.grad is None for p in model.parameters())
    assert (tmp_path / f"checkpoint-{step}" / "model.safetensors").is_file()
    bounded = unlearn(
        tiny_gpt2(),
        tmp_path,
        objective=GradientAscent(max_nll=math.log(24)),
        max_steps=30,
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=2.0,
    )
    losses = [line["loss"] for line in bounded.state.log_history if "loss" in line]
    assert losses[-1] >= -math.log(24) - 1e-6 and losses[0] > -math.log(24)


# ---- what is refused --------------------------------------------------------------------------------------------


def test_the_terms_and_weights_are_said_in_one_place():
    objective = NPO(retain_weight=20.0)
    assert sum_of("sam", objective) == Sum(forget=sam(), retain=Plain(), weights={"retain": 20.0})
    assert sum_of({"method": "sam", "rho": 0.1}, objective).methods["forget"] == sam(0.1)
    given = Sum(forget=sam(), retain=asam(), weights={"retain": 20.0})
    assert sum_of(given, objective) is given and sum_of(given, NPO()) is given
    with pytest.raises(ValueError, match=r"A Sum brings its own, 1 where it says none: give it weights=\{.*20"):
        sum_of(Sum(forget=sam(), retain=Plain()), objective)
    with pytest.raises(ValueError, match="has the terms forget, and the method is a Sum of forget, retain"):
        sum_of(Sum(forget=sam(), retain=Plain()), GradientAscent())


def test_what_cannot_be_right_is_refused(tmp_path):
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="label_smoothing_factor would change nothing"):
        build(model, tmp_path, objective="npo", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="the model in training itself"):
        build(model, tmp_path, objective="npo", reference=model)
    with pytest.raises(ValueError, match="a module, 'precomputed' or None; got 'frozen'"):
        build(model, tmp_path, objective="npo", reference="frozen")
    rows = [row["forget"] for row in pairs(8)]
    trainer = build(model, tmp_path, rows, objective="npo")
    trainer.data_collator = lambda rows: collate([{"x": row} for row in rows])["x"]
    with pytest.raises(ValueError, match="no term 'forget' in this batch"):
        trainer.train()
    empty = [{"forget": row, "retain": {**row, "labels": torch.full_like(row["labels"], -100)}} for row in rows]
    with pytest.raises(ValueError, match="no label of the term 'retain' counts"):
        unlearn(model, tmp_path, empty, objective="npo")
    with pytest.raises(ValueError, match="no term 'retain' in this batch"):
        unlearn(model, tmp_path, [{"forget": row} for row in rows], objective="npo")


def test_other_rows_are_retained_in_every_epoch(tmp_path):
    examples = [{key: column.tolist() for key, column in row.items()} for row in text(8, 1)]
    data = ForgetRetainDataset(examples, [{**row, "labels": row["input_ids"]} for row in examples])
    trainer = build(tiny_gpt2(), tmp_path, data, objective="simnpo", max_steps=-1, num_train_epochs=3)
    trainer.data_collator, drawn = ForgetRetainCollator(SimpleNamespace(pad_token_id=0)), []
    prepared = trainer._prepared
    trainer._prepared = lambda batch: drawn.append(batch["retain"]["input_ids"].tolist()) or prepared(batch)
    trainer.train()
    epochs = [drawn[at : at + 2] for at in (0, 2, 4)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_columns_are_not_removed_and_a_step_of_its_own_works(tmp_path):
    trainer = build(tiny_gpt2(), tmp_path, objective="npo", method=sam(0.1))
    assert trainer.args.remove_unused_columns is False
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    loss = trainer.training_step(trainer.model_wrapped, collate(pairs(4)))
    assert loss.isfinite() and all(p.grad is not None for p in trainer.model.parameters())
