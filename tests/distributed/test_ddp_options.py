"""Options of DDP: gradients as views of its buckets change nothing, a static graph is refused where it cannot be."""

import pytest
import torch

from cases import METHODS
from hf_sharp import sam
from hf_sharp._integrations.refusals import refuse_static_graph
from models import mlp_rows, tiny_mlp, windows_of
from ranks import results_of
from references import functional, sgd, trajectory

VIEWS = ["gsam", "looksam", "wsam", "gam", "vasso", "gradient_penalty", "curvature_regularization", "sam"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return results_of("two_ranks_options.py", 2, tmp_path_factory.mktemp("options"))


@pytest.mark.distributed
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", VIEWS)
def test_gradients_that_are_views_of_buckets_are_kept_as_they_were(name, accumulate, two_ranks):
    """The right value is the dense program's, whose gradients nobody writes into."""
    case = METHODS[name]
    w, layout, loss_fn = functional(tiny_mlp())
    windows = windows_of(mlp_rows(40), micro=4, accumulate=accumulate)
    path = trajectory(case.rule, loss_fn, w, windows, sgd(0.05, momentum=0.9), 5, layout=layout, **case.settings)
    torch.testing.assert_close(two_ranks[f"{name} {accumulate}"], path[-1], rtol=0, atol=case.tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["per_rank", "fraction"])
def test_a_static_graph_is_refused_where_passes_are_not_reduced(name, two_ranks):
    assert "SAM with per_rank=True or fraction= makes passes whose gradients DDP" in two_ranks[f"static {name}"]
    assert "Leave static_graph" in two_ranks[f"static {name}"]


@pytest.mark.distributed
def test_and_right_where_they_are(two_ranks):
    w, layout, loss_fn = functional(tiny_mlp())
    windows = windows_of(mlp_rows(40), micro=4, accumulate=1)
    rule = METHODS["sam"].rule
    path = trajectory(rule, loss_fn, w, windows, sgd(0.05, momentum=0.9), 5, layout=layout, rho=0.1)
    torch.testing.assert_close(two_ranks["static sam"], path[-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(two_ranks["static per_sample"], two_ranks["per_sample"], rtol=0, atol=1e-12)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["sam", "mesa", "fisher_sam", "tram_fisher"])
def test_a_loss_that_grows_with_ranks_and_micro_batches_makes_longer_steps_of_the_same_method(name, two_ranks):
    case = METHODS[name]
    w, layout, loss_fn = functional(tiny_mlp())
    windows = windows_of(mlp_rows(40), micro=4, accumulate=2)
    update = sgd(4 * 0.02, momentum=0.9)  # two ranks, two micro-batches
    path = trajectory(case.rule, loss_fn, w, windows, update, 5, layout=layout, **case.settings)
    torch.testing.assert_close(two_ranks[f"inflated {name}"], path[-1], rtol=0, atol=1e-12)


def test_only_such_methods_are_refused():
    for method in (sam(0.1, per_rank=True), sam(0.1, fraction=0.5), sam(0.1, fraction=0.5, interval=2)):
        refuse_static_graph(method, static=False)
        with pytest.raises(ValueError, match=r"^SAM with per_rank=True or fraction="):
            refuse_static_graph(method, static=True)
    for case in METHODS.values():
        method = case.method()
        if not any(getattr(part, "fraction", 1) < 1 for _, part in method.named_parts()):
            refuse_static_graph(method, static=True)
