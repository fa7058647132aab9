"""What two ranks run for test_fsdp.py: every method on TinyMLP in float64, its parameters sharded by FSDP2.

Accelerate offers FSDP on GPUs only, so its state is set by hand; from `prepare` on the code is the installed one.
"""

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from cases import METHODS
from hf_sharp import SharpStep, SharpTrainer, Sum, fsam, plain, sam
from models import mlp_rows, tiny_mlp, windows_of
from ranks import on_each_rank
from term_rows import SETTINGS, pairs
from training import build

SIZES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
RESUMED = ("fsam", "looksam", "friendly_sam", "tram_previous")


def shard(accelerator: Accelerator, **settings) -> None:
    """Put FSDP2 into Accelerate's state, each linear layer a unit of its own."""
    defaults = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["Linear"],
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "FULL_STATE_DICT",
    }
    plugin = FullyShardedDataParallelPlugin(**(defaults | settings))
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2


def afresh() -> None:
    """What the Accelerator before left is forgotten."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def sharded_trainer(model, rows, folder, plugin=None, **settings) -> SharpTrainer:
    afresh()
    trainer = build(SharpTrainer, model, rows, folder, **(SIZES | settings))
    shard(trainer.accelerator, **(plugin or {}))
    trainer.is_fsdp_enabled = True
    assert trainer.accelerator.num_processes == dist.get_world_size() == 2
    return trainer


def whole(model) -> torch.Tensor:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    return torch.cat([p.full_tensor().detach().reshape(-1) for p in parameters])


def trained(trainer) -> dict:
    trainer.train()
    gaps = [line["sharp_gap"] for line in trainer.state.log_history if "sharp_gap" in line]
    return {"weights": whole(trainer.model), "gaps": gaps}


def refused(method, folder: str, model=None) -> str:
    try:
        sharded_trainer(model or tiny_mlp(), mlp_rows(40), folder, method=method).train()
    except ValueError as error:
        return str(error)
    return ""


def by_method(name: str, folder: str) -> dict:
    method = METHODS[name].method()
    if METHODS[name].visits:
        return {"refused": refused(method, folder)}
    return trained(sharded_trainer(tiny_mlp(), mlp_rows(40), folder, method=method))


def by_loop() -> torch.Tensor:
    """SAM in a hand-written loop, each rank with its half of every micro-batch."""
    afresh()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    shard(accelerator)
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    sharp = SharpStep(sam(0.1), model, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    for window in windows_of(mlp_rows(40), micro=4, accumulate=2):
        for batch in window:
            half = slice(2 * accelerator.process_index, 2 * accelerator.process_index + 2)
            with accelerator.accumulate(model):
                sharp.backward({key: value[half] for key, value in batch.items()})
                optimizer.step()
                optimizer.zero_grad()
    return whole(model)


def resumed(name: str, folder: str) -> torch.Tensor:
    """Saved at step 3 and gone on with by another Trainer, whose model starts elsewhere."""
    settings = {"save_strategy": "steps", "save_steps": 3, "optim": "sgd", "optim_args": "momentum=0.9"}
    sharded_trainer(tiny_mlp(), mlp_rows(40), folder, method=METHODS[name].method(), **settings).train()
    later = sharded_trainer(tiny_mlp(seed=1), mlp_rows(40), folder, method=METHODS[name].method(), **settings)
    later.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-3"))
    return whole(later.model)


def evaluated(folder: str) -> torch.Tensor:
    """Forwards without a backward after each step: modules that stay gathered must not be taken for shards."""
    trainer = sharded_trainer(
        tiny_mlp(),
        mlp_rows(40),
        folder,
        method=sam(0.1),
        eval_dataset=mlp_rows(8),
        eval_strategy="steps",
        eval_steps=1,
    )
    return trained(trainer)["weights"]


def kept_gathered(name: str, folder: str) -> torch.Tensor:
    """Modules keep what they have gathered from a forward to the backward, or to the next forward."""
    plugin = {"reshard_after_forward": False}
    method = METHODS[name].method()
    return trained(sharded_trainer(tiny_mlp(), mlp_rows(40), folder, plugin=plugin, method=method))["weights"]


def in_bf16(folder: str) -> dict:
    """float32 shards and bf16 forwards: what was measured of one shift that is small against bf16's spacing."""
    policy = {"mixed_precision_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    model = tiny_mlp(float64=False, hidden=16384)
    trainer = sharded_trainer(model, mlp_rows(40), folder, plugin=policy, method=sam(0.005), max_steps=1)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return {key: trainer.state.log_history[0][key] for key in ("sharp_component", "sharp_noise")}


def main(folder: str) -> dict:
    results = {name: by_method(name, os.path.join(folder, name)) for name in METHODS}
    results["resumed"] = {name: resumed(name, os.path.join(folder, f"resumed_{name}")) for name in RESUMED}
    results["evaluated"] = evaluated(os.path.join(folder, "evaluated"))
    results["gathered"] = {name: kept_gathered(name, folder) for name in ("sam", "tram_previous", "looksam")}
    results["loop"] = by_loop()
    terms = Sum(forget=sam(0.1), retain=plain(), weights={"retain": 2.0})
    results["terms"] = trained(sharded_trainer(tiny_mlp(), pairs(40), folder, method=terms, **SETTINGS))["weights"]
    results["bf16"] = in_bf16(folder)
    results["refused"] = {
        "per_rank": refused(sam(0.1, per_rank=True), folder),
        "per_sample": refused(fsam(fisher="per_sample", samples=2), folder),
    }
    return results


if __name__ == "__main__":
    on_each_rank(main)
