"""The facts that recipes unlearn, how an attack divides them, and the pictures and tables of what came out."""

import json

import pytest
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_sharp.recipes import report
from hf_sharp.recipes.tasks import fictions
from hf_sharp.recipes.tasks import unlearning as task
from hf_sharp.recipes.tasks.domains import byte_tokenizer
from hf_sharp.unlearning._encoding import Encoder, encode_rows


def test_made_up_facts_are_the_same_every_time_and_nobody_elses():
    rows = fictions.made_up_facts(people=12, seed=3)
    assert rows == fictions.made_up_facts(people=12, seed=3) != fictions.made_up_facts(people=12, seed=4)
    assert len(rows) == 120 and all(set(row) == {"question", "answer"} for row in rows)
    plain = {
        word
        for text in fictions.FRAMES + fictions.QUESTIONS
        for word in text.replace("{}", "").replace("?", "").split()
    }
    names = [[word for word in row["question"].rstrip("?").split() if word not in plain] for row in rows]
    assert all(len(name) == 2 for name in names)
    people = [tuple(name) for name in names]
    assert [people[i] == people[i - 1] for i in range(1, 120)] == [i % 10 != 0 for i in range(1, 120)]
    made_up = [w for row in rows for w in row["answer"].replace(".", "").replace(",", "").split() if w.istitle()]
    made_up = [word for word in made_up if word not in plain] + [word for name in set(people) for word in name]
    assert len(made_up) == len(set(made_up)) == 2 * 120 + 2 * 12


def test_a_tenth_is_to_be_forgotten_or_fewer_people():
    facts = fictions.load_facts()
    assert (len(facts.forget), len(facts.retain), facts.per_person) == (60, 540, 10)
    assert facts.retain + facts.forget == fictions.made_up_facts()
    fewer = fictions.load_facts(forget_people=2, retain_people=3)
    assert fewer.forget == facts.forget[:20] and fewer.retain == facts.retain[:30]
    with pytest.raises(ValueError, match="7 people of 10 rows each cannot be had of 60 rows"):
        fictions.load_facts(forget_people=7)


def test_a_folder_like_tofus_is_read(tmp_path):
    rows = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(6)]
    (tmp_path / "forget05.json").write_text("\n".join(map(json.dumps, rows[4:])))
    (tmp_path / "retain95.json").write_text("\n".join(map(json.dumps, rows[:4])))
    facts = fictions.load_facts(tmp_path, split="forget05", retain_people=1, per_person=2)
    assert facts.forget == rows[4:] and facts.retain == rows[:2] and facts.name == f"{tmp_path.name} forget05"
    with pytest.raises(ValueError, match="forget01, forget05, forget10 or the like; got 'retain90'"):
        fictions.load_facts(tmp_path, split="retain90")
    with pytest.raises(FileNotFoundError, match=r"forget10\.json"):
        fictions.load_facts(tmp_path)
    (tmp_path / "forget05.json").write_text('{"text": "a5"}')
    with pytest.raises(ValueError, match="rows with question and answer are needed"):
        fictions.load_facts(tmp_path, split="forget05")


def test_an_attack_learns_from_half_of_the_people():
    rows = list(range(12))  # four people of three
    sets = fictions.attack_sets(rows, per_person=3, samples=4)
    assert sets == {"relearned": [0, 3, 1, 4], "same person": [2, 5], "untouched": [6, 7, 8, 9, 10, 11]}
    assert set(fictions.attack_sets(rows, 3, 6)) == {"relearned", "untouched"}
    with pytest.raises(ValueError, match="Of 4 people to forget half are attacked, with 6 rows; 7 rows"):
        fictions.attack_sets(rows, 3, 7)
    with pytest.raises(ValueError, match="Of 1 people"):
        fictions.attack_sets(rows[:3], 3, 1)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A small model that has learned four people's facts, and what goes with it."""
    folder = tmp_path_factory.mktemp("taught")
    facts = fictions.load_facts(forget_people=2, retain_people=2)
    rows = facts.forget + facts.retain
    tokenizer = byte_tokenizer([f"{row['question']} {row['answer']}" for row in rows], 400, 128)
    encode = Encoder(tokenizer, 128)
    made = []

    def make():
        made.append(1)
        return task.small_llama(tokenizer, 128)

    options = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "max_steps": 40, "save_strategy": "no"}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    for _ in range(2):  # the second time it is there
        args = TrainingArguments(str(folder / "out"), **options)
        task.teach(make, folder / "model", encode_rows(rows, encode), tokenizer, args)
    assert made == [1] and not (folder / "model.new").exists()
    return AutoModelForCausalLM.from_pretrained(folder / "model"), encode, facts


def test_a_model_is_judged_before_and_during_the_attack(taught):
    model, encode, facts = taught
    examples = encode_rows(facts.forget, encode)
    sets = {"forget": examples, "retain": encode_rows(facts.retain, encode)}
    sets |= fictions.attack_sets(examples, facts.per_person, 6)
    found = task.judge(model, encode, facts.forget, sets, {"steps": 3, "lr": 0.002, "batch_size": None})
    assert 0.02 < found["forget"]["probability"] < 1 and 0 < found["rouge"] <= 1 and 0 < found["rounded"] < 1
    places = ("relearned", "same person", "untouched")
    assert [record["step"] for record in found["curve"]] == [0, 1, 2, 3]
    assert all(f"{place}_probability" in record for place in places for record in found["curve"])
    curve = [record["untouched_probability"] for record in found["curve"]]
    assert found["value"] == curve[3] - curve[0]
    assert found["curve"][3]["relearned_probability"] > found["curve"][0]["relearned_probability"]


def run(method, seed, gain, steps=5):
    """A row as `judge` gives it, of made-up numbers."""
    curve = [{"step": s, "relearned_probability": 0.1 * s, "untouched_probability": 0.2 + gain * s} for s in (0, 1)]
    row = {"method": method, "seed": seed, "steps": steps, "seconds_per_step": 0.1, "value": gain, "curve": curve}
    sides = {"forget": {"probability": 0.25, "token_accuracy": 0.5}, "retain": {"probability": 0.75}}
    return row | sides | {"rouge": 0.125, "rounded": 0.375}


def test_the_table_compares_gains_seed_by_seed():
    gains = {"none": (0.5, 0.4), "sam": (0.3, 0.1)}
    rows = [
        run(method, seed, gain)
        for seed in range(2)
        for method, both in gains.items()
        for gain in both[seed : seed + 1]
    ]
    lines = [line.split() for line in task.table(rows).splitlines()]
    assert lines[2] == "none 2 5 100 0.250 0.125 0.500 0.375 0.750 0.100 0.650 +0.450 -".split()
    half = report.interval([-0.2, -0.3])
    assert lines[3] == f"sam 2 5 100 0.250 0.125 0.500 0.375 0.750 0.100 0.400 +0.200 -0.250 +/- {half:.3f}".split()
    one = task.table([run("never knew", 0, 0.0) | {"seconds_per_step": None}]).splitlines()[2].split()
    assert one[-1] == "-" and one[4] == "-"


def test_curves_are_drawn(tmp_path):
    task.plot([run("none", 0, 0.5), run("none", 1, 0.3), run("sam", 0, 0.1)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_columns_are_set_left_and_right():
    assert report.grid([["a", "bb"], ["long", "1"]]) == "a     bb\n--------\nlong   1"
