"""Forecasting: windows and splits, RevIN, SAMformer against its formula, and series from files."""

import math

import pytest
import torch

from hf_sharp.recipes.tasks.forecasting import Forecaster, RevIN, Windows, made_up_series, read_series, split_windows


def test_windows_follow_each_other():
    series = torch.arange(20.0).repeat(2, 1) + torch.tensor([[0.0], [100.0]])
    windows = Windows(series, 5, 3)
    assert len(windows) == 13 and len(list(windows)) == 13
    last = windows[12]
    assert last["past"].tolist() == [[12, 13, 14, 15, 16], [112, 113, 114, 115, 116]]
    assert last["labels"].tolist() == [[17, 18, 19], [117, 118, 119]]
    with pytest.raises(ValueError, match="need 21 rows; this part of the series has 20"):
        Windows(series, 18, 3)


def test_the_papers_split():
    """Rows [0, 8640) to train, [8640, 11520) and [11520, 14400) to forecast, with 512 rows of context."""
    rows = torch.arange(17420, dtype=torch.float64)
    train, validation, test = split_windows(torch.stack([rows, -rows]), 512, 96)
    mean, deviation = 8639 / 2, math.sqrt((8640**2 - 1) / 12)  # of 0 .. 8639
    assert (len(train), len(validation), len(test)) == (8640 - 512 - 95, 2880 - 95, 2880 - 95)

    def row(value):
        return round(value.item() * deviation + mean)

    assert (row(train[0]["past"][0, 0]), row(train[len(train) - 1]["labels"][0, -1])) == (0, 8639)
    for part, start, end in ((validation, 8640, 11520), (test, 11520, 14400)):
        assert (row(part[0]["past"][0, 0]), row(part[0]["labels"][0, 0])) == (start - 512, start)
        assert row(part[len(part) - 1]["labels"][0, -1]) == end - 1
    torch.testing.assert_close(test[0]["past"][1], -test[0]["past"][0])
    with pytest.raises(ValueError, match="end at rising places between 512"):
        split_windows(torch.zeros(2, 10000), 512, 96)


def test_revin_there_and_back():
    torch.manual_seed(0)
    past = 5 + 3 * torch.randn(4, 2, 50, dtype=torch.float64)
    revin = RevIN(2).double()
    normal, mean, deviation = revin(past)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(4, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(normal.square().mean(-1), torch.ones(4, 2, dtype=torch.float64), rtol=1e-4, atol=0)
    with torch.no_grad():
        revin.scale.copy_(torch.tensor([[2.0], [0.5]]))
        revin.shift.copy_(torch.tensor([[1.0], [-1.0]]))
    normal, mean, deviation = revin(past)
    torch.testing.assert_close(normal[0, 1].mean().item(), -1.0)
    torch.testing.assert_close(revin.back(normal, mean, deviation), past, rtol=1e-8, atol=1e-8)


def test_samformer_is_its_formula():
    """One head across channels: X + softmax(Q K' / sqrt(16)) V on the normalised window, then a linear head."""
    torch.manual_seed(0)
    model = Forecaster(3, 10, 4).double()
    past, future = torch.randn(2, 3, 10, dtype=torch.float64) * 4 + 1, torch.randn(2, 3, 4, dtype=torch.float64)
    found = model(past, future)
    parameters = dict(model.named_parameters())
    for sample in range(2):
        x = past[sample]
        mean = x.sum(1) / 10
        deviation = (((x - mean[:, None]) ** 2).sum(1) / 10 + 1e-5) ** 0.5
        x = (x - mean[:, None]) / deviation[:, None]
        q, k, v = (x @ parameters[f"{n}.weight"].T + parameters[f"{n}.bias"] for n in ("queries", "keys", "values"))
        scores = (q @ k.T / 4).exp()
        x = x + scores / scores.sum(1, keepdim=True) @ v
        y = x @ parameters["head.weight"].T + parameters["head.bias"]
        expected = y * deviation[:, None] + mean[:, None]
        torch.testing.assert_close(found["logits"][sample], expected, rtol=1e-8, atol=1e-8)
    assert found["loss"].item() == pytest.approx(((found["logits"] - future) ** 2).mean().item())
    linear = Forecaster(3, 10, 4, attention=False)
    assert sum(p.numel() for p in linear.parameters()) == 10 * 4 + 4 + 2 * 3 and "loss" not in linear(past.float())


def test_series_from_a_file(tmp_path):
    file = tmp_path / "series.csv"
    file.write_text("date,HUFL,OT\n2016-07-01,1.5,-2\n2016-07-02,2.5,4\n2016-07-03,0,1e3\n")
    assert read_series(file).tolist() == [[1.5, 2.5, 0.0], [-2.0, 4.0, 1000.0]]
    wrong = {"date,a\n1,x\n": "no table of numbers", "date,a\n1,2\n3\n": "no table of numbers"}
    wrong |= {"date,a\n1,nan\n": "has missing values", "date\n": "nothing beside"}
    for text, message in wrong.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_series(file)
    with pytest.raises(ValueError, match=r"There is no file .*ETDataset"):
        read_series(tmp_path / "nowhere.csv")


def test_the_made_up_series_is_its_seeds_and_has_days():
    series = made_up_series(rows=2400, channels=3)
    assert series.shape == (3, 2400) and torch.equal(series, made_up_series(2400, 3))
    assert not torch.equal(series, made_up_series(2400, 3, seed=1))
    change = series.diff(dim=1)
    centred = change - change.mean(1, keepdim=True)
    alike = (centred[:, 24:] * centred[:, :-24]).mean(1) / centred.square().mean(1)
    opposite = (centred[:, 12:] * centred[:, :-12]).mean(1) / centred.square().mean(1)
    assert (alike > opposite).all()  # a day later the same, half a day later the reverse
