"""What an editor flags before anything runs: names and options that there are not."""

import inspect
import json
import subprocess
import sys

import pytest
from transformers import Seq2SeqTrainer, Trainer

from hf_sharp import SharpSeq2SeqTrainer, SharpTrainer
from pages import ROOT

PROGRAM = """
from transformers import Trainer, TrainingArguments

from hf_sharp import Method, SharpConfig, SharpSeq2SeqTrainer, SharpTrainer, UnlearnTrainer
from hf_sharp import gsam, make_sharp, preset, sam

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

class MyTrainer(Trainer):
    def hello(self) -> int:
        return 1

class Better(make_sharp(MyTrainer)):
    pass

make_sharp(MyTrainer)(None, method="sam", compute_metrics=None).hello()
make_sharp(MyTrainer)(method="smm")  # wrong
make_sharp(MyTrainer)(method="sam").goodbye()  # wrong
isinstance(Better(method="sam"), make_sharp(MyTrainer))
SharpTrainer(train_datset=[1], method="sam")  # wrong
SharpTrainer(None, TrainingArguments(), train_dataset=[1], method="sam", rounding="nearest").train()
SharpTrainer(None, {})  # wrong
SharpSeq2SeqTrainer(method="smm")  # wrong
SharpSeq2SeqTrainer(eval_datset=[1])  # wrong
SharpSeq2SeqTrainer(eval_dataset={"one": [1]}, method=sam(0.1))
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


@pytest.mark.parametrize("ours, theirs", [(SharpTrainer, Trainer), (SharpSeq2SeqTrainer, Seq2SeqTrainer)])
def test_the_arguments_shown_are_the_trainers_own_in_its_order(ours, theirs):
    shown = [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()]
    wanted = [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()]
    own = {"method": None, "rounding": "stochastic", "check_repeats": True}
    assert shown == [*wanted, *((name, inspect.Parameter.KEYWORD_ONLY, default) for name, default in own.items())]
