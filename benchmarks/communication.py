"""How much do the processes of a training say to each other? Collectives and bytes an optimizer step, DDP and FSDP2.

    torchrun --nproc_per_node 2 benchmarks/communication.py
    torchrun --nproc_per_node 2 benchmarks/communication.py --accumulate 4 --method sam sam:per_rank=true fsam looksam
    torchrun --nproc_per_node 2 benchmarks/communication.py --fsdp --use_cpu --method plain sam fsam looksam

A method is a preset's name, with its options after a colon. Counted is every collective operation that reaches the
communication library, whoever asked for it: DDP, FSDP, the Trainer or the method. The unit is the size of the model's
gradients. A count says nothing of time; so it is the same over gloo on CPUs as on GPUs. Messages of less than a
hundredth of a model (a number of items, a loss) are listed by themselves.
"""

import argparse
import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import transformers
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments, set_seed

from hf_sharp import SharpConfig, SharpTrainer

METHODS = ["plain", "sam", "sam:per_rank=true", "sam:fraction=0.25", "fsam", "sam_on", "gsam", "friendly_sam"]
METHODS += ["looksam:every=5", "msam", "previous_gradient_sam", "tram:reference=previous", "mesa", "gam"]
METHODS += ["randomized_smoothing:samples=3"]
WARM = 2  # DDP sorts its buckets anew after the first step
KINDS = {"allreduce": "all-reduce", "allgather_base": "all-gather", "reduce_scatter_base": "reduce-scatter"}


class Collectives(TorchDispatchMode):
    """While open, remembers the name and the bytes of every collective; DDP's and functional ones come by here too.

    The bytes are those of the larger of input and output: of an all-gather what is gathered, of a reduce-scatter what
    is reduced, of an all-reduce both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            tensors = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)] for arg in args]
            sizes = [sum(t.numel() * t.element_size() for t in leaves) for leaves in tensors]
            self.seen.append((name.partition("::")[2].strip("_"), max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    """Cuts what was seen into optimizer steps."""

    def __init__(self, collectives: Collectives):
        self.collectives, self.steps = collectives, []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(list(self.collectives.seen))
        self.collectives.seen.clear()


def config_of(text: str) -> SharpConfig:
    """A preset's name with options, such as `looksam:every=5,alpha=0.5`."""
    name, _, options = text.partition(":")
    pairs = (pair.split("=", 1) for pair in options.split(",") if pair)
    return SharpConfig.from_dict({"method": name} | {key: yaml.safe_load(value) for key, value in pairs})


def model_of(hidden: int) -> Any:
    set_seed(0)
    size: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": 4, "num_attention_heads": 4}
    size |= {"vocab_size": 4000, "max_position_embeddings": 64, "intermediate_size": 4 * hidden}
    model: Any = BertForSequenceClassification(BertConfig(**size))
    model.accepts_loss_kwargs = False  # transformers#47688: the head ignores num_items_in_batch
    return model


def shard(trainer: Any) -> None:
    """Put FSDP2 into Accelerate's state by hand, which offers it on GPUs only; every encoder layer is a unit."""
    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
    )
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def afresh() -> None:
    """Forget what the training before has put into Accelerate's state."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def count(name: str, options: argparse.Namespace) -> list[list[tuple[str, int]]]:
    """The collectives of every step of a short training."""
    rows = [
        {"input_ids": ids, "labels": ids[0] % 2}
        for ids in torch.randint(5, 4000, (512, 8), generator=torch.Generator().manual_seed(0))
    ]
    if options.fsdp:
        afresh()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=4, gradient_accumulation_steps=options.accumulate,
            max_steps=WARM + options.steps, use_cpu=options.use_cpu or not torch.cuda.is_available(), report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True)  # fmt: skip
        collectives = Collectives()
        steps = Steps(collectives)
        trainer = SharpTrainer(
            model=model_of(options.hidden),
            args=arguments,
            train_dataset=rows,
            method=config_of(name),
            callbacks=[steps],
        )
        if options.fsdp:
            shard(trainer)
        with collectives:
            trainer.train()
        assert trainer.accelerator.num_processes == dist.get_world_size() > 1
    return steps.steps[WARM:]


def row(name: str, steps: list[list[tuple[str, int]]], model_bytes: int) -> str:
    """A line of the table: means over the steps."""
    seen = [each for step in steps for each in step]
    large = [(kind, size) for kind, size in seen if size >= model_bytes / 100]
    small = [size for _, size in seen if size < model_bytes / 100]
    sent = {kind: sum(size for k, size in large if k == kind) / model_bytes for kind in sorted({k for k, _ in large})}
    models = ", ".join(f"{value / len(steps):.2f} {KINDS.get(kind, kind)}" for kind, value in sent.items())
    cells = [name, f"{config_of(name).build().cost:.3g}", models, f"{len(large) / len(steps):.1f}"]
    cells += [f"{len(small) / len(steps):.1f}", f"{sum(small) / len(steps):.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=METHODS)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--steps", type=int, default=20, help="counted; whole periods of methods that have one")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="with --use_cpu; on GPUs launch with fsdp2.yaml instead")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise SystemExit("communication.py: start it with torchrun --nproc_per_node 2, or more.")
    if options.fsdp and not options.use_cpu:
        raise SystemExit(
            "communication.py: on GPUs use accelerate launch --config_file recipes/accelerate/fsdp2.yaml."
        )
    transformers.logging.set_verbosity_error()
    for name in options.method:
        config_of(name).build()
    model_bytes = sum(p.numel() * p.element_size() for p in model_of(options.hidden).parameters())
    lines = [row(name, count(name, options), model_bytes) for name in options.method]
    if dist.get_rank() == 0:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"\n{dist.get_world_size()} processes over {dist.get_backend()}; {versions}; {vars(options)}")
        print(f"model: {model_bytes / 1e6:.1f} MB of gradients\n")
        print("| method | passes | models a step | in collectives | small messages | their bytes |")
        print("|---|---|---|---|---|---|")
        print("\n".join(lines))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # at interpreter exit gloo's threads can abort the process after all is done (seen with torch 2.13)


if __name__ == "__main__":
    main()
