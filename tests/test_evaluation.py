"""Measurements against closed forms of a bigram model, and against loops over the rows of a tiny Llama, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from decoding import greedy_by_loop, longest_common
from hf_sharp.evaluation import TokenScores
from hf_sharp.recipes.tasks.domains import byte_tokenizer
from hf_sharp.unlearning import _evaluation as evaluation
from hf_sharp.unlearning._evaluation.reading import reading
from models import seeded, tiny_llama

P = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]], dtype=torch.float64)  # of the next of 3 tokens


class Bigram(nn.Module):
    """Says the next token by the present one alone, by the table P; dropout would spoil it all."""

    def __init__(self, extra=0):
        super().__init__()
        self.table = nn.Parameter(P.log() + 3.0)  # logits are known up to a constant
        self.dropout = nn.Dropout(0.5)
        self.extra = extra

    def forward(self, input_ids, attention_mask):
        logits = self.dropout(self.table[input_ids])
        return SimpleNamespace(logits=torch.cat([logits[:, :1]] * self.extra + [logits], dim=1))


def row(ids, prompt=0):
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


# Transitions 1->2 (.7, the most probable), 2->0 (.6, the most probable), 0->1 (.25), 1->1 (.2).
ROWS = [row([0, 1, 2, 0], prompt=2), row([0, 1, 1], prompt=1), row([2, 0, 1, 2, 0])]
EXPECTED = [[0.7, 0.6], [0.25, 0.2], [0.6, 0.25, 0.7, 0.6]]
RIGHT = [[True, True], [False, False], [True, False, True, True]]


def close(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("extra", [0, 2])
def test_scores_are_the_bigram_tables(batch_size, extra):
    scores = evaluation.score(Bigram(extra).train(), ROWS, batch_size)
    for ours, theirs, hits, right in zip(scores.log_probs, EXPECTED, scores.greedy, RIGHT, strict=True):
        close(ours.exp(), theirs)
        assert hits.tolist() == right
    assert scores.tokens.tolist() == [2, 2, 4]
    close(scores.nll, [-math.log(0.42), -math.log(0.05), -math.log(0.063)])


def test_what_follows_from_the_scores():
    scores = evaluation.score(Bigram(), ROWS)
    close(evaluation.probability(scores), [0.42**0.5, 0.05**0.5, 0.063**0.25])
    close(evaluation.token_accuracy(scores), [1.0, 0.0, 0.75])
    close(evaluation.extraction_strength(scores), [1.0, 0.0, 0.5])  # the last: two of four tokens have to be given
    assert evaluation.perplexity(scores) == pytest.approx((0.42 * 0.05 * 0.063) ** (-1 / 8), rel=1e-12)
    numbers = evaluation.summary(scores)
    assert numbers["probability"] == pytest.approx((0.42**0.5 + 0.05**0.5 + 0.063**0.25) / 3, rel=1e-12)
    assert numbers["nll"] == pytest.approx(-math.log(0.42 * 0.05 * 0.063) / 8, rel=1e-12)
    assert numbers["token_accuracy"] == pytest.approx(1.75 / 3) and numbers["extraction_strength"] == 0.5
    close(evaluation.min_k(scores, 0.5), [math.log(0.6), math.log(0.2), math.log(0.25 * 0.6) / 2])
    close(evaluation.min_k(scores, 0.1), [math.log(0.6), math.log(0.2), math.log(0.25)])  # one token at least
    with pytest.raises(ValueError, match=r"in \(0, 1\]; got 0"):
        evaluation.min_k(scores, 0)
    with pytest.raises(ValueError, match="Example 1 has no label beyond its first token"):
        evaluation.score(Bigram(), [ROWS[0], {"input_ids": [0, 1], "labels": [0, -100]}])


def test_the_last_label_can_be_left_out():
    """Of the three rows (right, right), (wrong, wrong), (right, wrong, right, right) the last label goes."""
    scores = evaluation.score(Bigram(), ROWS).without_last()
    close(evaluation.token_accuracy(scores), [1.0, 0.0, 2 / 3])
    close(evaluation.extraction_strength(scores), [1.0, 0.0, 1 / 3])
    close(scores.nll, [-math.log(0.7), -math.log(0.25), -math.log(0.6 * 0.25 * 0.7)])
    with pytest.raises(ValueError, match="Example 0 has one label only"):
        scores.without_last()


def ragged(count, vocab=32, seed=0):
    """Rows of different lengths with prompts of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [3 + (5 * i) % 11 for i in range(count)]
    return [
        row(torch.randint(3, vocab, (n,), generator=draw).tolist(), prompt=1 + i % (n - 1))
        for i, n in enumerate(lengths)
    ]


def tiny_gpt2():
    """Positions are learned, so a shifted one would change every number."""
    with seeded(1):
        size = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=2))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model.double()


def by_loop(model, rows):
    """Row by row, unpadded, token by token, in plain Python."""
    found = []
    for each in rows:
        logits = model(input_ids=torch.tensor([each["input_ids"]])).logits[0].tolist()
        values, hits = [], []
        for t in range(1, len(each["labels"])):
            if each["labels"][t] != -100:
                before = logits[t - 1]
                values.append(before[each["labels"][t]] - math.log(math.fsum(math.exp(x) for x in before)))
                hits.append(before.index(max(before)) == each["labels"][t])
        found.append((values, hits))
    return found


@pytest.mark.parametrize("make", [lambda: tiny_llama(float64=True), tiny_gpt2], ids=["llama", "gpt2"])
def test_scores_are_those_of_single_rows(make):
    model, rows = make(), ragged(9)
    reference = by_loop(model.eval(), rows)
    model.train()
    scores = evaluation.score(model, rows, batch_size=4)
    for ours, hits, (theirs, right) in zip(scores.log_probs, scores.greedy, reference, strict=True):
        # Llama's norms and attention are float32 inside: 1e-6; its rows differ by the order of sums only.
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=2e-6)
        assert hits.tolist() == right


def test_16_bit_logits_are_normalised_in_float32():
    model, rows = tiny_llama(dropout=0.0).bfloat16(), ragged(5)
    scores = evaluation.score(model, rows, batch_size=1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits[0].double()
    labels = torch.tensor(rows[0]["labels"])
    exact = logits.log_softmax(-1)[:-1].gather(1, labels[1:, None].clamp_min(0))[labels[1:] != -100].flatten()
    torch.testing.assert_close(scores.log_probs[0], exact, rtol=0, atol=1e-6)  # bf16's own spacing here is 1e-2


def test_a_model_is_left_as_it_was():
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    evaluation.score(model, ragged(3))
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError), reading(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="encoder-decoder"):
        evaluation.score(
            T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=1)),
            ROWS,
        )


# --- what is written ---


@pytest.mark.parametrize("make", [lambda: tiny_llama(float64=True), tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_is_greedy_and_safe_from_padding(make, side):
    model = make()
    prompts = [each["input_ids"] for each in ragged(7)]
    model.eval()
    likely = greedy_by_loop(model, prompts[0], 3, eos=None)[2]
    tokenizer = SimpleNamespace(eos_token_id=likely, pad_token_id=0, padding_side=side)  # an EOS that does occur
    expected = [greedy_by_loop(model, prompt, 12, likely) for prompt in prompts]
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=5)  # which must not count
    model.train()
    assert evaluation.generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=3) == expected
    assert model.training and len(expected[0]) <= 2 and max(map(len, expected)) == 12
    with pytest.raises(ValueError, match="empty prompt"):
        evaluation.generate(model, tokenizer, [[], [1]])


def test_rouge_is_the_longest_common_subsequence_of_words():
    truth, said = "the cat sat on the mat", "a cat on the red mat sat"
    common = longest_common(truth.split(), said.split())
    assert common == 4
    recall, precision = common / 6, common / 7
    assert evaluation.rouge_l([said], [truth]) == pytest.approx([recall])
    assert evaluation.rouge_l([said], [truth], "precision") == pytest.approx([precision])
    f1 = 2 * precision * recall / (precision + recall)
    assert evaluation.rouge_l([said], [truth], "fmeasure") == pytest.approx([f1])
    assert evaluation.rouge_l(["cats"], ["cat"]) == [1.0] and evaluation.rouge_l(["cats"], ["cat"], stemmer=False) == [
        0.0
    ]
    with pytest.raises(ValueError, match="recall, precision or fmeasure"):
        evaluation.rouge_l([said], [truth], "f1")
    with pytest.raises(ValueError, match="1 predictions do not belong to 2 references"):
        evaluation.rouge_l([said], [truth, truth])


class Parrot(nn.Module):
    """Answers each prompt with the tokens it is told."""

    def __init__(self, answers):
        super().__init__()
        self.weight, self.answers = nn.Parameter(torch.zeros(1)), answers

    def generate(self, input_ids, attention_mask, **settings):
        prompts = [tuple(i[m == 1].tolist()) for i, m in zip(input_ids, attention_mask, strict=True)]
        answers = [self.answers[prompt][: settings["max_new_tokens"]] for prompt in prompts]
        longest = max(map(len, answers))
        padded = [answer + [settings["pad_token_id"]] * (longest - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([" one two three four five six seven eight nine ten"] * 3, size=300)


def test_rouge_of_answers_and_verbatim_memory(tokenizer):
    words = "one two three four five six seven eight".split()
    ids = [tokenizer(f" {word}")["input_ids"] for word in words]
    assert all(len(each) == 1 for each in ids)
    text = [each[0] for each in ids]
    eos = tokenizer.eos_token_id
    model = Parrot({(text[0],): [text[2], text[4], eos], (text[1], text[0]): [text[3], eos, text[2]]})
    answers = ["three four five six", "three"]
    found = evaluation.rouge_l_recall(model, tokenizer, [[text[0]], [text[1], text[0]]], answers)
    assert found == pytest.approx([2 / 4, 0.0])
    # Given two tokens, five are compared: 3 4 5 6 7 with 3 5 6 8 2, of which 3 5 6 agree.
    model = Parrot({tuple(text[:2]): [text[2], text[4], text[5], text[7], text[1]]})
    assert evaluation.verbatim_memory(model, tokenizer, [text], 2, max_new_tokens=5) == pytest.approx([3 / 5])
    with pytest.raises(ValueError, match="prompt_tokens=8 leaves nothing before or after it in text 0"):
        evaluation.verbatim_memory(model, tokenizer, [text], 8)


# --- membership ---


def test_auc_is_that_of_the_roc_curve():
    draw = torch.Generator().manual_seed(0)
    members = torch.randint(0, 9, (30,), generator=draw) + 2.0
    others = torch.randint(0, 9, (40,), generator=draw) + 0.0  # with many ties
    expected = roc_auc_score([1] * 30 + [0] * 40, torch.cat([members, others]).numpy())
    assert evaluation.auc(members, others) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="scores of members and of others"):
        evaluation.auc(members, others[:0])


def test_privleak_has_the_sign_of_muse():
    assert evaluation.privleak(1.0, 0.5) == -100  # still known by heart
    assert evaluation.privleak(0.5, 0.5) == 0
    assert evaluation.privleak(0.0, 0.5) == 100  # stranger than what was never seen
    assert evaluation.privleak(0.7, 0.6) == pytest.approx(100 * (0.3 - 0.4) / 0.4)
    with pytest.raises(ValueError, match="nothing to divide by"):
        evaluation.privleak(0.5, 1.0)


def test_token_scores_of_no_model():
    scores = TokenScores([torch.tensor([-1.0, -3.0]).double()], [torch.tensor([False, True])])
    assert float(scores.mean_nll) == 2.0 and evaluation.extraction_strength(scores).tolist() == [0.5]
