"""The README's own method runs as written and is SAM."""

import re
from pathlib import Path

import torch

from hf_sharp import SharpTrainer, sam
from models import mlp_rows, tiny_mlp
from training import train, weights

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_method_in_the_readme_is_sam(tmp_path):
    block = next(b for b in BLOCKS if "class MySAM" in b)
    names: dict = {"__name__": "readme"}
    exec(compile(block.split("trainer =")[0], "README.md", "exec", dont_inherit=True), names)
    ours = names["MySAM"](names["Perturbation"](rho=0.05))
    pair = [weights(train(SharpTrainer, tiny_mlp(), mlp_rows(20), tmp_path, method=m)) for m in (ours, sam(0.05))]
    assert torch.equal(*pair)


def test_the_settings_in_the_readme_build():
    block = next(b for b in BLOCKS if "FollowsLearningRate(0.1" in b)
    names: dict = {}
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    lines = [line for line in block.splitlines() if line.startswith("SAM(")]
    assert len(lines) == 4 and all(eval(line, names).cost == 2 for line in lines)
