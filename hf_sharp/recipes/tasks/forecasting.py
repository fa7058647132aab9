"""Long-horizon forecasting: windows of a multivariate series, SAMformer, and the linear model that it is measured by.

Ilbert et al., "SAMformer: Unlocking the Potential of Transformers in Time Series Forecasting with Sharpness-Aware
Minimization and Channel-Wise Attention" (ICML 2024): one attention head across the channels between two RevIN halves,
which plain training overfits and SAM does not.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

ETT_HOURLY = (8640, 11520, 14400)  # 12, 4 and 4 months of 30 days: where training, validation and test rows end


class RevIN(nn.Module):
    """Reversible instance normalisation (Kim et al., ICLR 2022): each window and channel to mean 0 and deviation 1.

    Args:
        channels: how many series there are; each has a scale and a shift that are learnt.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise.

        Args:
            past: of shape (windows, channels, length).

        Returns:
            The normalised window, and the mean and deviation that `back` needs, of shape (windows, channels, 1).
        """
        mean = past.mean(-1, keepdim=True).detach()
        deviation = (past.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
        return (past - mean) / deviation * self.scale + self.shift, mean, deviation

    def back(self, future: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Undo it for a forecast.

        Args:
            future: of shape (windows, channels, horizon).
            mean: of the window.
            deviation: of the window.

        Returns:
            The forecast in the units of the series.
        """
        return (future - self.shift) / (self.scale + 1e-10) * deviation + mean


class Forecaster(nn.Module):
    """SAMformer, and without attention the linear model under RevIN.

    Args:
        channels: how many series there are.
        length: rows of a window.
        horizon: rows to forecast.
        attention: True for SAMformer.
        width: of queries and keys; the paper's 16.
    """

    def __init__(self, channels: int, length: int, horizon: int, attention: bool = True, width: int = 16) -> None:
        super().__init__()
        self.revin = RevIN(channels)
        self.queries = nn.Linear(length, width) if attention else None
        self.keys = nn.Linear(length, width) if attention else None
        self.values = nn.Linear(length, length) if attention else None
        self.head = nn.Linear(length, horizon)

    def forward(self, past: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Forecast.

        Args:
            past: windows, of shape (windows, channels, length).
            labels: what came after, of shape (windows, channels, horizon).

        Returns:
            `logits`, the forecast, and `loss`, its mean squared error, where there are labels.
        """
        x, mean, deviation = self.revin(past)
        if self.queries is not None and self.keys is not None and self.values is not None:
            x = x + functional.scaled_dot_product_attention(self.queries(x), self.keys(x), self.values(x))
        future = self.revin.back(self.head(x), mean, deviation)
        return (
            {"logits": future} if labels is None else {"loss": functional.mse_loss(future, labels), "logits": future}
        )


class Windows(Dataset):
    """Every window of a series with what follows it.

    Args:
        series: of shape (channels, rows).
        length: rows of a window.
        horizon: rows that follow.

    Raises:
        ValueError: if the series is too short for one.
    """

    def __init__(self, series: Tensor, length: int, horizon: int) -> None:
        if series.shape[-1] < length + horizon:
            raise ValueError(
                f"A window of {length} rows and {horizon} to forecast need {length + horizon} rows; "
                f"this part of the series has {series.shape[-1]}."
            )
        self.series, self.length, self.horizon = series, length, horizon

    def __len__(self) -> int:
        return self.series.shape[-1] - self.length - self.horizon + 1

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        if not 0 <= start < len(self):
            raise IndexError(start)
        middle = start + self.length
        return {"past": self.series[:, start:middle], "labels": self.series[:, middle : middle + self.horizon]}


def split_windows(
    series: Tensor, length: int, horizon: int, ends: Sequence[int] = ETT_HOURLY
) -> tuple[Windows, Windows, Windows]:
    """Standardise a series by its training rows and cut it into windows.

    Args:
        series: of shape (channels, rows).
        length: rows of a window.
        horizon: rows to forecast.
        ends: where training, validation and test rows end. What is forecast in validation and test begins there;
            the window before it may reach back.

    Returns:
        The windows to train, validate and test on.

    Raises:
        ValueError: if the ends do not rise, or a part is too short.
    """
    first, second, third = ends
    if not length <= first < second < third <= series.shape[-1]:
        raise ValueError(
            f"Training, validation and test rows end at rising places between {length}, the length of a window, and "
            f"{series.shape[-1]}, the length of the series; got {tuple(ends)}."
        )
    known = series[:, :first]
    series = (series - known.mean(1, keepdim=True)) / known.std(1, keepdim=True, unbiased=False).clamp_min(1e-8)
    parts = series[:, :first], series[:, first - length : second], series[:, second - length : third]
    train, validation, test = (Windows(part.float(), length, horizon) for part in parts)
    return train, validation, test


def read_series(file: str | Path) -> Tensor:
    """Read a table of series, as ETDataset has them: a heading, the time in the first column, numbers in the others.

    Args:
        file: a CSV file.

    Returns:
        The series in double precision, of shape (channels, rows).

    Raises:
        ValueError: if there is no such file, or a cell is no number.
    """
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file}. ETTh1.csv is in the GitHub repository zhouhaoyi/ETDataset.")
    with open(file, encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))
    try:
        series = torch.tensor([[float(cell) for cell in row[1:]] for row in rows[1:]], dtype=torch.float64)
    except ValueError as error:
        raise ValueError(f"{file} is no table of numbers after its first row and column: {error}") from error
    if series.ndim != 2 or series.shape[1] == 0 or not series.isfinite().all():
        raise ValueError(f"{file} has missing values, or nothing beside its first row and column.")
    return series.T.contiguous()


def made_up_series(rows: int = 14400, channels: int = 7, seed: int = 0) -> Tensor:
    """Make up hourly series with days, weeks, slow drift and noise, some of which follow others.

    Args:
        rows: how many hours.
        channels: how many series.
        seed: of the drift and the noise.

    Returns:
        The series in double precision, of shape (channels, rows).
    """
    draw = torch.Generator().manual_seed(seed)
    hours = torch.arange(rows, dtype=torch.float64)
    phase, strength = torch.rand(2, channels, 1, generator=draw, dtype=torch.float64)
    day = (2 * math.pi * (hours / 24 + phase)).sin() * (0.5 + strength)
    week = (2 * math.pi * (hours / 168 + strength)).sin() * 0.4
    drift = torch.randn(channels, rows, generator=draw, dtype=torch.float64).cumsum(1) * 0.03
    own = day + week + drift + 0.3 * torch.randn(channels, rows, generator=draw, dtype=torch.float64)
    return own + 0.5 * own.roll(1, 0).roll(6, 1)
