"""TOFU's numbers by hand, and all of them together against loops over the rows of a tiny Llama."""

import math
from itertools import combinations

import pytest
import torch
from scipy import stats
from torch import nn

from decoding import greedy_by_loop, longest_common
from hf_sharp.recipes.tasks.domains import byte_tokenizer
from hf_sharp.unlearning import Encoder
from hf_sharp.unlearning import _evaluation as evaluation
from models import seeded, tiny_llama


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([" one two three four five six seven eight nine ten"] * 3, size=300)


def close(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-12)


def test_truth_ratio_by_hand():
    right = -torch.tensor([0.5, 0.2], dtype=torch.float64).log()
    wrong = [-torch.tensor(p, dtype=torch.float64).log() for p in ([0.1, 0.3], [0.2, 0.4, 0.9])]
    ratios = evaluation.truth_ratio(right, wrong)
    close(ratios, [0.2 / 0.5, 0.5 / 0.2])
    geometric = evaluation.truth_ratio(right, wrong, mean="geometric")
    close(geometric, [(0.1 * 0.3) ** 0.5 / 0.5, (0.2 * 0.4 * 0.9) ** (1 / 3) / 0.2])
    assert evaluation.truth_ratio_score(ratios, forget=True) == pytest.approx((0.4 + 0.4) / 2)
    assert evaluation.truth_ratio_score(ratios, forget=False) == pytest.approx((0.6 + 0.0) / 2)
    close(evaluation.option_probability(right, wrong), [0.5 / 0.9, 0.2 / 1.7])
    with pytest.raises(ValueError, match="arithmetic or geometric; got 'harmonic'"):
        evaluation.truth_ratio(right, wrong, mean="harmonic")
    with pytest.raises(ValueError, match="one wrong answer or more"):
        evaluation.truth_ratio(right, wrong[:1])


def test_model_utility_is_a_harmonic_mean():
    numbers = [0.9, 0.5, 0.7, 0.3, 0.8, 0.6, 0.4, 0.2, 1.0]
    assert evaluation.model_utility(numbers) == pytest.approx(stats.hmean(numbers), rel=1e-12)
    assert evaluation.model_utility([0.5, 0.0]) == 0
    with pytest.raises(ValueError, match="not negative"):
        evaluation.model_utility([0.5, -0.1])


def test_forget_quality_is_the_kolmogorov_smirnov_test():
    """By its definition: the largest distance of the empirical distributions; the p-value counts all splits of six."""
    a, b = [0.1, 0.2, 0.9], [0.3, 0.5, 0.4]

    def distance(x, y):
        return max(abs(sum(u <= t for u in x) / len(x) - sum(u <= t for u in y) / len(y)) for t in x + y)

    splits = [(list(c), [u for u in a + b if u not in c]) for c in combinations(a + b, 3)]
    p = sum(distance(*split) >= distance(a, b) - 1e-12 for split in splits) / len(splits)
    ours = evaluation.forget_quality(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert ours == pytest.approx(p, rel=1e-9) and p < 1
    assert evaluation.forget_quality(torch.tensor(a), torch.tensor(a)) == pytest.approx(1.0)


FACT = {"question": "five six?", "answer": "one two", "perturbed_answer": ["two one three", "four"]}
SETS = {
    "forget": [
        FACT | {"paraphrased_answer": "two one"},
        FACT | {"paraphrased_answer": "one", "perturbed_answer": ["six"]},
    ],
    "retain": [
        FACT | {"question": "two?", "answer": "seven nine", "paraphrased_answer": "seven"},
        FACT | {"question": "eight two?", "answer": "three four", "paraphrased_answer": "three"},
    ],
    "authors": [FACT],
    "world": [FACT | {"question": "nine?", "answer": "ten"}],
}


def teach(model, examples):
    """Until the answers are right; what is not among the examples stays unknown."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        for example in examples:
            model(**{key: torch.tensor([value]) for key, value in example.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_all_tofu_numbers_together(tokenizer):
    with seeded(3):
        model = tiny_llama(vocab_size=len(tokenizer), float64=True, max_position_embeddings=64, bos_token_id=None)
    encode = Encoder(tokenizer)
    teach(model, [encode(SETS[name][0]) for name in ("retain", "authors", "world")])
    numbers, ratios = evaluation.tofu_metrics(model, encode, SETS, mean="arithmetic", max_new_tokens=6, batch_size=3)
    model.eval()

    def chance(question, answer):
        whole = f"Question: {question}\nAnswer: {answer}"
        start = len(tokenizer(f"Question: {question}\nAnswer:")["input_ids"])
        ids = [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        return math.exp(sum(float(logits[t - 1, ids[t]]) for t in range(start, len(ids))) / (len(ids) - start))

    def mean(values):
        return sum(values) / len(values)

    expected = {}
    for name, rows in SETS.items():
        right = [chance(r["question"], r["answer"]) for r in rows]
        wrong = [[chance(r["question"], w) for w in r["perturbed_answer"]] for r in rows]
        say = [chance(r["question"], r.get("paraphrased_answer", r["answer"])) for r in rows]
        ratio = [mean(w) / s for w, s in zip(wrong, say, strict=True)]
        if name in ("authors", "world"):
            right = [p / (p + sum(w)) for p, w in zip(right, wrong, strict=True)]
        closer = mean([min(r, 1 / r) for r in ratio]) if name == "forget" else mean([max(0, 1 - r) for r in ratio])
        prompts = [tokenizer(f"Question: {r['question']}\nAnswer:")["input_ids"] for r in rows]
        said = [tokenizer.decode(greedy_by_loop(model, p, 6, tokenizer.eos_token_id)) for p in prompts]
        recall = [
            longest_common(r["answer"].split(), s.split()) / len(r["answer"].split())
            for r, s in zip(rows, said, strict=True)
        ]
        expected |= {f"{name}_probability": mean(right), f"{name}_truth_ratio": closer, f"{name}_rouge": mean(recall)}
        if name == "forget":
            assert ratios is not None and ratios.tolist() == pytest.approx(ratio, rel=1e-5)
    nine = [expected[key] for key in expected if not key.startswith("forget")]
    utility = numbers.pop("model_utility")
    assert numbers == pytest.approx(expected, rel=1e-5)  # float32 inside Llama
    assert utility == pytest.approx(stats.hmean(nine), rel=1e-5) and 0.1 < min(nine)
    again, _ = evaluation.tofu_metrics(model, encode, {"forget": SETS["forget"]}, retained=ratios, max_new_tokens=2)
    assert again["forget_quality"] == 1.0 and "model_utility" not in again


def test_sets_that_tofu_does_not_have_are_refused(tokenizer):
    with pytest.raises(ValueError, match="Sets are forget, retain, authors, world; got real_authors"):
        evaluation.tofu_metrics(nn.Linear(1, 1), Encoder(tokenizer), {"real_authors": [FACT]})
    with pytest.raises(ValueError, match=r"The set forget needs rows with .*'paraphrased_answer'"):
        evaluation.tofu_metrics(nn.Linear(1, 1), Encoder(tokenizer), {"forget": [FACT]})
