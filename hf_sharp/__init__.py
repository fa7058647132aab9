"""Sharpness-aware fine-tuning for Hugging Face Transformers."""

from hf_sharp.answers import Evaluation as Evaluation
from hf_sharp.answers import Opening as Opening
from hf_sharp.balls import AdaptiveBall as AdaptiveBall
from hf_sharp.balls import FisherBall as FisherBall
from hf_sharp.balls import L2Ball as L2Ball
from hf_sharp.config import SharpConfig as SharpConfig
from hf_sharp.entry_masks import FisherMask as FisherMask
from hf_sharp.entry_masks import RandomMask as RandomMask
from hf_sharp.landscape import Landscape as Landscape
from hf_sharp.masks import ByName as ByName
from hf_sharp.masks import NormLayers as NormLayers
from hf_sharp.methods import SAM as SAM
from hf_sharp.methods import Method as Method
from hf_sharp.methods import Plain as Plain
from hf_sharp.perturbation import Perturbation as Perturbation
from hf_sharp.presets import asam as asam
from hf_sharp.presets import fisher_sam as fisher_sam
from hf_sharp.presets import fsam as fsam
from hf_sharp.presets import plain as plain
from hf_sharp.presets import sam as sam
from hf_sharp.presets import sam_on as sam_on
from hf_sharp.schedules import Cosine as Cosine
from hf_sharp.schedules import FollowsLearningRate as FollowsLearningRate
from hf_sharp.schedules import Linear as Linear
from hf_sharp.schedules import ZeroDuringWarmup as ZeroDuringWarmup
from hf_sharp.trainer import SharpSeq2SeqTrainer as SharpSeq2SeqTrainer
from hf_sharp.trainer import SharpTrainer as SharpTrainer
from hf_sharp.trainer import make_sharp as make_sharp
from hf_sharp.vector import ParamVector as ParamVector

__version__ = "0.1.0.dev0"
