"""Two processes over gloo unlearn as one does on the same rows, of unequal length."""

import pytest
import torch

from distributed.unlearn_ranks import CELLS, SHARDED, measured, run
from ranks import results_of
from training import weights


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return results_of("unlearn_ranks.py", 2, tmp_path_factory.mktemp("ddp"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CELLS)
def test_two_ranks_are_one_process(name, two_ranks, tmp_path):
    """Each term over its own tokens or sequences on all ranks: weights, logs, and an evaluation of an odd number."""
    one, both = run(name, tmp_path, micro=4), two_ranks[name]
    torch.testing.assert_close(both["weights"], weights(one), rtol=0, atol=1e-12)
    assert both["spread"] == 0
    logs, metrics = measured(one)
    torch.testing.assert_close(both["logs"], logs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both["eval"], metrics, rtol=1e-6, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_is_whole(name, two_ranks, tmp_path):
    """FSDP2; the frozen copy is sharded as the model is."""
    one = run(name, tmp_path, micro=4)
    torch.testing.assert_close(two_ranks["sharded"][name], weights(one), rtol=0, atol=1e-12)


@pytest.mark.distributed
def test_a_mean_of_shards_is_saved_whole_and_sharded_again(two_ranks):
    torch.testing.assert_close(two_ranks["resumed"], two_ranks["uninterrupted"], rtol=0, atol=1e-12)


@pytest.mark.distributed
def test_what_ddp_would_take_for_an_error_is_refused(two_ranks):
    assert "gives 14 trainable parameters no gradient" in two_ranks["refused"]
    assert "requires_grad_(False)" in two_ranks["refused"]
