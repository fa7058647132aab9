"""What two ranks run for test_ddp_adapters.py: the methods for adapters in float64, half a window on each rank."""

import os

import torch
import torch.distributed as dist

from distributed.sharded_ranks import refused, sharded_trainer
from hf_sharp import SharpTrainer, sam
from models import mlp_rows
from peft_models import METHODS, frozen, lora_mlp, trainables
from ranks import on_each_rank
from training import train


def by_shards(method, folder: str) -> torch.Tensor:
    """The adapters after a training in which FSDP2 shards them and the weights under them."""
    model = lora_mlp()
    before = frozen(model)
    sharded_trainer(model, mlp_rows(40), folder, method=method).train()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    trained = [p.full_tensor().detach().reshape(-1) for p in model.parameters() if p.requires_grad]
    assert torch.equal(
        torch.cat([p.full_tensor().reshape(-1) for p in model.parameters() if not p.requires_grad]), before
    )
    return torch.cat(trained)


def main(folder: str) -> dict:
    results = {}
    for name, make in METHODS.items():
        model = lora_mlp()
        before = frozen(model)
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = train(SharpTrainer, model, mlp_rows(40), folder, method=make(), **sizes)
        assert trainer.accelerator.num_processes == 2 == dist.get_world_size()
        assert torch.equal(frozen(model), before)
        own = [p.detach().reshape(-1) for p in trainer._sharp_host.added.values()]
        mine = torch.cat([trainables(model), *own])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        results[name] = {"weights": mine, "spread": (both[0] - both[1]).abs().max()}
    methods = {"sam": sam(0.1), "nbar": METHODS["nbar"](), "obar": METHODS["obar"]()}
    results["sharded"] = {name: by_shards(method, os.path.join(folder, name)) for name, method in methods.items()}
    results["refused"] = {name: refused(METHODS[name](), folder, lora_mlp()) for name in ("bi_lora", "flat_lora")}
    return results


if __name__ == "__main__":
    on_each_rank(main)
