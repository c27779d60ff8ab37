"""KV cache: round keys (after rotary embedding) and values before they are cached (as in LLM-QAT, Liu et al., 2305.17888,
and KVQuant, Hooper et al., 2401.18079).

Long contexts spend more memory on the cache than on weights. The weights stay as they are; readers round while they run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.activations import CACHE_SCALES, Range, cached_attention, intercept
from compress.errors import BadInput
from compress.passes import ModelPass, Taxon
from compress.skeleton import Skeleton
from compress.stream import Stream
from compress.surgery import Surgery
from compress.weights import Weight
from compress.writer import BlockStore


class KVCache(ModelPass):
    """Keys and values on symmetric grids.

    By default 8-bit floats with one scale per layer for keys and one for values, the largest magnitudes on the calibration
    text: what stock transformers and vLLM both take. One scale is too coarse for fewer bits; then every token and head gets
    its own, while the model runs, which needs no calibration and which transformers takes.
    """

    taxon: ClassVar[Taxon] = Taxon.WEIGHT_ACTIVATION
    paper: ClassVar[str] = "2401.18079"

    bits: int = Field(8, ge=2, le=8, description="bits per number")
    kind: Literal["float", "int"] | None = Field(None, description="none: float for 8 bits, int for fewer")
    dynamic: bool | None = Field(
        None, description="a scale per token and head, worked out while running; none: for fewer than 8 bits"
    )

    @model_validator(mode="after")
    def _floats_have_eight_bits(self) -> KVCache:
        if self.kind == "float" and self.bits != 8:
            raise ValueError(f"kind=float has 8 bits, not bits={self.bits}")
        return self

    @property
    def numbers(self) -> Range:
        """The grid."""
        return Range(self.bits, self.bits == 8 if self.kind is None else self.kind == "float")

    @property
    def per_token(self) -> bool:
        """Whether every token and head has its own scale."""
        return self.bits < 8 if self.dynamic is None else self.dynamic

    def scheme(self, head_dim: int) -> dict[str, Any]:
        """The rounding as compressed-tensors says it."""
        scales = {"strategy": "group", "group_size": head_dim} if self.per_token else {"strategy": "tensor"}
        kind = "float" if self.numbers.is_float else "int"
        return {"num_bits": self.bits, "type": kind, "symmetric": True, "dynamic": self.per_token, **scales}

    def surgery(self, model: Skeleton) -> Surgery:
        names = [cached_attention(block) for block in model.blocks]
        config = model.checkpoint.config
        if not (all(len(found) == 1 for found in names) and hasattr(config, "num_key_value_heads")):
            raise BadInput(
                f"{self.method()}: compressed-tensors, which readers round the cache by, does not know the attention of "
                f"{model.checkpoint.base_model_type} models"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        scales: dict[int, dict[str, Tensor]] = {}

        def measure(tokens: Tensor, directory: Path) -> None:
            scales.update(enumerate(_Ranges(model, tokens, BlockStore(directory / "ranges"), directory).find(names)))

        def block(index: int, weights: dict[str, Weight], others: dict[str, Tensor]) -> tuple[dict, dict]:
            prefix = f"{names[index][0]}."
            kept = {name: value for name, value in others.items() if name.removeprefix(prefix) not in CACHE_SCALES.values()}
            dtype = next(value.dtype for value in kept.values() if value.is_floating_point())
            for key, largest in ({} if self.per_token else scales[index]).items():
                scale = (largest / self.numbers.half).to(dtype)
                kept[prefix + CACHE_SCALES[key]] = scale.clamp_min(torch.finfo(dtype).tiny)
            return weights, kept

        added = {
            f"{model.module_name(index, found[0])}.{scale}": torch.empty(1, device="meta")
            for index, found in enumerate(names) for scale in CACHE_SCALES.values() if not self.per_token
        }  # fmt: skip
        return Surgery(
            outer=lambda tensors: tensors, block=block, added=added, cache=self.scheme(head_dim),
            measure=None if self.per_token else measure,
        )  # fmt: skip


class _Ranges(Stream):
    """A stream that changes nothing, and looks at what would be cached."""

    def __init__(self, skeleton: Skeleton, tokens: Tensor, store: BlockStore, scratch: Path):
        super().__init__(skeleton, [], tokens, store, scratch)
        self.tokens = tokens

    @torch.no_grad()
    def find(self, names: list[list[str]]) -> list[dict[str, Tensor]]:
        """The largest magnitudes of each block's keys and values, (1,) float32."""
        self._start_activations()
        assert self.activations is not None
        found = []
        for index, block in enumerate(self.skeleton.blocks):
            largest = {key: torch.zeros(1) for key in CACHE_SCALES}
            self.skeleton.load_block(index, self.skeleton.read_weights(index))
            self.skeleton.block_arguments = self.calls
            handle = intercept(block.get_submodule(names[index][0]), partial(_record, largest))
            for rows in self.activations.split(self.batch):
                rows.copy_(self.skeleton.run_block(index, rows))
            handle.remove()
            self.skeleton.free_block(index)
            found.append(largest)
        return found


def _record(largest: dict[str, Tensor], which: str, x: Tensor) -> Tensor:
    largest[which] = torch.maximum(largest[which], x.abs().max().float().cpu())
    return x
