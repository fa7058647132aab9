"""What four ranks run for test_fsdp.py: parameters sharded over two ranks, with a copy on the other two (HSDP)."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cases import METHODS
from distributed.sharded_ranks import whole
from hf_sharp import SharpOptimizer
from models import mlp_rows, tiny_mlp, windows_of
from ranks import on_each_rank

NAMES = ("sam", "asam", "fsam", "gsam", "looksam", "randomized_smoothing")


def trained(name: str, mesh) -> torch.Tensor:
    """One row of each micro-batch on each rank, through a closure."""
    model = tiny_mlp()
    for module in (model.hidden, model.head, model):
        fully_shard(module, mesh=mesh)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SharpOptimizer(base, METHODS[name].method(), model)
    for (batch,) in windows_of(mlp_rows(20), micro=4, accumulate=1):
        row = slice(dist.get_rank(), dist.get_rank() + 1)

        def closure(row=row, batch=batch):
            optimizer.zero_grad()
            loss = model(**{key: value[row] for key, value in batch.items()})["loss"]
            loss.backward()
            return loss

        optimizer.step(closure)
    return whole(model)


def main(folder: str) -> dict:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    results = {name: trained(name, mesh) for name in NAMES}
    everyone = [torch.empty_like(results["fsam"]) for _ in range(4)]
    dist.all_gather(everyone, results["fsam"])
    results["spread"] = torch.stack([(other - everyone[0]).abs().max() for other in everyone]).max()
    return results


if __name__ == "__main__":
    on_each_rank(main)
