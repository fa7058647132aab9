"""Methods under the names of the literature; their keywords are the options of `SharpConfig` too."""

from hf_sharp._presets.adapters import bar as bar
from hf_sharp._presets.adapters import bi_lora as bi_lora
from hf_sharp._presets.adapters import flat_lora as flat_lora
from hf_sharp._presets.cheap import looksam as looksam
from hf_sharp._presets.cheap import mesa as mesa
from hf_sharp._presets.cheap import msam as msam
from hf_sharp._presets.cheap import previous_gradient_sam as previous_gradient_sam
from hf_sharp._presets.cheap import saf as saf
from hf_sharp._presets.penalties import curvature_regularization as curvature_regularization
from hf_sharp._presets.penalties import gradient_penalty as gradient_penalty
from hf_sharp._presets.penalties import randomized_smoothing as randomized_smoothing
from hf_sharp._presets.sharpness import asam as asam
from hf_sharp._presets.sharpness import fisher_sam as fisher_sam
from hf_sharp._presets.sharpness import fsam as fsam
from hf_sharp._presets.sharpness import plain as plain
from hf_sharp._presets.sharpness import sam as sam
from hf_sharp._presets.sharpness import sam_on as sam_on
from hf_sharp._presets.two_pass import friendly_sam as friendly_sam
from hf_sharp._presets.two_pass import gam as gam
from hf_sharp._presets.two_pass import gsam as gsam
from hf_sharp._presets.two_pass import tram as tram
from hf_sharp._presets.two_pass import vasso as vasso
from hf_sharp._presets.two_pass import wsam as wsam
