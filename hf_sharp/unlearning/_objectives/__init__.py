"""Losses and divergences: they know no optimizer and no method."""

from hf_sharp.unlearning._objectives.base import Objective as Objective
from hf_sharp.unlearning._objectives.base import Term as Term
from hf_sharp.unlearning._objectives.dpo import DPO as DPO
from hf_sharp.unlearning._objectives.dpo import IDK as IDK
from hf_sharp.unlearning._objectives.forget_retain import ForgetRetain as ForgetRetain
from hf_sharp.unlearning._objectives.gradient_ascent import GradientAscent as GradientAscent
from hf_sharp.unlearning._objectives.gradient_ascent import GradientDifference as GradientDifference
from hf_sharp.unlearning._objectives.models import Models as Models
from hf_sharp.unlearning._objectives.npo import NPO as NPO
from hf_sharp.unlearning._objectives.npo import SimNPO as SimNPO
from hf_sharp.unlearning._objectives.rmu import RMU as RMU
