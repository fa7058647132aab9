"""Writes the checkpoints in this folder: saved in the middle of a training, beside the weights that it ended with.

    python tests/data/checkpoints-0.1.0.dev0/make.py

They are to stay as release 0.1.0.dev0 wrote them: `tests/test_old_checkpoints.py` resumes them with the code of today.
That test takes the training from here, so this file uses public names only.

All is float64. The first weights and the data come from Python's own random numbers, which are the same everywhere.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import hf_sharp
from hf_sharp import SharpTrainer

HERE = Path(__file__).parent
# Each remembers something at step 5 that later steps use. fsam: its mask is of step 4, the next one of step 8.
# looksam: the gradient of step 3 serves steps 4 and 5. bi_lora: an auxiliary adapter and its optimizer's state.
METHODS = {
    "fsam": {"rho": 0.1, "keep": 0.3, "every": 4},
    "friendly_sam": {"rho": 0.1},
    "looksam": {"rho": 0.1, "every": 3},
    "mesa": {"decay": 0.9},
    "bi_lora": {"rho": 0.1, "rank": 2},
}
SAVED, LAST, VOCABULARY, CLASSES = 5, 9, 12, 3


class Net(nn.Module):
    """A bag of words with dropout, so that a resumed training needs the random state too."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.hidden = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = F.dropout(torch.tanh(self.hidden(self.embed(x).mean(dim=1))), 0.1, self.training)
        logits = self.head(self.norm(hidden))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def make_model(name: str) -> Any:
    """The model at its first weights; for Bi-LoRA with an adapter on the hidden layer."""
    model: Any = Net()
    if name == "bi_lora":
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["hidden"]))
    model = model.double()
    numbers = random.Random(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = [numbers.uniform(-0.7, 0.7) for _ in range(parameter.numel())]
            parameter.copy_(torch.tensor(values, dtype=torch.float64).view_as(parameter))
    return model


def make_rows() -> list[dict[str, Tensor]]:
    numbers = random.Random(1)
    return [
        {
            "x": torch.tensor([numbers.randrange(VOCABULARY) for _ in range(5)]),
            "labels": torch.tensor(numbers.randrange(CLASSES)),
        }
        for _ in range(24)
    ]


def make_trainer(name: str | None, folder: str) -> Trainer:
    """A Trainer of `LAST` steps that saves at step `SAVED`; the plain Trainer if `name` is None."""
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=LAST, learning_rate=0.02,
        use_cpu=True, report_to="none", save_strategy="steps", save_steps=SAVED, logging_steps=3, disable_tqdm=True,
    )  # fmt: skip
    given: dict[str, Any] = {"model": make_model(name or ""), "args": arguments, "train_dataset": make_rows()}
    return SharpTrainer(method={"method": name, **METHODS[name]}, **given) if name else Trainer(**given)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """The weights that were trained, by name."""
    model: Any = trainer.model
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def machine() -> dict[str, str]:
    """What last bits depend on."""
    return {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}


def main() -> None:
    """Trains, keeps the checkpoint in the middle, and writes the weights of the end."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.chdir(HERE)  # a Trainer writes down where it saved: let that be a relative path
    for name in [None, *METHODS]:
        trainer = make_trainer(name, "made")
        trainer.train()
        target = HERE / (name or "plain")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        if name:
            shutil.copytree(f"made/checkpoint-{SAVED}", target / "checkpoint")
            for unused in ("training_args.bin", "README.md"):  # no Trainer reads them when it resumes
                (target / "checkpoint" / unused).unlink(missing_ok=True)
        save_file(weights_of(trainer), target / "final.safetensors")
        shutil.rmtree("made")
    made = {"hf_sharp": hf_sharp.__version__, **machine()}
    (HERE / "made.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
