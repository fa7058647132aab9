"""What two ranks run for test_ddp_options.py: loops in which DDP has options of its own."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import GradientState

from cases import METHODS
from hf_sharp import SharpStep, SharpTrainer, fsam, sam
from models import TinyMLP, mlp_rows, tiny_mlp, windows_of
from ranks import on_each_rank
from references import flat
from training import train, weights

VIEWS = ["gsam", "looksam", "wsam", "gam", "vasso", "gradient_penalty", "curvature_regularization", "sam"]
STATIC = {
    "sam": lambda: sam(0.1),
    "per_rank": lambda: sam(0.1, per_rank=True),
    "fraction": lambda: sam(0.1, fraction=0.5),
    "per_sample": lambda: fsam(fisher="per_sample", samples=2),
}


INFLATED = ["sam", "mesa", "fisher_sam", "tram_fisher"]


class IgnoresItems(TinyMLP):
    """A mean over the micro-batch, whatever number of items it is told."""

    accepts_loss_kwargs = True

    def forward(self, x, labels=None, **keywords):
        return super().forward(x, labels)


def inflated(name: str, folder: str) -> torch.Tensor:
    """Weights of a Trainer whose loss is a mean over each rank's micro-batch: four times that of the window."""
    model = IgnoresItems().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    settings = {"lr_scheduler_type": "constant", "optimizers": (optimizer, None), **sizes}
    return weights(train(SharpTrainer, model, mlp_rows(40), folder, method=METHODS[name].method(), **settings))


def loop(method, accumulate: int, **options) -> torch.Tensor:
    """Weights after five steps, each rank with its half of every micro-batch."""
    GradientState._reset_state()
    handlers = [DistributedDataParallelKwargs(**options)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, kwargs_handlers=handlers)
    assert accelerator.num_processes == 2
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    known = {"total_steps": 5, "warmup_steps": 0}
    sharp = SharpStep(method, model, optimizer, accelerator, lambda model, batch: model(**batch)["loss"], **known)
    for window in windows_of(mlp_rows(40), micro=4, accumulate=accumulate)[:5]:
        for batch in window:
            half = slice(2 * accelerator.process_index, 2 * accelerator.process_index + 2)
            with accelerator.accumulate(model):
                sharp.backward({key: value[half] for key, value in batch.items()})
                optimizer.step()
                optimizer.zero_grad()
    return flat(accelerator.unwrap_model(model))


def main(folder: str) -> dict:
    results = {}
    for name in VIEWS:
        for accumulate in (1, 2):
            views = loop(METHODS[name].method(), accumulate, gradient_as_bucket_view=True)
            results[f"{name} {accumulate}"] = views
    results["per_sample"] = loop(STATIC["per_sample"](), 1)
    for name, make in STATIC.items():
        try:
            results[f"static {name}"] = loop(make(), 1, static_graph=True)
        except ValueError as error:
            results[f"static {name}"] = str(error)
    for name in INFLATED:
        results[f"inflated {name}"] = inflated(name, folder)
    return results


if __name__ == "__main__":
    on_each_rank(main)
