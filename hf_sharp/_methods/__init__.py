"""Methods: each a short program over the landscape, one a file."""

from hf_sharp._methods.adaptive import Adaptive as Adaptive
from hf_sharp._methods.after import After as After
from hf_sharp._methods.base import Method as Method
from hf_sharp._methods.curvature import CurvatureRegularization as CurvatureRegularization
from hf_sharp._methods.every import Every as Every
from hf_sharp._methods.friendly import FriendlySAM as FriendlySAM
from hf_sharp._methods.gam import GAM as GAM
from hf_sharp._methods.gradient_penalty import GradientPenalty as GradientPenalty
from hf_sharp._methods.gsam import GSAM as GSAM
from hf_sharp._methods.lookbehind import LookbehindSAM as LookbehindSAM
from hf_sharp._methods.looksam import LookSAM as LookSAM
from hf_sharp._methods.mesa import MESA as MESA
from hf_sharp._methods.msam import MSAM as MSAM
from hf_sharp._methods.plain import Plain as Plain
from hf_sharp._methods.previous_gradient import PreviousGradientSAM as PreviousGradientSAM
from hf_sharp._methods.saf import SAF as SAF
from hf_sharp._methods.sam import SAM as SAM
from hf_sharp._methods.smoothing import RandomizedSmoothing as RandomizedSmoothing
from hf_sharp._methods.sum import Sum as Sum
from hf_sharp._methods.tram import TRAM as TRAM
from hf_sharp._methods.tram_fisher import TRAMFisher as TRAMFisher
from hf_sharp._methods.vasso import VaSSO as VaSSO
from hf_sharp._methods.with_probability import WithProbability as WithProbability
from hf_sharp._methods.wsam import WSAM as WSAM
