"""Methods: each a short program over the landscape, one a file."""

from hf_sharp.methods.base import Method as Method
from hf_sharp.methods.plain import Plain as Plain
from hf_sharp.methods.sam import SAM as SAM
