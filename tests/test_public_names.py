"""What `from hf_sharp import ...` gives: names may join, none may go, since people's programs hold them."""

import subprocess
import sys

import pytest

import hf_sharp

NAMES = """
    __version__
    Adaptive AdaptiveBall After BAR BiLoRA ByName Constant Cosine CurvatureRegularization DPO Evaluation Every
    FisherBall FisherMask FlatLoRA FollowsLearningRate FriendlySAM GAM GSAM GradientAscent
    GradientDifference GradientPenalty IDK L2Ball Landscape Linear LookSAM MESA MSAM Method NPO NoisyInputs
    NormLayers Objective Opening ParamVector Perturbation Plain PretrainedWeights PreviousGradientSAM PreviousWeights
    RMU RandomMask RandomizedSmoothing SAF SAM SharpConfig SharpOptimizer SharpSeq2SeqTrainer SharpStep
    SharpTrainer SimNPO Sum TRAM TRAMFisher UnlearnTrainer VaSSO WSAM WeightAveraging WithProbability
    ZeroDuringWarmup asam bar bi_lora curvature_regularization fisher_sam flat_lora friendly_sam fsam gam
    gradient_penalty gsam last_complete_checkpoint looksam make_sharp mesa msam plain previous_gradient_sam
    randomized_smoothing saf sam sam_on tram vasso wsam
""".split()
OF_TRL = ("SharpSFTTrainer", "SharpDPOTrainer", "SharpRewardTrainer")


def test_every_name_of_the_first_release_is_still_there():
    assert len(NAMES) == len(set(NAMES)) == 87
    assert [name for name in NAMES if name not in vars(hf_sharp)] == []


def test_the_names_made_of_trl_are_there_where_trl_is():
    pytest.importorskip("trl")
    assert all(isinstance(getattr(hf_sharp, name), type) for name in OF_TRL)


def test_an_import_of_all_of_it_works_in_a_fresh_process():
    program = f"from hf_sharp import {', '.join(NAMES)}; import hf_sharp.evaluation, hf_sharp.unlearning"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
