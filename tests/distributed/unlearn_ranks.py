"""What two ranks run for test_unlearn_ddp.py: unlearning in float64, half of each window on each rank."""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from distributed.sharded_ranks import afresh, shard, whole
from hf_sharp import (
    DPO,
    NPO,
    RMU,
    GradientDifference,
    WeightAveraging,
    curvature_regularization,
    fsam,
    randomized_smoothing,
    sam,
    tram,
)
from ranks import on_each_rank
from training import weights
from unlearn_runs import build, lora, pairs, tiny_gpt2, unlearn

CELLS = {
    "npo_sam": (NPO(beta=0.1, retain_weight=2.0), lambda: sam(0.1)),
    "kl_fsam": (NPO(beta=0.1, retain="kl"), lambda: fsam(0.1, keep=0.5)),
    "difference_rs": (GradientDifference(), lambda: randomized_smoothing(0.02)),
    "dpo_tram": (DPO(beta=0.2), lambda: tram("noise", sigma=0.5, scale=5.0)),
    "lora_kl_sam": (NPO(beta=0.1, retain="kl"), lambda: sam(0.1)),
    "rmu_cr": (RMU(layer=0, c=2.0, retain_weight=3.0), lambda: curvature_regularization(0.2, mu=0.05, r=0.02)),
}
SHARDED = ("kl_fsam", "dpo_tram", "lora_kl_sam", "rmu_cr")


def model_of(name):
    """For RMU with what its layer does not reach frozen, as DDP demands."""
    model = lora() if name.startswith("lora") else tiny_gpt2()
    if name.startswith("rmu"):
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("h.0." in parameter_name)
    return model


def run(name, folder, micro):
    objective, make = CELLS[name]
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 2, "max_steps": 3, "optim": "sgd"}
    own = {"objective": objective, "method": make and make(), "callbacks": [WeightAveraging(2, every=1)]}
    sizes |= {"eval_strategy": "no", "per_device_eval_batch_size": micro}
    return unlearn(model_of(name), folder, eval_dataset=pairs(11), **own, **sizes)


def measured(trainer):
    logs = [[line[k] for k in ("loss", "loss_forget", "loss_retain")] for line in trainer.state.log_history[:3]]
    metrics = trainer.evaluate()
    return torch.tensor(logs), torch.tensor([metrics["eval_loss_forget"], metrics["eval_loss_retain"]])


def sharded(name, folder, **settings):
    """Under FSDP2, each block a unit of its own; Accelerate offers that on GPUs only, so its state is set by hand."""
    afresh()
    objective, make = CELLS[name]
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "optim": "sgd"}
    own = {"objective": objective, "method": make and make(), "callbacks": [WeightAveraging(2, every=1)]}
    trainer = build(model_of(name), folder, **own, **(sizes | settings))
    shard(trainer.accelerator, transformer_cls_names_to_wrap=["GPT2Block"])
    trainer.is_fsdp_enabled = True
    return trainer


def main(folder: str) -> dict:
    results = {}
    for name in CELLS:
        trainer = run(name, folder, micro=2)
        assert trainer.accelerator.num_processes == 2 == dist.get_world_size()
        mine = weights(trainer)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        logs, metrics = measured(trainer)
        results[name] = {"weights": mine, "spread": (both[0] - both[1]).abs().max(), "logs": logs, "eval": metrics}
    try:
        build(tiny_gpt2(), folder, objective=RMU(layer=0))
    except ValueError as error:
        results["refused"] = str(error)
    results["sharded"] = {}
    for name in SHARDED:
        trainer = sharded(name, os.path.join(folder, name))
        trainer.train()
        results["sharded"][name] = whole(trainer.model)
        assert trainer._frozen is None or isinstance(trainer._frozen, FSDPModule)
    saving = {"save_strategy": "steps", "save_steps": 2, "optim_args": "momentum=0.9"}
    first = sharded("npo_sam", os.path.join(folder, "saved"), **saving)
    first.train()
    uninterrupted = whole(first.model)
    later = sharded("npo_sam", os.path.join(folder, "saved"), **saving)
    later.train(resume_from_checkpoint=os.path.join(folder, "saved", "checkpoint-2"))
    results["resumed"] = whole(later.model)
    results["uninterrupted"] = uninterrupted
    return results


if __name__ == "__main__":
    on_each_rank(main)
