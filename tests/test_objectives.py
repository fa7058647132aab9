"""Objectives against closed forms by plain loops in float64: values and gradients."""

import functools

import pytest
import torch

import unlearning_references as loops
from hf_sharp import DPO, IDK, NPO, RMU, GradientAscent, GradientDifference, SimNPO
from hf_sharp.unlearning._objectives import Models
from hf_sharp.unlearning._objectives.names import OBJECTIVES, options_of, read_objective

VOCABULARY = 7


class Bigram(torch.nn.Module):
    """logits[b, t] = W[x[b, t]], with a layer whose output is W[x[b, t]] too."""

    def __init__(self, seed, dtype=torch.float64):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        table = torch.randn(VOCABULARY, VOCABULARY, generator=draw, dtype=torch.float64)
        self.blocks = torch.nn.ModuleList([torch.nn.Embedding(VOCABULARY, VOCABULARY, _weight=table.to(dtype))])
        self.calls = 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        return {"logits": self.blocks[0](input_ids)}


def pair(dtype=torch.float64):
    model = Bigram(1, dtype)
    return model, Models(model, model, shifted=True, frozen=Bigram(2, dtype))


def padded(lengths, prompts, left, seed, width=9):
    """Rows of these lengths, padded on one side to a common width, of which the prompts' labels do not count."""
    draw = torch.Generator().manual_seed(seed)
    ids, labels, mask = (torch.full((len(lengths), width), value) for value in (0, -100, 0))
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        at = slice(width - length, width) if left else slice(0, length)
        ids[row, at] = torch.randint(VOCABULARY, (length,), generator=draw)
        mask[row, at] = 1
        start = (width - length if left else 0) + prompt
        labels[row, start : start + length - prompt] = ids[row, start : start + length - prompt]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch(left=False):
    """Four rows of unequal length; no label of the third counts."""
    part = padded((9, 4, 5, 7), (2, 1, 5, 0), left, seed=3)
    return {**part, "alternative": padded((6, 8, 5, 3), (1, 0, 2, 1), left, seed=4)}


CASES = {
    "gradient_ascent": (GradientAscent(), loops.ascent, {}),
    "bounded": (GradientAscent(max_nll=2.6), loops.ascent, {"max_nll": 2.6}),
    "gradient_difference": (GradientDifference(), loops.ascent, {}),
    "npo": (NPO(beta=0.3), loops.npo, {"beta": 0.3}),
    "simnpo": (SimNPO(beta=2.5, gamma=0.7), loops.simnpo, {"beta": 2.5, "gamma": 0.7}),
    "dpo": (DPO(beta=0.2), loops.dpo, {"beta": 0.2}),
    "idk": (IDK(), loops.idk, {}),
}


def value(term, part, models):
    part = term.prepared(part, models)
    losses, _ = term.losses(part, models)
    units = term.units(part, models)
    assert losses.shape == units.shape == part["labels"].shape[:1]
    return losses.sum() / units.sum()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_the_forget_term_is_the_papers(name, left):
    objective, rule, settings = CASES[name]
    model, models = pair()
    loss = value(objective.terms["forget"], batch(left), models)
    loss.backward()
    table = model.blocks[0].weight
    expected, gradient = loops.mean(rule, table, models.frozen.blocks[0].weight, batch(left), **settings)
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(table.grad, gradient, rtol=0, atol=1e-10)
    assert gradient.abs().max() > 1e-3


def test_the_bound_cuts_some_rows_and_not_all():
    """Else the case above would prove nothing about it."""
    table, part = Bigram(1).blocks[0].weight.tolist(), batch()
    means = [n / max(count, 1) for n, count, _ in (loops.likelihood(table, part, row) for row in (0, 1, 3))]
    assert min(means) < 2.6 < max(means)


@pytest.mark.parametrize("retain", ["nll", "kl"])
@pytest.mark.parametrize("name", [name for name in CASES if "retain" in CASES[name][0].terms])
def test_the_retain_term_is_fine_tuning_or_the_references_distribution(name, retain):
    objective = type(CASES[name][0])(retain=retain, retain_weight=3.0)
    model, models = pair()
    loss = value(objective.terms["retain"], batch(), models)
    loss.backward()
    table, rule = model.blocks[0].weight, getattr(loops, retain)
    expected, gradient = loops.mean(rule, table, models.frozen.blocks[0].weight, batch())
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(table.grad, gradient, rtol=0, atol=1e-10)
    assert objective.weights == {"forget": 1.0, "retain": 3.0}


@pytest.mark.parametrize("retain", ["hidden", "nll"])
def test_rmu_moves_the_states_by_loops(retain):
    objective = RMU(layer=0, c=4.0, seed=5, retain=retain)
    model, models = pair()
    part = batch()
    direction = objective.terms["forget"].direction(VOCABULARY)
    assert direction.min() >= 0 and direction.norm().item() == pytest.approx(1) and direction.std() > 0.01
    goals = {"forget": lambda token: (4.0 * direction).tolist()}
    if retain == "hidden":
        goals["retain"] = lambda token: models.frozen.blocks[0].weight[token].tolist()
    for name, goal in goals.items():
        loss = value(objective.terms[name], part, models)
        model.zero_grad()
        loss.backward()
        expected, gradient, count = 0.0, torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64), 0
        for ids, labels in zip(part["input_ids"].tolist(), part["labels"].tolist(), strict=True):
            for token, label in zip(ids, labels, strict=True):
                if label != -100:
                    away = [a - b for a, b in zip(model.blocks[0].weight[token].tolist(), goal(token), strict=True)]
                    expected += sum(value * value for value in away) / VOCABULARY
                    gradient[token] += torch.tensor(away, dtype=torch.float64) * 2 / VOCABULARY
                    count += 1
        assert loss.item() == pytest.approx(expected / count, abs=1e-10)
        torch.testing.assert_close(model.blocks[0].weight.grad, gradient / count, rtol=0, atol=1e-10)
    assert set(objective.terms) == {"forget", "retain"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_without_labels_changes_nothing(name):
    objective = read_objective({"objective": name, "layer": 0} if name == "rmu" else name)
    _, models = pair()
    whole = batch()
    for part in (whole, whole["alternative"]):
        part["labels"][2] = -100
    others = [0, 1, 3]
    fewer = {key: v[others] for key, v in whole.items() if key != "alternative"}
    fewer["alternative"] = {key: v[others] for key, v in whole["alternative"].items()}
    for term in objective.terms.values():
        torch.testing.assert_close(value(term, whole, models), value(term, fewer, models), rtol=0, atol=1e-12)
        losses, _ = term.losses(term.prepared(whole, models), models)
        assert losses[2] == 0 and term.units(term.prepared(whole, models), models)[2] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_of_16_bits_are_taken_in_float32(name):
    objective = read_objective({"objective": name, "layer": 0} if name == "rmu" else name)
    narrow, wide = pair(torch.bfloat16)[1], pair()[1]
    for ours, exact in ((narrow.module, wide.module), (narrow.frozen, wide.frozen)):
        exact.load_state_dict({key: tensor.double() for key, tensor in ours.state_dict().items()})
    for term in objective.terms.values():
        loss = value(term, batch(), narrow)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(value(term, batch(), wide).item(), rel=1e-5)


def test_what_a_vocabulary_rules_out_adds_nothing_to_the_divergence():
    model, models = pair()
    term, part = NPO(retain="kl").terms["retain"], batch()
    part["labels"][part["labels"] == 6] = 1
    for module in (model, models.frozen):
        with torch.no_grad():
            module.blocks[0].weight[:, 6] = -torch.inf
    loss = value(term, part, models)
    loss.backward()
    assert loss > 0.01 and model.blocks[0].weight.grad.isfinite().all()


def test_npo_is_what_it_is_known_to_be():
    """At the reference its loss is (2/beta) log 2 and its gradient that of ascent; beta towards 0 is ascent too."""
    model, models = pair()
    part = batch()
    models.frozen.load_state_dict(model.state_dict())

    def gradient(term):
        model.zero_grad()
        loss = value(term, part, models)
        loss.backward()
        return loss.item(), model.blocks[0].weight.grad.clone()

    loss, at_start = gradient(NPO(beta=0.5).terms["forget"])
    assert loss == pytest.approx(2 / 0.5 * torch.log(torch.tensor(2.0, dtype=torch.float64)).item())
    tokens = sum(len(loops.predictions(part, row)) for row in range(4))
    ascent = gradient(GradientAscent().terms["forget"])[1] * tokens / 3  # over tokens there, over three rows here
    torch.testing.assert_close(at_start, ascent, rtol=0, atol=1e-12)
    models.frozen.load_state_dict(Bigram(2).state_dict())
    torch.testing.assert_close(gradient(NPO(beta=1e-7).terms["forget"])[1], ascent, rtol=0, atol=1e-5)


def test_the_reference_is_asked_once_and_left_alone():
    _, models = pair()
    models.frozen.train()
    for name, calls in (("npo", 1), ("dpo", 2)):
        term, before = OBJECTIVES[name]().terms["forget"], models.frozen.calls
        part = term.prepared(batch(), models)
        for _ in range(3):
            losses, _ = term.losses(part, models)
            losses.sum().backward()
        assert models.frozen.calls == before + calls
        assert term.prepared(part, models)["reference_nll"] is part["reference_nll"]
    assert models.frozen.training and all(p.grad is None for p in models.frozen.parameters())


def test_the_reference_is_asked_without_dropout():
    class Dropping(Bigram):
        def forward(self, input_ids, attention_mask=None):
            return {"logits": torch.dropout(super().forward(input_ids)["logits"], 0.5, self.training)}

    model, frozen, part = Bigram(1), Dropping(2).train(), batch()
    models = Models(model, model, frozen=frozen)
    expected = models.frozen.eval()(part["input_ids"])["logits"]
    frozen.train()
    assert torch.equal(models.reference(part)["logits"], expected) and frozen.training


def test_precomputed_columns_stand_for_the_reference():
    model, models = pair()
    alone = Models(model, model)
    term, part = NPO(beta=0.3).terms["forget"], batch()
    known = term.prepared(part, models)
    torch.testing.assert_close(value(term, known, alone), value(term, part, models), rtol=0, atol=0)
    with pytest.raises(ValueError, match="none was kept"):
        value(term, part, alone)
    with pytest.raises(ValueError, match="one float a row"):
        value(term, {**part, "reference_nll": torch.zeros(3)}, alone)


def test_labels_of_their_own_positions_are_not_shifted():
    """As in encoder-decoders: the label of a position is what its own logits predict."""
    model, models = pair()
    part = batch()
    plain = Models(model, model, shifted=False)
    moved = {**part, "labels": part["labels"].roll(-1, dims=1)}
    moved["labels"][:, -1] = -100
    term = GradientDifference().terms["retain"]
    assert part["labels"][:, 0].eq(-100).sum() < 4
    torch.testing.assert_close(value(term, moved, plain), value(term, part, models), rtol=0, atol=1e-14)


REFUSED = {
    "beta": (lambda: NPO(beta=0.0), "beta is a number above 0"),
    "infinite beta": (lambda: DPO(beta=float("inf")), "beta is a number above 0"),
    "gamma": (lambda: SimNPO(gamma=float("nan")), "gamma is a number"),
    "weight": (lambda: NPO(retain_weight=-1.0), "retain_weight is a number above 0"),
    "retain": (lambda: NPO(retain="l2"), "retain is one of nll, kl or None"),
    "hidden": (lambda: SimNPO(retain="hidden"), "retain is one of nll, kl or None"),
    "bound": (lambda: GradientAscent(max_nll=0), "max_nll is a number above 0"),
    "bound beside retain": (lambda: GradientDifference(max_nll=-1.0), "max_nll is a number above 0"),
    "c": (lambda: RMU(c="20"), "c is a number above 0"),
    "layer": (lambda: RMU(layer=1.5), "layer is a layer's number or name"),
    "seed": (lambda: RMU(seed=0.1), "seed is a whole number"),
    "name": (lambda: read_objective("nop"), "one of gradient_ascent, .*rmu; got 'nop'"),
    "no name": (lambda: read_objective({"beta": 0.1}), "got None"),
    "setting": (lambda: read_objective({"objective": "npo", "rho": 1}), "'npo' has no setting rho. It takes retain,"),
    "another thing": (lambda: read_objective(3), "objective is an Objective"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_right_are_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def _without(part, *names):
    return {name: column for name, column in part.items() if name not in names}


UNREADABLE = {
    "no labels": (GradientAscent(), lambda part: _without(part, "labels"), "labels of shape .rows, tokens.*NoneType"),
    "one label a row": (GradientAscent(), lambda p: {**p, "labels": p["labels"][:, 0]}, "got .4,."),
    "no alternative": (DPO(), lambda part: _without(part, "alternative"), "under 'alternative'"),
    "too few": (IDK(), lambda p: {**p, "alternative": {k: v[:2] for k, v in p["alternative"].items()}}, "got 2 alter"),
    "no such layer": (RMU(layer=1), lambda part: part, "a number from 0 to below 1"),
    "no such name": (RMU(layer="mlp"), lambda part: part, "'mlp' fits .."),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_batches_that_cannot_be_read_are_refused(case):
    objective, change, message = UNREADABLE[case]
    with pytest.raises(ValueError, match=message):
        value(objective.terms["forget"], change(batch()), pair()[1])


def test_names_and_their_settings():
    for name, objective in OBJECTIVES.items():
        assert read_objective(name) == objective() and isinstance(read_objective(name), objective)
        assert eval(repr(objective()), {objective.__name__: objective}) == objective()
    assert read_objective({"objective": "npo", "beta": 0.5, "retain": "kl"}) == NPO(beta=0.5, retain="kl")
    assert set(options_of("rmu")) == {"layer", "c", "seed", "retain", "retain_weight"}


def test_a_layer_is_found_by_number_and_by_name():
    model, models = pair()
    whole = functools.partial(value, part=batch(), models=models)
    by_number, by_name = (whole(RMU(layer=layer).terms["forget"]) for layer in (0, "blocks.0"))
    assert torch.equal(by_number, by_name) and RMU(layer="blocks.0").unreached(model) == []
