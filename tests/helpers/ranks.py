"""Several processes over gloo, started as a user starts them; tests under `distributed` compare them with one."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).parents[1]
PATHS = (TESTS.parent, TESTS, TESTS / "helpers")


def torchrun(ranks: int, *command: Any, timeout: int = 400) -> str:
    """Run a script on `ranks` processes by torchrun, on a free port, with the package and these helpers to import.

    Returns:
        What it printed; a script that fails is an AssertionError with the end of its output.
    """
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--nproc_per_node", str(ranks)]
    whole = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *map(str, command)]
    paths = os.pathsep.join(map(str, PATHS))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(whole, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def results_of(script: str, ranks: int, folder: Path) -> Any:
    """What a script of `tests/distributed` gives back on its first rank; the folder is its to write in."""
    torchrun(ranks, TESTS / "distributed" / script, folder)
    return torch.load(folder / "results.pt", weights_only=True)


def on_each_rank(main: Callable[[str], Any]) -> None:
    """The end of such a script: runs `main` in the folder that `results_of` names, and writes down what it returns."""
    gc.freeze()  # as in conftest.py: trainings collect garbage
    results = main(sys.argv[1])
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # at interpreter exit gloo's threads can abort the process after all is done (seen with torch 2.13)
