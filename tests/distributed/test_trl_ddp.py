"""TRL gathers its counts over ranks inside the loss, in every pass: two processes do what one does."""

import pytest
import torch

from hf_sharp import sam
from ranks import results_of
from training import weights
from trl_toy import llama, run, sgd

pytest.importorskip("trl")


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_on_two_ranks_is_sft_in_one_process(tmp_path):
    two = results_of("two_ranks_trl.py", 2, tmp_path)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    model = llama(dropout=0.0, float64=True)
    one = run("SFT", tmp_path, sharp=True, model=model, method=sam(0.1), **sgd(), **sizes)
    torch.testing.assert_close(two["weights"], weights(one), rtol=0, atol=1e-8)  # norms and logs are float32
    assert two["spread"] == 0
    lines = one.state.log_history[:3]
    assert [line[0] for line in two["lines"]] == [line["num_tokens"] for line in lines]
    for at, key in enumerate(("num_tokens", "loss", "mean_token_accuracy", "sharp_gap")):
        assert [line[at] for line in two["lines"]] == pytest.approx([line[key] for line in lines], rel=1e-5), key
