"""SAMformer, with SAM and without, beside RevIN and a linear layer alone: test mean squared error over seeds.

python examples/forecasting_sam.py --data_file ETTh1.csv --seeds 3    # the paper's; without a file a made-up series
"""

import argparse
import statistics
import tempfile
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from hf_sharp import SharpTrainer, sam
from hf_sharp.recipes.tasks.forecasting import Forecaster, Windows, made_up_series, read_series, split_windows

LENGTH, HORIZON = 512, 96
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "save_total_limit": 1,
}
SETTINGS |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_strategy": "epoch"}
SETTINGS |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "report_to": "none"}
SETTINGS |= {"disable_tqdm": True, "prediction_loss_only": True, "save_only_model": True, "num_train_epochs": 100}
SETTINGS |= {"dataloader_pin_memory": False}


def run(data: tuple[Windows, Windows, Windows], attention: bool, rho: float, seed: int, steps: int) -> float:
    """Train until five epochs bring nothing; return the test error at the epoch that was best in validation."""
    set_seed(seed)
    train, validation, test = data
    with tempfile.TemporaryDirectory() as folder:
        trainer = SharpTrainer(
            model=Forecaster(len(train.series), LENGTH, HORIZON, attention),
            args=TrainingArguments(folder, seed=seed, max_steps=steps, **SETTINGS),
            method=sam(rho=rho) if rho else None,
            train_dataset=train,
            eval_dataset=validation,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
        )
        trainer.train()
        print(f"stopped after {trainer.state.epoch:.0f} epochs", flush=True)
        return trainer.evaluate(test)["eval_loss"]


def main(steps: int = -1, data_file: str = "", seeds: int = 1, rho: float = 0.5) -> float:
    data = split_windows(read_series(data_file) if data_file else made_up_series(), LENGTH, HORIZON)
    runs = {"SAM": (True, rho), "without SAM": (True, 0.0), "RevIN + linear": (False, 0.0)}
    errors = {name: [run(data, *each, seed, steps) for seed in range(seeds)] for name, each in runs.items()}
    for name, values in errors.items():
        print(f"{name:15} {statistics.fmean(values):.4f}  {' '.join(f'{value:.4f}' for value in values)}")
    return statistics.fmean(errors["SAM"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag, default in {"steps": -1, "data_file": "", "seeds": 1, "rho": 0.5}.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    main(**vars(parser.parse_args()))
