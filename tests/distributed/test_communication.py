"""What benchmarks/communication.py counts is what DDP sends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "communication.py"


@pytest.mark.distributed
def test_sam_sends_two_models_a_step_and_per_rank_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += ["--use_cpu", "--hidden", "16", "--steps", "4"]
    command += ["--method", "plain", "sam", "sam:per_rank=true", "looksam:every=2", "sam:fraction=0.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert re.search(r"^2 processes over gloo", run.stdout, flags=re.MULTILINE)
    line = r"^\| (\S+) \| \S+ \| (\S+) all-reduce \| (\S+) \| (\S+) \|"
    table = re.findall(line, run.stdout, flags=re.MULTILINE)
    sent = {name: float(models) for name, models, *_ in table}
    assert sent.pop("sam:fraction=0.5") == 2.0
    assert sent == {"plain": 1.0, "sam": 2.0, "sam:per_rank=true": 1.0, "looksam:every=2": 1.5}
    collectives = {name: float(number) for name, _, number, _ in table}
    assert collectives["sam:fraction=0.5"] == collectives["sam"]  # in buckets, as DDP does
    small = {name: float(number) for name, *_, number in table}
    assert small["sam:per_rank=true"] == small["plain"]  # nothing else is said during its ascent either
