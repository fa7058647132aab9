"""Unlearning: data with a term to forget and one to retain, and the attacks that unlearning has to withstand."""

from hf_sharp.unlearning._data import EpochCallback as EpochCallback
from hf_sharp.unlearning._data import ForgetRetainCollator as ForgetRetainCollator
from hf_sharp.unlearning._data import ForgetRetainDataset as ForgetRetainDataset
from hf_sharp.unlearning._encoding import Encoder as Encoder
from hf_sharp.unlearning._encoding import encode_rows as encode_rows
from hf_sharp.unlearning._encoding import pad as pad
from hf_sharp.unlearning._encoding import read_rows as read_rows
from hf_sharp.unlearning._objectives.names import OBJECTIVES as OBJECTIVES
from hf_sharp.unlearning._objectives.names import options_of as options_of
from hf_sharp.unlearning._objectives.names import read_objective as read_objective
from hf_sharp.unlearning._quantize import quantize as quantize
from hf_sharp.unlearning._relearn import relearn as relearn
