"""Methods: each a short program over the landscape, one a file."""

from hf_sharp.methods.adaptive import Adaptive as Adaptive
from hf_sharp.methods.after import After as After
from hf_sharp.methods.base import Method as Method
from hf_sharp.methods.curvature import CurvatureRegularization as CurvatureRegularization
from hf_sharp.methods.every import Every as Every
from hf_sharp.methods.friendly import FriendlySAM as FriendlySAM
from hf_sharp.methods.gam import GAM as GAM
from hf_sharp.methods.gradient_penalty import GradientPenalty as GradientPenalty
from hf_sharp.methods.gsam import GSAM as GSAM
from hf_sharp.methods.looksam import LookSAM as LookSAM
from hf_sharp.methods.mesa import MESA as MESA
from hf_sharp.methods.msam import MSAM as MSAM
from hf_sharp.methods.plain import Plain as Plain
from hf_sharp.methods.previous_gradient import PreviousGradientSAM as PreviousGradientSAM
from hf_sharp.methods.saf import SAF as SAF
from hf_sharp.methods.sam import SAM as SAM
from hf_sharp.methods.smoothing import RandomizedSmoothing as RandomizedSmoothing
from hf_sharp.methods.sum import Sum as Sum
from hf_sharp.methods.tram import TRAM as TRAM
from hf_sharp.methods.tram_fisher import TRAMFisher as TRAMFisher
from hf_sharp.methods.vasso import VaSSO as VaSSO
from hf_sharp.methods.with_probability import WithProbability as WithProbability
from hf_sharp.methods.wsam import WSAM as WSAM
