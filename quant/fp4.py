"""FP4: 4-bit floats with two bits of exponent and one of mantissa, scaled by each block's largest weight (Dettmers et al.,
2305.14314).

bitsandbytes makes the tensors, in its own format, which transformers opens where that library is installed.
"""

from __future__ import annotations

from typing import ClassVar

from compress.passes import Taxon
from compress.quant.blockwise import FourBit


class FP4(FourBit):
    """The 4-bit float that QLoRA compares NF4 with: 0, 0.0625, 2, 3, 4, 6, 8 and 12 twelfths of the scale, and their negatives.

    Its steps grow with the weights, which suits tails heavier than a normal distribution's. It needs no calibration.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2305.14314"
    kind: ClassVar[str] = "fp4"
