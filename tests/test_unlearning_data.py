"""Rows as tokens and labels, token by token; pairs drawn alike after a resume and differently on each rank."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_sharp import Plain, SharpTrainer, Sum
from hf_sharp.recipes.tasks.domains import byte_tokenizer
from hf_sharp.unlearning import (
    Encoder,
    EpochCallback,
    ForgetRetainCollator,
    ForgetRetainDataset,
    encode_rows,
    pad,
    read_rows,
)
from models import tiny_llama
from questions import examples, ids, word_tokenizer
from ranks import torchrun

HERE = Path(__file__).parent
ROW = {"question": "who wrote it", "answer": "nobody did"}


PLAIN = "Q: {question} A: {answer}"
CHAT = (
    "{% for m in messages %}{{ {'user': 'user: ', 'assistant': 'bot: ', 'system': 'be '}[m.role] + m.content }}"
    "{{ ' </s> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"
)


# --- rows ---


def test_the_prompt_is_masked_and_the_answer_ends_with_eos():
    example = Encoder(word_tokenizer(), template=PLAIN)(ROW)
    assert example["input_ids"] == ids("Q: who wrote it A: nobody did </s>")
    assert example["labels"] == [-100] * 5 + ids("nobody did </s>")


@pytest.mark.parametrize("special", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_what_a_tokenizer_puts_at_the_ends_comes_once(special):
    encode = Encoder(word_tokenizer(special), template=PLAIN)
    start = "<s> " if "<s>" in special else ""
    assert encode(ROW)["input_ids"] == ids(start + "Q: who wrote it A: nobody did </s>")
    assert encode.prompt(ROW["question"]) == ids(start + "Q: who wrote it A:")
    assert encode({"text": "who did"})["labels"] == ids(start + "who did </s>")


def test_a_chat_template_is_used_where_there_is_one():
    encode = Encoder(word_tokenizer("<s> $A", chat_template=CHAT.replace("' </s> '", "' </s> be '")))
    example = encode(ROW)
    # Neither a second <s> nor the word that the template writes after the last EOS.
    assert encode.uses_chat_template
    assert example["input_ids"] == ids("user: who wrote it </s> be bot: nobody did </s>")
    assert example["labels"] == [-100] * 7 + ids("nobody did </s>")
    assert encode.prompt(ROW["question"]) == example["input_ids"][:7]
    encode = Encoder(word_tokenizer(chat_template=CHAT), system="somebody")
    assert encode(ROW)["input_ids"] == ids("be somebody </s> user: who wrote it </s> bot: nobody did </s>")
    encode = Encoder(word_tokenizer(chat_template=CHAT), template=PLAIN)
    assert encode(ROW)["input_ids"] == ids("Q: who wrote it A: nobody did </s>")
    encode = Encoder(word_tokenizer(chat_template=CHAT.replace("bot: ' }}{% endif", "be bot: ' }}{% endif")))
    with pytest.raises(ValueError, match="writes another prompt when an answer follows"):
        encode(ROW)


def test_a_token_across_the_border_belongs_to_the_answer():
    """The space before an answer is its first token's; tokens are those of the whole string, as a model meets it."""
    tokenizer = byte_tokenizer([f"Answer: word{i} Question: {i}?\nAnswer:" for i in range(50)], size=400)
    encode = Encoder(tokenizer)
    example = encode({"question": "7?", "answer": "word7"})
    whole = "Question: 7?\nAnswer: word7"
    assert example["input_ids"] == [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
    said = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(said) == " word7<|endoftext|>"
    assert example["input_ids"][-len(said) :] == said
    assert encode.prompt("7?") == example["input_ids"][: -len(said)]


def test_rows_are_cut_at_their_end_and_refused_if_nothing_is_left():
    encode = Encoder(word_tokenizer(), template=PLAIN, max_length=6)
    assert encode(ROW) == {"input_ids": ids("Q: who wrote it A: nobody"), "labels": [-100] * 5 + ids("nobody")}
    with pytest.raises(ValueError, match="Row 2: With 5 tokens of prompt and max_length=5 nothing is left"):
        encode_rows([{"text": "did it"}, ROW], Encoder(word_tokenizer(), template=PLAIN, max_length=5))
    with pytest.raises(ValueError, match="nothing is left"):
        Encoder(word_tokenizer())({"text": ""})


def test_optional_columns_are_handed_on():
    row = ROW | {"alternative": "it did", "reference_nll": 3, "alternative_reference_nll": 4.5, "topic": "plays"}
    example = Encoder(word_tokenizer(), template=PLAIN)(row)
    assert set(example) == {"input_ids", "labels", "reference_nll", "alternative"} and example["reference_nll"] == 3.0
    assert example["alternative"]["input_ids"] == ids("Q: who wrote it A: it did </s>")
    assert example["alternative"]["labels"] == [-100] * 5 + ids("it did </s>")
    assert example["alternative"]["reference_nll"] == 4.5


def test_rows_come_from_files_lists_and_datasets(tmp_path):
    rows = [ROW, {"question": "who did it", "answer": "somebody\u2028did"}]
    (tmp_path / "lines.json").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows), "utf-8")
    assert read_rows(tmp_path / "lines.json") == rows == read_rows(str(tmp_path / "list.json"))
    encode = Encoder(word_tokenizer(), template=PLAIN, question="asked", answer="said")
    renamed = [{"asked": row["question"], "said": row["answer"]} for row in rows]
    expected = [Encoder(word_tokenizer(), template=PLAIN)(row) for row in rows]
    assert encode_rows(Dataset.from_list(renamed), encode) == encode_rows(renamed, encode) == expected
    assert encode_rows(tmp_path / "lines.json", Encoder(word_tokenizer(), template=PLAIN)) == expected


WRONG = {
    "no answer in the template": ({"template": "Q: {question}"}, "once each"),
    "answer first": ({"template": "{answer} {question}"}, "before the answer"),
    "length": ({"max_length": 1}, "at least 2; got 1"),
    "system without chat": ({"system": "be"}, "needs a chat template"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_encoder_that_cannot_be_is_refused(case):
    settings, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Encoder(word_tokenizer(), **settings)


def test_other_wrong_input_is_refused(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        Encoder(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"Set tokenizer\.pad_token"):
        ForgetRetainCollator(tokenizer)
    with pytest.raises(ValueError, match="'question' and 'answer', or 'text'; this one has question, reply"):
        Encoder(word_tokenizer())({"question": "who", "reply": "nobody"})
    (tmp_path / "wrong.json").write_text("question,answer\n")
    with pytest.raises(ValueError, match="neither JSON lines nor a JSON list"):
        read_rows(tmp_path / "wrong.json")
    (tmp_path / "numbers.json").write_text("1\n2\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(tmp_path / "numbers.json")
    with pytest.raises(ValueError, match="There are no rows"):
        encode_rows([], Encoder(word_tokenizer()))
    with pytest.raises(ValueError, match="There are no rows to retain"):
        ForgetRetainDataset(examples(3), [])
    with pytest.raises(ValueError, match="Encode rows first"):
        ForgetRetainDataset([ROW], examples(3))
    with pytest.raises(ValueError, match="seed is not negative"):
        ForgetRetainDataset(examples(3), examples(3), seed=-1)


# --- batches ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_term_is_padded_by_itself_and_on_the_right(side):
    collate = ForgetRetainCollator(word_tokenizer(padding_side=side))
    long, short = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, {"input_ids": [6, 7], "labels": [-100, 7]}
    batch = collate([{"forget": long, "retain": short}, {"forget": short, "retain": short}])
    expected = {"input_ids": [[3, 4, 5], [6, 7, 1]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
    expected |= {"labels": [[-100, 4, 5], [-100, 7, -100]]}
    assert {key: value.tolist() for key, value in batch["forget"].items()} == expected
    assert batch["retain"]["input_ids"].tolist() == [[6, 7], [6, 7]] and set(batch) == {"forget", "retain"}
    assert all(value.dtype == torch.int64 for value in batch["forget"].values())
    assert pad([short], 1, multiple_of=8)["attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]


def test_optional_columns_are_collated_all_or_none():
    collate = ForgetRetainCollator(word_tokenizer())
    encode = Encoder(word_tokenizer(), template=PLAIN)
    rows = [ROW | {"reference_nll": nll, "alternative": "it", "alternative_reference_nll": nll + 1} for nll in (1, 2)]
    pairs = [{"forget": encode(row), "retain": encode(ROW)} for row in rows]
    batch = collate(pairs)
    assert (
        batch["forget"]["reference_nll"].tolist() == [1, 2] and batch["forget"]["reference_nll"].dtype == torch.float32
    )
    other = batch["forget"]["alternative"]
    assert set(other) == {"input_ids", "attention_mask", "labels", "reference_nll"}
    assert other["labels"].tolist() == [[-100] * 5 + ids("it </s>")] * 2 and other["reference_nll"].tolist() == [2, 3]
    assert set(batch["retain"]) == {"input_ids", "attention_mask", "labels"}
    del pairs[1]["forget"]["alternative"]
    with pytest.raises(ValueError, match="Of 2 examples to forget 1 have alternative; all or none do"):
        collate(pairs)


# --- pairs ---


def test_draws_are_a_function_of_seed_epoch_and_index():
    data = ForgetRetainDataset(examples(8), examples(20), seed=5)
    draws = [data.retained(i) for i in range(8)]
    assert [data.retained(i) for i in reversed(range(8))] == draws[::-1]  # whatever was asked before
    assert len(set(draws)) == 8  # no row twice
    assert data[3] == {"forget": data.forget[3], "retain": data.retain[draws[3]]} and len(data) == 8
    data.set_epoch(1)
    later = [data.retained(i) for i in range(8)]
    assert later != draws
    data.set_epoch(0)
    assert [data.retained(i) for i in range(8)] == draws
    other = ForgetRetainDataset(examples(8), examples(20), seed=6)
    assert [other.retained(i) for i in range(8)] != draws


def test_fewer_rows_to_retain_are_used_up_before_they_come_again():
    data = ForgetRetainDataset(examples(10), examples(4))
    draws = [data.retained(i) for i in range(10)]
    assert set(draws[:4]) == set(draws[4:8]) == {0, 1, 2, 3} and draws[:4] != draws[4:8]


def fed(folder, steps, resume=None, callbacks=(EpochCallback,), **settings):
    """What the Trainer feeds a model: the last tokens of the retained rows, batch by batch."""
    seen = []
    collate = ForgetRetainCollator(word_tokenizer())

    def watch(pairs):
        seen.append([pair["retain"]["input_ids"][-1] for pair in pairs])
        return collate(pairs)

    arguments = {"per_device_train_batch_size": 2, "save_steps": 7, "report_to": "none", "use_cpu": True}
    arguments |= {"remove_unused_columns": False, "disable_tqdm": True, "max_steps": steps} | settings
    trainer = SharpTrainer(
        tiny_llama(dropout=0.0, vocab_size=64),
        TrainingArguments(str(folder), **arguments),
        method=Sum(forget=Plain(), retain=Plain()),
        train_dataset=ForgetRetainDataset(examples(10), examples(50), seed=1),
        data_collator=watch if not settings.get("dataloader_num_workers") else collate,
        callbacks=[each() for each in callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return seen, trainer


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path):
    whole, trainer = fed(tmp_path, steps=12)  # five steps an epoch
    rest, resumed = fed(tmp_path, steps=12, resume=str(tmp_path / "checkpoint-7"))
    assert rest == whole[7:] and len(rest) >= 5
    assert whole[:5] != whole[5:10]
    assert trainer.state.log_history[-1]["epoch"] == 2.4
    ours, theirs = (t.model.state_dict() for t in (trainer, resumed))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_without_the_callback_a_resumed_run_would_not(tmp_path):
    """Why EpochCallback is there; when this fails, Accelerate tells data sets by itself, and it can go."""
    whole, _ = fed(tmp_path, steps=9, callbacks=())
    rest, _ = fed(tmp_path, steps=9, resume=str(tmp_path / "checkpoint-7"), callbacks=())
    assert whole[7:9] != rest[:2]


def test_workers_that_live_on_hear_of_the_epoch(tmp_path):
    _, alone = fed(tmp_path / "0", steps=8)
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    _, helped = fed(tmp_path / "1", steps=8, **settings)
    ours, theirs = (t.model.state_dict() for t in (alone, helped))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.distributed
def test_ranks_draw_different_rows_each_epoch(tmp_path):
    torchrun(2, HERE / "distributed" / "draws.py", tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    data = ForgetRetainDataset(examples(8), examples(50), seed=1)
    for epoch in range(2):  # two batches of two rows on each rank
        drawn = [row for rank in ranks for batch in rank[2 * epoch : 2 * epoch + 2] for row in batch]
        data.set_epoch(epoch)
        assert len(set(drawn)) == 8 and set(drawn) == {5 + data.retained(i) for i in range(8)}
