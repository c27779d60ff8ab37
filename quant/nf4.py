"""NF4: 4-bit levels that are equally likely under a normal distribution, scaled by each block's largest weight (Dettmers et al.,
2305.14314).

bitsandbytes makes the tensors, in its own format, which transformers opens where that library is installed.
"""

from __future__ import annotations

from typing import ClassVar

from compress.passes import Taxon
from compress.quant.blockwise import FourBit


class NF4(FourBit):
    """The data type of QLoRA. Zero and the block's extreme are levels, so pruned weights stay and one weight a block is
    exact. It needs no calibration.

    A level is the quantile of an equal share of the normal distribution, seven of them below zero and eight above. With
    ``double_quant`` the scales, less their mean, are rounded to an 8-bit dynamic data type in blocks of 256: 4.127 bits per
    weight instead of 4.5. Such scales cannot be trained afterwards.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2305.14314"
    kind: ClassVar[str] = "nf4"
