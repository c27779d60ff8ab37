"""AWQ: before rounding to nearest, scale up the inputs whose activations are large, and clip each group's range (Lin et al.,
2306.00978)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.apply import apply
from compress.arch import Edge
from compress.block import Block
from compress.passes import BlockPass, Needs, Taxon
from compress.quant.clip import clip_groups, group_moments
from compress.quant.grids import Gridded, dequantize, effective_group_size, quantize
from compress.quant.rtn import RTN
from compress.stats import LinearStats
from compress.weights import Dense, Masked, Weight

_N_ALPHAS = 20
_LEAST_SCALE = 1e-4
_TOKENS_PER_FORWARD = 4096


class AWQ(Gridded, BlockPass):
    """Integer codes next to weights that were rescaled so that rounding hurts least where activations are large.

    The inputs of q/k/v, o, gate/up and down are multiplied by ``s = mean|x| ** alpha``, brought to a geometric mid of one,
    and the norm or the layer before is divided by it, which costs nothing at run time. Of alpha = 0, 0.05, ... 0.95 the one
    is taken whose rounded weights change least what the attention or the MLP puts out, for layers that read a norm, or else
    the layer itself. Then the ranges of all groups, but for those of queries and keys, are clipped to where they change the
    layer's outputs least, and weights are rounded to nearest. Both searches use ``search_tokens`` tokens.

    A layer with no scalable source is only clipped and rounded: o after grouped-query attention, the second layer of an MLP
    with another activation than ReLU, and layers whose source or siblings are not targeted or already on a grid. The
    published code rounds to asymmetric grids (``symmetric=false``), and gives each block the activations of the
    uncompressed model; here they are those of the blocks compressed before, as for every other method.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ONLY
    paper: ClassVar[str] = "2306.00978"
    needs: ClassVar[Needs] = Needs(frozenset({"abssum"}), inputs=True)
    efforts: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"search_tokens": 1024}, "best": {"search_tokens": 32768}}

    clip: bool = Field(True, description="search how far to clip each group's range, after scaling")
    search_tokens: int = Field(4096, ge=1, description="calibration tokens on which scales and ranges are compared")

    @torch.no_grad()
    def block(self, block: Block) -> None:
        assert block.inputs is not None
        length = block.inputs.shape[1]
        rows = block.inputs[: max(1, self.search_tokens // length)].split(max(1, _TOKENS_PER_FORWARD // length))
        for edge in block.edges("norms"):  # judged by the module that the readers are in
            block.fold(edge, self._best_scale(block, edge, edge.readers[0].rpartition(".")[0] or edge.readers[0], rows))
        for edge in block.edges("products"):
            block.fold(edge, self._best_scale(block, edge, edge.readers[0], rows))
        if self.clip:
            self._clip(block, rows)
        nearest = RTN(**self.model_dump(include=set(RTN.model_fields)))
        for local in sorted(block.selected):
            weight = _on_device(block, block.weights[local])
            block.set(local, apply(nearest, weight, LinearStats(weight.shape[1], ())))

    def _best_scale(self, block: Block, edge: Edge, path: str, rows: tuple[Tensor, ...]) -> Tensor:
        """The scale (channels,) of an edge that changes the outputs of the module ``path`` least."""
        stats = block.stats[edge.readers[0]]
        scales = [activation_scale(stats.abssum / stats.n, i / _N_ALPHAS) for i in range(_N_ALPHAS)]
        entries = {name: _on_device(block, w) for reader in edge.readers for name, w in block.entries(reader).items()}
        losses = torch.zeros(_N_ALPHAS, dtype=torch.float64)
        for batch in rows:
            module = block.isolate(path, batch)
            exact = module({}).float()
            for i, scale in enumerate(scales):
                outputs = module({name: self.rounded_in(scale, weight) for name, weight in entries.items()})
                losses[i] += (outputs.float() - exact).square().mean(dtype=torch.float64).cpu() * len(batch)
        return scales[int(losses.nan_to_num(nan=torch.inf).argmin())]

    def rounded_in(self, scale: Tensor, weight: Weight) -> Tensor:
        """The matrix (out, in) float32 that is rounded with its inputs scaled, Q(W diag(s)) diag(s)^-1; scale: (in,)."""
        values = weight.dense(torch.float32) * scale
        grid = self.fit(values, weight.dtype)
        return dequantize(quantize(values, grid), grid) / scale

    def _clip(self, block: Block, rows: tuple[Tensor, ...]) -> None:
        """Clip the block's matrices but, as in the published code, those of queries and keys: attention scores multiply the
        two, so that the error of one by itself says little of what its clipping does."""
        values = {edge.source for edge in block.skeleton.arch.products}
        left = tuple(f"{local}." for local in block.skeleton.arch.groups[0] if local not in values)
        matrices = {name: weight for name, weight in block.matrices().items() if not f"{name}.".startswith(left)}
        moments: dict[str, Tensor] = {}
        for batch in rows:
            for name, x in block.layer_inputs(matrices, batch).items():
                n_inputs = matrices[name].shape[1]
                found = group_moments(x, n_inputs // effective_group_size(n_inputs, self.group_size))
                moments[name] = moments[name].add_(found) if name in moments else found
        for name, weight in matrices.items():
            dense, dtype = _on_device(block, weight).dense(torch.float32), weight.dtype
            clipped = Dense(clip_groups(dense, moments.pop(name), lambda part, dtype=dtype: self.fit(part, dtype)).to(dtype))
            block.replace(name, clipped if weight.mask is None else Masked(clipped, weight.mask.to(dense.device)))


def activation_scale(mean: Tensor, alpha: float) -> Tensor:
    """``mean ** alpha`` (in,), divided by the geometric mean of its extremes; one for inputs that were never active, whose
    mean (in,), of |x|, is zero."""
    active = mean > 0
    if not bool(active.any()):
        return torch.ones_like(mean)
    scale = mean.pow(alpha).clamp_(min=_LEAST_SCALE)
    middle = (scale[active].max() * scale[active].min()).sqrt()
    return torch.where(active, scale / middle, 1.0)


def _on_device(block: Block, weight: Weight) -> Weight:
    return weight.map(lambda tensor: tensor.to(block.skeleton.device))
