"""What every test stands on: no hub, no trackers, deterministic kernels, a fixed number of threads."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging

from hf_sharp._presets.fields import Options, declare
from hf_sharp._presets.names import METHODS

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny; threads that wait for each other cost more than they bring


@pytest.fixture(autouse=True, scope="module")
def little_to_collect():
    """What stands before a file's tests is garbage or stays: collected here once, and left out of later collections.

    Every training of the Trainer ends in `gc.collect()`, which goes through all objects of torch and transformers:
    0.3 of the 0.4 seconds that five steps of a tiny model take.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_start():
    """Every test begins with the same random stream and deterministic kernels."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_names():
    """Names that a test, or the code of a page, has given to methods of its own are gone afterwards."""
    before = dict(METHODS)
    yield
    if before != METHODS:
        METHODS.clear()
        METHODS.update(before)
        declare(Options, METHODS)
