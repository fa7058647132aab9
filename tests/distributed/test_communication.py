"""What benchmarks/communication.py counts is what DDP sends."""

import re
from pathlib import Path

import pytest

from ranks import torchrun

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "communication.py"


@pytest.mark.distributed
def test_sam_sends_two_models_a_step_and_per_rank_one():
    options = ["--use_cpu", "--hidden", "16", "--steps", "4"]
    options += ["--method", "plain", "sam", "sam:per_rank=true", "looksam:every=2", "sam:fraction=0.5"]
    printed = torchrun(2, SCRIPT, *options)
    assert re.search(r"^2 processes over gloo", printed, flags=re.MULTILINE)
    line = r"^\| (\S+) \| \S+ \| (\S+) all-reduce \| (\S+) \| (\S+) \|"
    table = re.findall(line, printed, flags=re.MULTILINE)
    sent = {name: float(models) for name, models, *_ in table}
    assert sent.pop("sam:fraction=0.5") == 2.0
    assert sent == {"plain": 1.0, "sam": 2.0, "sam:per_rank=true": 1.0, "looksam:every=2": 1.5}
    collectives = {name: float(number) for name, _, number, _ in table}
    assert collectives["sam:fraction=0.5"] == collectives["sam"]  # in buckets, as DDP does
    small = {name: float(number) for name, *_, number in table}
    assert small["sam:per_rank=true"] == small["plain"]  # nothing else is said during its ascent either
