"""Two tasks on one encoder, SAM where labels are wrong, plain where they are right: python examples/multi_task.py."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import BertConfig, BertModel, TrainingArguments, set_seed

from hf_sharp import SAM, Perturbation, Plain, SharpTrainer, Sum


class TwoHeads(nn.Module):
    """An encoder with a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.accepts_loss_kwargs = False  # the losses are means over the batch
        config: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        self.encoder = BertModel(BertConfig(vocab_size=100, **config))
        self.heads = nn.ModuleDict({"upper": nn.Linear(32, 2), "even": nn.Linear(32, 2)})

    def forward(self, input_ids: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """Answer the task whose labels there are."""
        ((name, label),) = labels.items()
        logits = self.heads[name](self.encoder(input_ids=input_ids).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, label), "logits": logits}


def rows(count: int, seed: int, noise: float = 0.0) -> list[dict[str, dict[str, Tensor]]]:
    """Numbers to read for each task: are most in the upper half (some answers are wrong), are most even?"""
    draw = torch.Generator().manual_seed(seed)
    first, second = torch.randint(100, (2, count, 16), generator=draw)
    upper = ((first >= 50).sum(1) > 8) ^ (torch.rand(count, generator=draw) < noise)
    tasks = {"upper": (first, upper.long()), "even": (second, (second % 2 == 0).sum(1).gt(8).long())}
    return [{name: {"input_ids": x[i], name: y[i]} for name, (x, y) in tasks.items()} for i in range(count)]


def main(steps: int = 500) -> float:
    set_seed(0)
    model, data = TwoHeads(), rows(4000, seed=0, noise=0.1)
    settings: Any = {"learning_rate": 3e-3, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    settings |= {"per_device_train_batch_size": 32, "max_steps": steps, "dataloader_pin_memory": False}
    method = Sum(upper=SAM(Perturbation(rho=0.02)), even=Plain(), weights={"even": 0.5})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, save_strategy="no", **settings)
        SharpTrainer(model, args, default_collate, data, method=method).train()
    scores = []
    for name, part in default_collate(rows(512, seed=1)).items():
        scores.append(float((model.eval()(**part)["logits"].argmax(-1) == part[name]).float().mean()))
    print(f"accuracy: upper {scores[0]:.3f}, even {scores[1]:.3f}")
    return min(scores)


if __name__ == "__main__":
    main()
