"""What two ranks run for test_trl_ddp.py: SFT with SAM, half of each micro-batch on each rank."""

import torch
import torch.distributed as dist

from hf_sharp import sam
from ranks import on_each_rank
from training import weights
from trl_toy import llama, run, sgd


def main(folder: str) -> dict:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    model = llama(dropout=0.0, float64=True)
    trainer = run("SFT", folder, sharp=True, model=model, method=sam(0.1), **sgd(), **sizes)
    assert trainer.accelerator.num_processes == 2 == dist.get_world_size()
    mine = weights(trainer)
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    keys = ("num_tokens", "loss", "mean_token_accuracy", "sharp_gap")
    lines = [[float(line[key]) for key in keys] for line in trainer.state.log_history[:3]]
    return {"weights": mine, "spread": (both[0] - both[1]).abs().max(), "lines": lines}


if __name__ == "__main__":
    on_each_rank(main)
