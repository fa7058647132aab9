"""What an editor flags before anything runs: names and options that there are not."""

import json
import subprocess
import sys

import pytest

from pages import ROOT

PROGRAM = """
from hf_sharp import Method, SharpConfig, SharpTrainer, UnlearnTrainer, gsam, preset, sam

@preset
def mine(rho: float = 0.05) -> Method:
    return sam(rho)

SharpConfig(method="smm")  # wrong
SharpConfig(rhoo=1)  # wrong
SharpConfig(rho="0.1")  # wrong
SharpTrainer(method="smm")  # wrong
UnlearnTrainer(objective="npo", method="smm")  # wrong
sam(rhoo=1)  # wrong
gsam(minimize_fp="no")  # wrong
mine(rhoo=1)  # wrong
SharpConfig("fsam", rho=0.1, keep=0.2).build()
SharpTrainer(method="lookbehind_sam")
SharpTrainer(method={"method": "mine", "rho": 0.1})
SharpTrainer(method=mine(0.1))
gsam(0.1, minimize_fp=False)
"""


def test_names_and_options_that_there_are_not_are_flagged(tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"})
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    found = {each["range"]["start"]["line"] for each in json.loads(done.stdout)["generalDiagnostics"]}
    assert found == {number for number, line in enumerate(PROGRAM.splitlines()) if "# wrong" in line}
