"""What a matrix has become: dense, masked, quantized, factored or a sum of such, closed under composition.

Every weight knows its shape, its dense value, the bytes that its tensors take in a file, and its trainable parameters.
``Masked(Quantized(...))`` is a sparse matrix on an integer grid; ``LowRank(Quantized(...), Quantized(...))`` two quantized
factors; ``Sum((Quantized(...), LowRank(...)))`` a grid with a correction. Matrices are (out, in), as in ``nn.Linear``.
"""

from compress.weights.bilevel import Bilevel
from compress.weights.binary import Binary
from compress.weights.bitmask import Bitmask, BitmaskGrid, bitmasked, opened
from compress.weights.blockwise import Blockwise, RowInt8
from compress.weights.codebook import Codebook
from compress.weights.composed import KINDS, Composed, LowRank, Sum, leaves, spec_of
from compress.weights.grid import Coded, FloatQuantized, Quantized
from compress.weights.incoherent import Incoherent
from compress.weights.matrix import Dense, Masked, Provisional, Weight
from compress.weights.parts import Affine, Columns, Outliers, Rows, SparsePart
from compress.weights.stack import BitPlanes, SignedLowRank, Stack, prefix, stacks
from compress.weights.structure import Structure, assert_structure_kept, structure
from compress.weights.table import Lookup, Table, TableFactors, TableTrains
from compress.weights.tensor_train import TensorTrain

__all__ = [
    "KINDS",
    "Affine",
    "Bilevel",
    "Binary",
    "BitPlanes",
    "Bitmask",
    "BitmaskGrid",
    "Blockwise",
    "Codebook",
    "Coded",
    "Columns",
    "Composed",
    "Dense",
    "FloatQuantized",
    "Incoherent",
    "Lookup",
    "LowRank",
    "Masked",
    "Outliers",
    "Provisional",
    "Quantized",
    "RowInt8",
    "Rows",
    "SignedLowRank",
    "SparsePart",
    "Stack",
    "Structure",
    "Sum",
    "Table",
    "TableFactors",
    "TableTrains",
    "TensorTrain",
    "Weight",
    "assert_structure_kept",
    "bitmasked",
    "leaves",
    "opened",
    "prefix",
    "spec_of",
    "stacks",
    "structure",
]
