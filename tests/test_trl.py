"""TRL's trainers with a method: their metrics count once, their options go on working, their references stay put."""

import ast
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

import hf_sharp
from hf_sharp import fsam, make_sharp, mesa, sam, sam_on, tram
from hf_sharp._engine import rows
from hf_sharp._integrations.any_trainer import TRL
from hf_sharp._integrations.refusals import GENERATING, STACKED
from training import weights
from trl_toy import CASES, build, llama, run, sgd, texts, tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL and PEFT use names that transformers renamed


def logs(trainer):
    """What the trainer logged, without times and what only a method logs."""
    ours = ("sharp_", "train_runtime", "train_samples", "train_steps", "total_flos")
    return [{k: v for k, v in line.items() if not k.startswith(ours)} for line in trainer.state.log_history]


@pytest.mark.parametrize("case", CASES)
def test_metrics_and_weights_are_those_of_plain_training(case, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 1}
    plain = run(case, tmp_path / "plain", **settings)
    same = run(case, tmp_path / "same", sharp=True, method=sam(0.0), **settings)
    assert torch.equal(weights(plain), weights(same)) and logs(plain) == logs(same)
    moved = run(case, tmp_path / "moved", sharp=True, method=sam(0.1), **settings)
    assert not torch.equal(weights(moved), weights(same))
    lines, expected = logs(moved), logs(plain)
    for key in lines[0].keys() - {"grad_norm"}:
        assert lines[0][key] == expected[0][key], key
    assert [line.get("num_tokens") for line in lines] == [line.get("num_tokens") for line in expected]
    gaps = [line["sharp_gap"] for line in moved.state.log_history if "sharp_gap" in line]
    assert len(gaps) == 3 and all(line["sharp_evaluations"] == 2 for line in moved.state.log_history[:3])


# ---- against references


def padded(sequences, fill):
    longest = max(map(len, sequences))
    return torch.tensor([list(row) + [fill] * (longest - len(row)) for row in sequences])


def textbook_sam(model, windows, loss_of, rho, lr=0.05):
    """SAM with SGD as in its paper; a window is a list of micro-batches whose losses add up to the window's mean."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for window in windows:
        sum(loss_of(model, batch, window) for batch in window).backward()
        old = [p.detach().clone() for p in parameters]
        norm = torch.sqrt(sum(p.grad.square().sum() for p in parameters))
        with torch.no_grad():
            for p in parameters:
                p.add_(rho * p.grad / norm)
        model.zero_grad()
        sum(loss_of(model, batch, window) for batch in window).backward()
        with torch.no_grad():
            for p, w in zip(parameters, old, strict=True):
                p.copy_(w - lr * p.grad)
        model.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def token_loss(model, batch, window):
    """Cross entropy of next tokens, a mean over all tokens of the window."""
    count = sum((labels[:, 1:] != -100).sum() for _, _, labels in window)
    ids, seen, labels = batch
    logits = model(input_ids=ids, attention_mask=seen).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / count


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_sft_agrees_with_a_textbook_loop_whatever_the_window(kind, tmp_path):
    made, sequences = tokenizer(), []
    for row in texts(kind):
        prompt = made(row["prompt"])["input_ids"] if kind == "completion" else []
        whole = made((row["prompt"] + row["completion"] if kind == "completion" else row["text"]) + " </s>")
        ids = whole["input_ids"]
        sequences.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    rows_of_8 = [sequences[at : at + 8] for at in range(0, 24, 8)]
    windows = []
    for eight in rows_of_8:
        ids, labels = [i for i, _ in eight], [x for _, x in eight]
        windows.append([(padded(ids, 0), padded([[1] * len(i) for i in ids], 0), padded(labels, -100))])
    model = llama(dropout=0.0, float64=True)
    expected = textbook_sam(copy.deepcopy(model), windows, token_loss, rho=0.1)
    case = {"text": "SFT", "completion": "SFT, completions only"}[kind]
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    seen = []
    for micro, accumulate in ((8, 1), (4, 2), (2, 4)):
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
        trainer = run(case, tmp_path, sharp=True, model=copy.deepcopy(model), method=sam(0.1), **sgd(), **sizes)
        # The model's norms and TRL's log-probabilities are float32.
        torch.testing.assert_close(weights(trainer), expected, rtol=0, atol=1e-8)
        seen.append([(line["loss"], line["num_tokens"], line["sharp_gap"]) for line in trainer.state.log_history[:3]])
    assert (expected - before).abs().max() > 5e-3
    for other in seen[1:]:
        assert (
            [n for _, n, _ in other]
            == [n for _, n, _ in seen[0]]
            == list(torch.tensor([sum(len(i) for i, _ in rows) for rows in rows_of_8]).cumsum(0))
        )
        torch.testing.assert_close(torch.tensor(other), torch.tensor(seen[0]), rtol=1e-5, atol=1e-6)


def preference_loss(reference, beta=0.1):
    """-log sigmoid(beta ((log pi(c) - log ref(c)) - (log pi(r) - log ref(r)))), a mean over pairs (Rafailov 2023)."""

    def log_probability(model, ids, seen, completion):
        logps = torch.log_softmax(model(input_ids=ids, attention_mask=seen).logits[:, :-1], -1)
        return (logps.gather(2, ids[:, 1:, None])[..., 0] * completion[:, 1:]).sum(1)

    def loss_of(model, batch, window):
        margins = []
        for side in batch:
            with torch.no_grad():
                fixed = log_probability(reference, *side)
            margins.append(log_probability(model, *side) - fixed)
        return -F.logsigmoid(beta * (margins[0] - margins[1])).mean() / len(window)

    return loss_of


@pytest.mark.parametrize("before", [False, True], ids=["reference at hand", "reference before"])
def test_dpo_agrees_with_a_textbook_loop_and_leaves_the_reference_alone(before, tmp_path):
    made, sides = tokenizer(), {"chosen": [], "rejected": []}
    for row in texts("preference"):
        prompt = made(row["prompt"])["input_ids"]
        for side, kept in sides.items():
            ids = made(row["prompt"] + row[side] + " </s>")["input_ids"]
            kept.append((ids, [0] * len(prompt) + [1] * (len(ids) - len(prompt))))

    def batch(at):
        return [
            (
                padded([ids for ids, _ in rows[at : at + 4]], 0),
                padded([[1] * len(ids) for ids, _ in rows[at : at + 4]], 0),
                padded([mask for _, mask in rows[at : at + 4]], 0),
            )
            for rows in sides.values()
        ]

    model = llama(dropout=0.0, float64=True)
    reference = copy.deepcopy(model).eval()
    windows = [[batch(at), batch(at + 4)] for at in range(0, 24, 8)]
    expected = textbook_sam(copy.deepcopy(model), windows, preference_loss(reference), rho=0.1)
    case = "DPO, reference before" if before else "DPO"
    settings = sgd(gradient_accumulation_steps=2)
    trainer = run(case, tmp_path, sharp=True, model=copy.deepcopy(model), method=sam(0.1), **settings)
    torch.testing.assert_close(weights(trainer), expected, rtol=0, atol=1e-8)
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert (expected - start).abs().max() > 1e-3
    kept = [p.detach().reshape(-1) for p in trainer.ref_model.parameters()]
    assert torch.equal(torch.cat(kept), start) and all(p.grad is None for p in trainer.ref_model.parameters())


@pytest.mark.parametrize(
    "case, name", [("SFT, adapters", "sam"), ("SFT, adapters", "msam"), ("DPO, adapters", "asam")]
)
def test_weights_under_adapters_stay_bit_for_bit(case, name, tmp_path):
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = run(case, tmp_path, sharp=True, model=model, method=name)
    after = {key.removeprefix("base_model.model."): value for key, value in trainer.model.state_dict().items()}
    after = {key.replace(".base_layer", ""): value for key, value in after.items() if "lora_" not in key}
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert any(p.abs().max() > 0 for key, p in trainer.model.named_parameters() if "lora_B" in key)


# ---- what is refused, and what only looks like it should be


def test_a_part_of_a_micro_batch_of_pairs_is_refused_and_whole_micro_batches_are_not(tmp_path):
    for case in ("DPO", "Reward"):
        for method in (sam(0.1, fraction=0.5), fsam(0.1, fisher="per_sample")):
            with pytest.raises(ValueError, match="holds chosen and rejected rows that belong together"):
                run(case, tmp_path, sharp=True, method=method)
        settings = {"gradient_accumulation_steps": 2, "method": sam(0.1, fraction=0.5)}
        trainer = run(case, tmp_path, sharp=True, **settings)
        assert [line["sharp_evaluations"] for line in trainer.state.log_history[:3]] == [1.5] * 3
    kto = run("KTO", tmp_path, sharp=True, method=sam(0.1, fraction=0.5))
    assert [line["sharp_evaluations"] for line in kto.state.log_history[:3]] == [1.5] * 3


@pytest.mark.parametrize("case", ["SFT", "SFT, completions only", "DPO", "DPO, reference before", "Reward", "KTO"])
def test_the_table_of_stacked_trainers_is_true(case, tmp_path):
    trainer = build(case, tmp_path, per_device_train_batch_size=3, max_steps=1)
    stacked = any(cls.__name__ in STACKED for cls in type(trainer).__mro__)
    batch = next(iter(trainer.get_train_dataloader()))
    assert rows.count(batch) == (6 if stacked else 3)


def test_a_term_on_outputs_that_carry_no_gradient_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"SharpSFTTrainer\.compute_loss gives out carry no gradient"):
        run("SFT", tmp_path, sharp=True, method=mesa())


def test_tram_looks_at_the_logits_and_gives_what_it_gives_without_trl(tmp_path):
    model = llama(dropout=0.0)
    settings = sgd(method=tram("previous", scale=5.0))
    trainer = run("SFT", tmp_path, sharp=True, model=copy.deepcopy(model), **settings)
    data, collate = trainer.train_dataset, trainer.data_collator
    args = trainer.args.to_dict()
    keep = ("output_dir", "max_steps", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm", "use_cpu")
    keep += ("per_device_train_batch_size", "train_sampling_strategy", "report_to", "save_strategy", "logging_steps")
    plain = hf_sharp.SharpTrainer(
        model=copy.deepcopy(model),
        args=TrainingArguments(**{key: args[key] for key in keep}),
        train_dataset=data,
        data_collator=collate,
        method=tram("previous", scale=5.0),
    )
    plain.train()
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=0, atol=1e-5)
    radii = [[line["sharp_radius"] for line in t.state.log_history[:3]] for t in (trainer, plain)]
    assert radii[0] == pytest.approx(radii[1], rel=1e-3) and radii[0][2] > 0


def test_an_ascent_for_a_subset_goes_through_the_fused_head(tmp_path):
    model = llama(dropout=0.0, float64=True)
    names = [name for name, _ in model.named_parameters() if "norm" in name]
    trainer = run("SFT", tmp_path, sharp=True, model=model, method=sam_on(0.3), **sgd())
    moved = trainer.method.perturbed(hf_sharp.Landscape(trainer._sharp_host))
    assert sorted(moved) == sorted(names) and all(line["sharp_gap"] > 0 for line in trainer.state.log_history[:3])


def sources():
    """The trainer classes in TRL's sources, read and not imported, with their bases and own methods."""
    found = {}
    for path in sorted(Path(trl.__file__).parent.rglob("*trainer.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer"):
                bases = {base.id.lstrip("_") for base in node.bases if isinstance(base, ast.Name)}
                own = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
                known = found.setdefault(node.name, (set(), {}))
                known[0].update(bases - {node.name})
                known[1].update(own)
    return found


def test_every_trainer_of_trl_that_writes_its_own_data_is_known():
    """One that overrides how inputs are prepared, or does more in a step than shelter activations, generates."""
    found, generating = sources(), set()
    for name, (_, own) in found.items():
        step = own.get("training_step")
        more = step is not None and "maybe_activation_offload_context" not in ast.unparse(step)
        if more or {"_prepare_inputs", "_inner_training_loop"} & own.keys():
            generating.add(name)
    assert {"GRPOTrainer", "RLOOTrainer"} <= generating and not {"SFTTrainer", "DPOTrainer"} & generating

    def known(name):
        return name in GENERATING or any(known(base) for base in found.get(name, ((), {}))[0])

    assert [name for name in sorted(generating) if not known(name)] == []


def test_grpo_is_refused_when_it_is_made_sharp():
    with pytest.raises(ValueError, match="GRPOTrainer generates its data between steps"):
        make_sharp(trl.GRPOTrainer)


# ---- classes and files


def test_the_ready_made_classes_are_found_by_name_in_another_process_too():
    classes = [getattr(hf_sharp, name) for name in TRL]
    assert classes == [make_sharp(getattr(trl, base)) for base in TRL.values()]
    assert [repr(cls) for cls in classes] == [f"<class 'hf_sharp.{name}'>" for name in TRL]
    code = "import pickle, sys; print([cls.__name__ for cls in pickle.loads(sys.stdin.buffer.read())])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=pickle.dumps(classes), env=environment, capture_output=True, check=True)
    assert ast.literal_eval(done.stdout.decode()) == list(TRL)


def test_checkpoints_resume_bit_for_bit_and_the_card_names_the_method(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    case, method = "SFT, adapters, no checkpointing", {"method": "fsam", "rho": 0.1, "every": 3}
    whole = run(case, tmp_path / "a", sharp=True, method=method, **settings)
    again = build(case, tmp_path / "a", sharp=True, method=method, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.count("### Sharpness-aware training") == 1 and "FisherMask" in card and "- sharpness-aware" in card
    assert "- sft" in card and (tmp_path / "a" / "checkpoint-4" / "sharp_config.json").is_file()


def test_evaluation_and_its_metrics_see_the_weights_themselves(tmp_path):
    trainer = run("SFT", tmp_path, sharp=True, method=sam(0.5))
    data = texts("text", 8)
    seen = trainer.evaluate(data)
    plain = build("SFT", tmp_path, model=copy.deepcopy(trainer.model)).evaluate(data)
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert seen[key] == pytest.approx(plain[key], rel=1e-6)
