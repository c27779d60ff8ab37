"""Linear layers whose weights are signs, times the scales of a row's part of a block.

Artifacts that need them carry this file beside ``modeling_compress.py``, so it stands alone: torch only.
"""

import torch
from torch import Tensor, nn

from .stored_layers import OpenedLinear, bits_of, unpack_bits


def levels(scale: Tensor, mean: Tensor | None) -> Tensor:
    """What the codes 0 to 3 stand for in columns that are not salient, and then in those that are: (out, blocks, 8).

    scale: (out, blocks, 4), of the weights near the mean, those in the tails, and the two terms of salient ones; mean: (out,
    blocks, 3), of these three kinds. A code's low bit is the (first) sign; its high bit says that a weight is in the tails, or
    is the second sign.
    """
    bell, tail, first, second = scale.unbind(-1)
    table = torch.stack(
        (-bell, bell, -tail, tail, -first - second, first - second, second - first, first + second), dim=-1
    )  # fmt: skip
    if mean is None:
        return table
    kinds = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2], device=mean.device)
    return table + mean.index_select(-1, kinds)


def looked_up(codes: Tensor, salient: Tensor, table: Tensor, block_size: int) -> Tensor:
    """The matrix (out, in) of codes (out, in) 0 to 3, in columns that are salient or not, (in,) bool. table: of :func:`levels`;
    block_size: consecutive columns of a block, of which the last may be narrower."""
    (n_outputs, n_inputs), n_blocks = codes.shape, table.shape[1]
    places = codes.long() + 4 * salient.long()
    places = nn.functional.pad(places, (0, n_blocks * block_size - n_inputs)).view(n_outputs, n_blocks, block_size)
    return table.gather(2, places).flatten(1)[:, :n_inputs]


class BinaryLinear(OpenedLinear):
    """Two bits for every weight; block by block of ``block_size`` columns, the scales that they choose among for each row, and
    perhaps the means that these are counted from; a bit for every column, set where it is salient."""

    packed: Tensor
    salient: Tensor
    scale: Tensor
    mean: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, block_size: int, centred: int, children: dict):
        super().__init__(in_features, out_features, bias)
        self.block_size, self.centred, n_blocks = block_size, centred, -(-in_features // block_size)
        self.hold("packed", torch.empty(-(-out_features * in_features // 4), dtype=torch.uint8))
        self.hold("salient", torch.empty(-(-in_features // 8), dtype=torch.uint8))
        self.hold("scale", torch.empty(out_features, n_blocks, 4))
        self.hold("mean", torch.empty(out_features, n_blocks, 3 * centred))

    def matrix(self) -> Tensor:
        codes = unpack_bits(self.packed, 2, self.out_features * self.in_features).view(self.out_features, self.in_features) + 2
        table = levels(self.scale, self.mean if self.centred else None)
        return looked_up(codes, bits_of(self.salient, self.in_features).bool(), table, self.block_size)
