"""Sharpness-aware fine-tuning for Hugging Face Transformers."""

from hf_sharp._adapters import BAR as BAR
from hf_sharp._adapters import BiLoRA as BiLoRA
from hf_sharp._adapters import FlatLoRA as FlatLoRA
from hf_sharp._engine.evaluation import Evaluation as Evaluation
from hf_sharp._engine.evaluation import FirstPass as FirstPass
from hf_sharp._engine.evaluation import Opening as Opening
from hf_sharp._engine.landscape import Landscape as Landscape
from hf_sharp._integrations.accelerate_loop import SharpStep as SharpStep
from hf_sharp._integrations.any_trainer import __getattr__ as __getattr__
from hf_sharp._integrations.any_trainer import make_sharp as make_sharp
from hf_sharp._integrations.averaging import WeightAveraging as WeightAveraging
from hf_sharp._integrations.checkpoints import last_complete_checkpoint as last_complete_checkpoint
from hf_sharp._integrations.optimizer import SharpOptimizer as SharpOptimizer
from hf_sharp._integrations.trainer import SharpSeq2SeqTrainer as SharpSeq2SeqTrainer
from hf_sharp._integrations.trainer import SharpTrainer as SharpTrainer
from hf_sharp._methods import GAM as GAM
from hf_sharp._methods import GSAM as GSAM
from hf_sharp._methods import MESA as MESA
from hf_sharp._methods import MSAM as MSAM
from hf_sharp._methods import SAF as SAF
from hf_sharp._methods import SAM as SAM
from hf_sharp._methods import TRAM as TRAM
from hf_sharp._methods import WSAM as WSAM
from hf_sharp._methods import Adaptive as Adaptive
from hf_sharp._methods import After as After
from hf_sharp._methods import CurvatureRegularization as CurvatureRegularization
from hf_sharp._methods import Every as Every
from hf_sharp._methods import FriendlySAM as FriendlySAM
from hf_sharp._methods import GradientPenalty as GradientPenalty
from hf_sharp._methods import LookbehindSAM as LookbehindSAM
from hf_sharp._methods import LookSAM as LookSAM
from hf_sharp._methods import Method as Method
from hf_sharp._methods import Plain as Plain
from hf_sharp._methods import PreviousGradientSAM as PreviousGradientSAM
from hf_sharp._methods import RandomizedSmoothing as RandomizedSmoothing
from hf_sharp._methods import Sum as Sum
from hf_sharp._methods import TRAMFisher as TRAMFisher
from hf_sharp._methods import VaSSO as VaSSO
from hf_sharp._methods import WithProbability as WithProbability
from hf_sharp._perturbation.balls import AdaptiveBall as AdaptiveBall
from hf_sharp._perturbation.balls import FisherBall as FisherBall
from hf_sharp._perturbation.balls import L2Ball as L2Ball
from hf_sharp._perturbation.entry_masks import FisherMask as FisherMask
from hf_sharp._perturbation.entry_masks import RandomMask as RandomMask
from hf_sharp._perturbation.masks import ByName as ByName
from hf_sharp._perturbation.masks import NormLayers as NormLayers
from hf_sharp._perturbation.perturbation import Perturbation as Perturbation
from hf_sharp._perturbation.references import NoisyInputs as NoisyInputs
from hf_sharp._perturbation.references import PretrainedWeights as PretrainedWeights
from hf_sharp._perturbation.references import PreviousWeights as PreviousWeights
from hf_sharp._perturbation.schedules import Constant as Constant
from hf_sharp._perturbation.schedules import Cosine as Cosine
from hf_sharp._perturbation.schedules import FollowsLearningRate as FollowsLearningRate
from hf_sharp._perturbation.schedules import Linear as Linear
from hf_sharp._perturbation.schedules import ZeroDuringWarmup as ZeroDuringWarmup
from hf_sharp._presets import asam as asam
from hf_sharp._presets import bar as bar
from hf_sharp._presets import bi_lora as bi_lora
from hf_sharp._presets import curvature_regularization as curvature_regularization
from hf_sharp._presets import fisher_sam as fisher_sam
from hf_sharp._presets import flat_lora as flat_lora
from hf_sharp._presets import friendly_sam as friendly_sam
from hf_sharp._presets import fsam as fsam
from hf_sharp._presets import gam as gam
from hf_sharp._presets import gradient_penalty as gradient_penalty
from hf_sharp._presets import gsam as gsam
from hf_sharp._presets import lookbehind_sam as lookbehind_sam
from hf_sharp._presets import looksam as looksam
from hf_sharp._presets import mesa as mesa
from hf_sharp._presets import msam as msam
from hf_sharp._presets import plain as plain
from hf_sharp._presets import previous_gradient_sam as previous_gradient_sam
from hf_sharp._presets import randomized_smoothing as randomized_smoothing
from hf_sharp._presets import saf as saf
from hf_sharp._presets import sam as sam
from hf_sharp._presets import sam_on as sam_on
from hf_sharp._presets import tram as tram
from hf_sharp._presets import vasso as vasso
from hf_sharp._presets import wsam as wsam
from hf_sharp._presets.config import SharpConfig as SharpConfig
from hf_sharp._presets.names import preset as preset
from hf_sharp._tensors.vector import ParamVector as ParamVector
from hf_sharp.unlearning._objectives import DPO as DPO
from hf_sharp.unlearning._objectives import IDK as IDK
from hf_sharp.unlearning._objectives import NPO as NPO
from hf_sharp.unlearning._objectives import RMU as RMU
from hf_sharp.unlearning._objectives import GradientAscent as GradientAscent
from hf_sharp.unlearning._objectives import GradientDifference as GradientDifference
from hf_sharp.unlearning._objectives import Objective as Objective
from hf_sharp.unlearning._objectives import SimNPO as SimNPO
from hf_sharp.unlearning._trainer import UnlearnTrainer as UnlearnTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "BAR",
    "DPO",
    "GAM",
    "GSAM",
    "IDK",
    "MESA",
    "MSAM",
    "NPO",
    "RMU",
    "SAF",
    "SAM",
    "TRAM",
    "WSAM",
    "Adaptive",
    "AdaptiveBall",
    "After",
    "BiLoRA",
    "ByName",
    "Constant",
    "Cosine",
    "CurvatureRegularization",
    "Evaluation",
    "Every",
    "FirstPass",
    "FisherBall",
    "FisherMask",
    "FlatLoRA",
    "FollowsLearningRate",
    "FriendlySAM",
    "GradientAscent",
    "GradientDifference",
    "GradientPenalty",
    "L2Ball",
    "Landscape",
    "Linear",
    "LookSAM",
    "LookbehindSAM",
    "Method",
    "NoisyInputs",
    "NormLayers",
    "Objective",
    "Opening",
    "ParamVector",
    "Perturbation",
    "Plain",
    "PretrainedWeights",
    "PreviousGradientSAM",
    "PreviousWeights",
    "RandomMask",
    "RandomizedSmoothing",
    "SharpConfig",
    "SharpOptimizer",
    "SharpSeq2SeqTrainer",
    "SharpStep",
    "SharpTrainer",
    "SimNPO",
    "Sum",
    "TRAMFisher",
    "UnlearnTrainer",
    "VaSSO",
    "WeightAveraging",
    "WithProbability",
    "ZeroDuringWarmup",
    "asam",
    "bar",
    "bi_lora",
    "curvature_regularization",
    "fisher_sam",
    "flat_lora",
    "friendly_sam",
    "fsam",
    "gam",
    "gradient_penalty",
    "gsam",
    "last_complete_checkpoint",
    "lookbehind_sam",
    "looksam",
    "make_sharp",
    "mesa",
    "msam",
    "plain",
    "preset",
    "previous_gradient_sam",
    "randomized_smoothing",
    "saf",
    "sam",
    "sam_on",
    "tram",
    "vasso",
    "wsam",
]
