"""Methods under the names of the literature; their keywords are the options of `SharpConfig` too."""

from hf_sharp._adapters.bar import bar as bar
from hf_sharp._adapters.bi_lora import bi_lora as bi_lora
from hf_sharp._adapters.flat_lora import flat_lora as flat_lora
from hf_sharp._methods.curvature import curvature_regularization as curvature_regularization
from hf_sharp._methods.friendly import friendly_sam as friendly_sam
from hf_sharp._methods.gam import gam as gam
from hf_sharp._methods.gradient_penalty import gradient_penalty as gradient_penalty
from hf_sharp._methods.gsam import gsam as gsam
from hf_sharp._methods.lookbehind import lookbehind_sam as lookbehind_sam
from hf_sharp._methods.looksam import looksam as looksam
from hf_sharp._methods.mesa import mesa as mesa
from hf_sharp._methods.msam import msam as msam
from hf_sharp._methods.plain import plain as plain
from hf_sharp._methods.previous_gradient import previous_gradient_sam as previous_gradient_sam
from hf_sharp._methods.saf import saf as saf
from hf_sharp._methods.sam import sam as sam
from hf_sharp._methods.smoothing import randomized_smoothing as randomized_smoothing
from hf_sharp._methods.vasso import vasso as vasso
from hf_sharp._methods.wsam import wsam as wsam
from hf_sharp._presets.combinations import asam as asam
from hf_sharp._presets.combinations import fisher_sam as fisher_sam
from hf_sharp._presets.combinations import fsam as fsam
from hf_sharp._presets.combinations import sam_on as sam_on
from hf_sharp._presets.combinations import tram as tram
