"""What two ranks run for test_ddp.py: every method on TinyMLP in float64, half of each window on each rank."""

import os
import sys

if __name__ == "__main__":
    sys.path[:0] = sys.argv[2].split(os.pathsep)
import torch
import torch.distributed as dist

from cases import METHODS
from doors import train, weights
from hf_sharp import SharpTrainer, fsam
from models import mlp_rows, tiny_mlp


def main(folder: str) -> None:
    results = {}
    for name, method in {
        **{n: c.method() for n, c in METHODS.items()},
        "per_sample": fsam(fisher="per_sample", samples=2),
    }.items():
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(40), folder, method=method, **sizes)
        assert trainer.accelerator.num_processes == 2 == dist.get_world_size()
        mine = weights(trainer)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        gaps = [line["sharp_gap"] for line in trainer.state.log_history if "sharp_gap" in line]
        results[name] = {"weights": mine, "spread": (both[0] - both[1]).abs().max(), "gaps": gaps}
    if dist.get_rank() == 0:
        torch.save(results, os.path.join(folder, "results.pt"))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # at interpreter exit gloo's threads can abort the process after all is done (seen with torch 2.13)


if __name__ == "__main__":
    main(sys.argv[1])
