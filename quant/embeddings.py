"""Embeddings: round the token embedding and the head to integers with a scale per token, which in small models are much
of the bytes (as MobileLLM's authors find; Liu et al., 2402.14905).

Rounding is to nearest: an embedding's row is looked up, not multiplied by an input that could tell which of its entries
matter, and the head's inputs are the same for all of its rows.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import BadInput
from compress.passes import ModelPass, Taxon
from compress.quant.grids import GroupSize, effective_group_size, fit_grid, quantize
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.weights import Quantized, Table, Weight

_ROWS = 4096  # that are rounded at a time


class Embeddings(ModelPass):
    """Symmetric integer grids for the token embedding and the output head.

    Stock transformers reads an embedding of 8 bits with a scale per row, if the head is a matrix of its own; that head may
    have any bits. Other embeddings are read by the loader that the artifact carries, and so is one that the head shares,
    which is stored once. Tables of positions stay as they are.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2402.14905"

    bits: int = Field(8, ge=2, le=8, description="bits per weight")
    group_size: GroupSize = Field(None, description="entries of a row that share a scale; none or -1: the whole row")
    mse: bool = Field(False, description="search the range that rounds best instead of taking the extremes")
    head: bool = Field(True, description="round an output head of its own too; one that shares the embedding always is")

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        name = f"{model.arch.embeddings[0]}.weight"
        embedding = model.model.get_submodule(model.arch.embeddings[0])
        if type(embedding) is not nn.Embedding and not hasattr(embedding, "scalar_embed_scale"):
            raise BadInput(f"{self.method()}: compress does not know how a {type(embedding).__name__} computes")
        if (width := embedding.weight.shape[1]) % 8:
            raise BadInput(f"{self.method()}: rows of {width} entries, no multiple of 8, cannot be packed")
        names = {name: model.tied_head() is None and self.bits == 8 and self.group_size is None}
        if self.head and (head := self._own_head(model)):
            names[f"{head}.weight"] = True
        dtype = model.outer_meta(name).dtype
        shapes = {each: model.outer_meta(each).shape for each in names}
        meta = {each: self._outline(shapes[each], dtype, each == name, native) for each, native in names.items()}

        def outer(tensors: dict[str, Tensor]) -> dict[str, Tensor | Weight]:
            return tensors | {each: self.round(tensors[each], each == name, native) for each, native in names.items()}

        return Surgery(outer=outer, tables=meta)

    def _own_head(self, model: Skeleton) -> str | None:
        head = model.model.get_output_embeddings()
        names = [name for name, module in model.model.named_modules() if module is head]
        if model.tied_head() is not None or not names or not isinstance(head, nn.Linear):
            return None
        return names[0]

    def round(self, table: Tensor, is_embedding: bool, native: bool) -> Weight:
        """A matrix (rows, d) on the grid, scales in its dtype."""
        size = effective_group_size(table.shape[1], self.group_size)
        codes, scales = [], []
        for rows in table.split(_ROWS):
            grid = fit_grid(rows.float(), self.bits, size, True, self.mse, table.dtype)
            codes.append(quantize(rows.float(), grid))
            scales.append(grid.scale)
        return self._weight(torch.cat(codes), torch.cat(scales), is_embedding, native)

    def _outline(self, shape: torch.Size, dtype: torch.dtype, is_embedding: bool, native: bool) -> Weight:
        n_rows, width = shape
        n_groups = width // effective_group_size(width, self.group_size)
        codes = torch.empty(n_rows, width, dtype=torch.int8, device="meta")
        return self._weight(codes, torch.empty(n_rows, n_groups, dtype=dtype, device="meta"), is_embedding, native)

    def _weight(self, codes: Tensor, scale: Tensor, is_embedding: bool, native: bool) -> Weight:
        if native:
            return Quantized(codes, scale, None, self.bits, plain=is_embedding)
        return Table(codes, scale, self.bits)
