"""What two ranks run for test_ddp.py: every method on TinyMLP in float64, half of each window on each rank."""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import GradientState
from transformers import TrainerCallback

from cases import METHODS
from hf_sharp import SharpOptimizer, SharpStep, SharpTrainer, fsam, plain, sam, vasso
from models import mlp_rows, tiny_mlp, windows_of
from ranks import on_each_rank
from references import flat
from training import build, train, weights


def by_loop() -> torch.Tensor:
    """VaSSO in a hand-written loop, each rank with its half of every micro-batch."""
    GradientState._reset_state()  # the Trainers before left theirs
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    sharp = SharpStep(vasso(0.1), model, optimizer, accelerator, lambda model, batch: model(**batch)["loss"])
    for window in windows_of(mlp_rows(40), micro=4, accumulate=2):
        for batch in window:
            half = slice(2 * accelerator.process_index, 2 * accelerator.process_index + 2)
            with accelerator.accumulate(model):
                sharp.backward({key: value[half] for key, value in batch.items()})
                optimizer.step()
                optimizer.zero_grad()
    return flat(accelerator.unwrap_model(model))


def by_closure() -> torch.Tensor:
    """VaSSO by an optimizer with a closure, each rank with its half of every batch."""
    GradientState._reset_state()
    accelerator, model = Accelerator(cpu=True), tiny_mlp()
    sharp = SharpOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), vasso(0.1), model)
    model, optimizer = accelerator.prepare(model, sharp)
    for window in windows_of(mlp_rows(40), micro=8, accumulate=1):
        half = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
        mine = {key: value[half] for key, value in window[0].items()}

        def closure(batch=mine):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    return flat(accelerator.unwrap_model(model))


ASCENTS = {"plain": plain(), "sam": sam(0.1), "per_rank": sam(0.1, per_rank=True)}


def per_rank(folder: str) -> torch.Tensor:
    """SAM with an ascent for each rank, momentum SGD without clipping."""
    model = tiny_mlp()
    settings = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), None), "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    trainer = train(SharpTrainer, model, mlp_rows(40), folder, method=sam(0.1, per_rank=True), **settings)
    mine = weights(trainer)
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)
    return mine


def reductions(method, folder: str) -> int:
    """How many buckets of gradients are reduced over ranks in five steps."""
    calls = []

    def hook(state, bucket):
        calls.append(1)
        return dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                trainer.model_wrapped.register_comm_hook(None, hook)

    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = build(SharpTrainer, tiny_mlp(), mlp_rows(40), folder, method=method, callbacks=[Count()], **sizes)
    trainer.train()
    return len(calls)


def main(folder: str) -> dict:
    results = {}
    for name, method in {
        **{n: c.method() for n, c in METHODS.items()},
        "per_sample": fsam(fisher="per_sample", samples=2),
    }.items():
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        if any("index" in part.needs for _, part in method.named_parts()):
            try:
                train(SharpTrainer, tiny_mlp(), mlp_rows(40), folder, method=method, **sizes)
            except ValueError as error:
                results[name] = {"refused": str(error)}
            continue
        trainer = train(SharpTrainer, tiny_mlp(), mlp_rows(40), folder, method=method, **sizes)
        assert trainer.accelerator.num_processes == 2 == dist.get_world_size()
        mine = weights(trainer)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        gaps = [line["sharp_gap"] for line in trainer.state.log_history if "sharp_gap" in line]
        results[name] = {"weights": mine, "spread": (both[0] - both[1]).abs().max(), "gaps": gaps}
    results["per_rank"] = {"weights": per_rank(folder)}
    results["reductions"] = {name: reductions(method, folder) for name, method in ASCENTS.items()}
    results["loop"] = {"weights": by_loop()}
    results["closure"] = {"weights": by_closure()}
    return results


if __name__ == "__main__":
    on_each_rank(main)
