"""Of next to no strength, every method is plain training: the Trainer's twin in 26 situations easily got wrong.

Weights, logged losses, gradient norms and learning rates of three steps in float64. Every method occurs in some
situations and every situation with some methods, the same ones in every run.
"""

import functools
import itertools
import random

import numpy
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import peft_models
from cases import METHODS
from hf_sharp import SharpTrainer, make_sharp
from models import mlp_rows, text_rows, tiny_bert, tiny_mlp
from references import flat
from stateful import Carried, Centre, Cooling, Drawing, Ema, Frozen, Normed, Tempered, Twice
from training import train

STRENGTH = 1e-9  # of radii of about 0.1
EACH = 4  # methods a situation


def numbered(rows):
    """Few rows seen again and again, with their numbers, for methods that know them again."""
    return [{**rows[i % 8], "sample_index": torch.tensor(i % 8)} for i in range(72)]


ROWS = numbered(mlp_rows(8))


def mlp(*between, **settings):
    """TinyMLP with modules behind its tanh."""
    model = tiny_mlp(**settings)
    model.dropout = nn.Sequential(model.dropout, *between)
    return model


class AnyStream(nn.Module):
    """Draws from the streams of Python and NumPy."""

    def forward(self, hidden):
        return hidden * (1 + random.random()) + numpy.random.rand()


class Stream(torch.utils.data.IterableDataset):
    """Ends in the middle of a window."""

    def __iter__(self):
        yield from ROWS[: 4 * 5]


class Adds(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)


class Cooled(Cooling, Trainer):
    pass


class Doubled(Twice, Trainer):
    pass


def normalised(parametrisation):
    model = tiny_mlp()
    torch.manual_seed(1)
    parametrisation(model.hidden)
    return model


def groups(model):
    table = {"params": model.embed.parameters(), "lr": 0.01, "weight_decay": 0.1}
    rest = {"params": [p for name, p in model.named_parameters() if "embed" not in name]}
    return torch.optim.SGD([table, rest], lr=0.05, momentum=0.5)


# Each makes the model and says what else is given to the Trainer; `cls` is its class, `rows` its data.
SITUATIONS = {
    "nothing special": lambda: (mlp(), {}),
    "spectral norm": lambda: (normalised(nn.utils.spectral_norm), {}),
    "parametrised spectral norm": lambda: (normalised(nn.utils.parametrizations.spectral_norm), {}),
    "weight norm": lambda: (normalised(nn.utils.parametrizations.weight_norm), {}),
    "a centre buffer": lambda: (mlp(Centre()), {"gradient_accumulation_steps": 3}),
    "hidden attributes": lambda: (mlp(Carried()), {"gradient_accumulation_steps": 2}),
    "an object with a mean": lambda: (mlp(Ema()), {"gradient_accumulation_steps": 2}),
    "a frozen parameter that moves": lambda: (mlp(Frozen()), {"gradient_accumulation_steps": 2}),
    "a generator": lambda: (mlp(Drawing()), {"gradient_accumulation_steps": 2}),
    "running statistics": lambda: (mlp(Normed()), {"gradient_accumulation_steps": 2}),
    "dropout": lambda: (mlp(dropout=0.3), {"gradient_accumulation_steps": 2}),
    "streams of Python and NumPy": lambda: (mlp(AnyStream()), {}),
    "a loss object": lambda: (mlp(), {"compute_loss_func": Tempered(), "gradient_accumulation_steps": 2}),
    "an attribute of the trainer": lambda: (mlp(), {"cls": Cooled, "gradient_accumulation_steps": 2}),
    "two passes a micro-batch": lambda: (mlp(Carried()), {"cls": Doubled, "gradient_accumulation_steps": 2}),
    "a window left over": lambda: (mlp(Centre()), {"rows": Stream(), "gradient_accumulation_steps": 3}),
    "a short last window": lambda: (mlp(Centre()), {"rows": ROWS[:20], "gradient_accumulation_steps": 3}),
    "a short last micro-batch": lambda: (mlp(), {"rows": ROWS[:11], "gradient_accumulation_steps": 2}),
    "a callback's gradient": lambda: (mlp(), {"callbacks": [Adds()], "gradient_accumulation_steps": 2}),
    "clipping": lambda: (mlp(Carried()), {"max_grad_norm": 0.05}),
    "AdamW and a warm-up": lambda: (mlp(), {"optim": "adamw_torch", "warmup_steps": 2, "lr_scheduler_type": "cosine"}),
    "groups": lambda: (model := mlp(Centre()), {"optimizers": (groups(model), None)}),
    "a parameter without gradient": lambda: (mlp(unused=True), {"gradient_accumulation_steps": 2}),
    "an evaluation in between": lambda: (
        mlp(Normed(), dropout=0.2),
        {"eval_dataset": ROWS[:8], "eval_strategy": "steps", "eval_steps": 1},
    ),
    "a head that ignores the number of items": lambda: (
        tiny_bert(float64=True),
        {"rows": numbered(text_rows(8)), "gradient_accumulation_steps": 2},
    ),
    "adapters": lambda: (peft_models.lora_mlp(model={"dropout": 0.2}), {"gradient_accumulation_steps": 2}),
}
NORM_ONLY = {"sam_on", "sam_on_adaptive"}  # need a norm layer that is trained
WITHOUT_NORMS = {"adapters"}
ADAPTERS = {name: functools.partial(make, STRENGTH) for name, make in peft_models.METHODS.items()}
# LookSAM's direction is a unit vector however small its radius is; without a radius it is nothing.
WEAK = {name: functools.partial(case.method, 0.0 if name == "looksam" else STRENGTH) for name, case in METHODS.items()}


def pairs():
    """A few methods for each situation, in turn; the adapters' own where there are adapters."""
    turn = itertools.cycle(WEAK)
    for situation in SITUATIONS:
        fitting = (name for name in turn if not (situation in WITHOUT_NORMS and name in NORM_ONLY))
        chosen = list(itertools.islice(fitting, EACH))
        yield from ((situation, name) for name in chosen)
        if situation == "adapters":
            yield from ((situation, name) for name in ADAPTERS)


PAIRS = list(pairs())


def run(situation, folder, method=None):
    """What three steps leave and log, by name."""
    model, given = SITUATIONS[situation]()
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "max_grad_norm": 1.0, **given}
    cls, rows = settings.pop("cls", Trainer), settings.pop("rows", ROWS)
    if "optim" not in given:
        trained = [p for p in model.parameters() if p.requires_grad]
        settings.setdefault("optimizers", (torch.optim.SGD(trained, lr=0.05, momentum=0.5), None))
    path = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            path.append(flat(model))

    settings["callbacks"] = [*settings.get("callbacks", ()), Look()]
    if method is not None:
        cls, settings["method"] = SharpTrainer if cls is Trainer else make_sharp(cls), method
    trainer = train(cls, model, rows, folder, **settings)
    found = {f"{key} {i}": v for i, line in enumerate(trainer.state.log_history) for key, v in line.items()}
    keep = ("loss", "grad_norm", "learning_rate", "eval_loss")
    logs = {key: value for key, value in found.items() if key.rpartition(" ")[0] in keep}
    return path, logs


PLAIN = {}


@pytest.fixture
def plain_twin(tmp_path):
    def twin(situation):
        if situation not in PLAIN:
            PLAIN[situation] = run(situation, tmp_path)
        return PLAIN[situation]

    return twin


@pytest.mark.filterwarnings("ignore:The ascent of this method needs few gradients")
@pytest.mark.parametrize(("situation", "name"), PAIRS)
def test_next_to_no_strength_is_the_trainer(situation, name, plain_twin, tmp_path):
    path, logs = plain_twin(situation)
    ours, our_logs = run(situation, tmp_path, (ADAPTERS | WEAK)[name]())
    assert len(ours) == len(path) == 3 and not torch.equal(path[0], path[2])
    for mine, theirs in zip(ours, path, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
    assert len(logs) >= 9 and our_logs == pytest.approx(logs, rel=1e-7, abs=1e-7)


def test_every_method_and_every_situation_occurs():
    situations, methods = map(set, zip(*PAIRS, strict=True))
    assert situations == set(SITUATIONS) and len(situations) >= 25
    assert methods == set(METHODS) | set(peft_models.METHODS)
