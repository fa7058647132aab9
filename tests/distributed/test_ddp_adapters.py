"""Two processes over gloo do with adapters what one process does on the same rows."""

import pytest
import torch

from hf_sharp import SharpTrainer, sam
from models import mlp_rows
from peft_models import METHODS, added, lora_mlp, trainables
from ranks import results_of
from training import train


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return results_of("two_ranks_adapters.py", 2, tmp_path_factory.mktemp("ddp"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_are_one_process(name, two_ranks, tmp_path):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one = train(SharpTrainer, lora_mlp(), mlp_rows(40), tmp_path, method=METHODS[name](), **sizes)
    mine = torch.cat([trainables(one.model), added(one)])
    torch.testing.assert_close(two_ranks[name]["weights"], mine, rtol=0, atol=1e-12)
    assert two_ranks[name]["spread"] == 0


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["sam", "nbar", "obar"])
def test_shards_are_one_process(name, two_ranks, tmp_path):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    method = sam(0.1) if name == "sam" else METHODS[name]()
    one = train(SharpTrainer, lora_mlp(), mlp_rows(40), tmp_path, method=method, **sizes)
    torch.testing.assert_close(two_ranks["sharded"][name], trainables(one.model), rtol=0, atol=1e-12)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["bi_lora", "flat_lora"])
def test_what_cannot_be_sharded_says_so(name, two_ranks):
    assert "does not work with sharded parameters (FSDP). Use DDP, or bar" in two_ranks["refused"][name]
