"""KV cache: round keys (after rotary embedding) and values before they are cached (as in LLM-QAT, Liu et al., 2305.17888,
and KVQuant, Hooper et al., 2401.18079).

Long contexts spend more memory on the cache than on weights. The weights stay as they are; readers round while they run.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.activations import CACHE_SCALES, Range, cached_attention, intercept
from compress.errors import BadInput
from compress.passes import ModelPass, Taxon
from compress.skeleton import Skeleton
from compress.surgery import Surgery
from compress.walk import Walk
from compress.weights import Weight


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

    @property
    def measures(self) -> bool:
        return not self.per_token

    def measure(self, walk: Walk) -> list[dict[str, float]]:
        """The largest magnitudes of each block's keys and values."""
        names, found = self._attentions(walk.skeleton), []
        for block, _, _ in walk.blocks():
            largest = {key: torch.zeros(1) for key in CACHE_SCALES}
            handle = intercept(block.module.get_submodule(names[block.index]), partial(_record, largest))
            for rows in block.batches(walk.batch):
                block.run(rows)
            handle.remove()
            found.append({key: float(value) for key, value in largest.items()})
        return found

    def _attentions(self, model: Skeleton) -> list[str]:
        """The name of each block's attention module."""
        if model.owners:
            raise BadInput(
                f"{self.method()}: compressed-tensors cannot round the KV cache of blocks that share their layers: leave one of "
                "the two out"
            )
        names = [cached_attention(block) for block in model.blocks]
        if not (all(len(found) == 1 for found in names) and hasattr(model.checkpoint.config, "num_key_value_heads")):
            raise BadInput(
                f"{self.method()}: compressed-tensors, which readers round the cache by, does not know the attention of "
                f"{model.checkpoint.base_model_type} models in transformers {version('transformers')} (of 5.24 and later, "
                "compressed-tensors 0.20 knows none: pip install 'transformers<5.24')"
            )
        return [found[0] for found in names]

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        names = self._attentions(model)
        config = model.checkpoint.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

        def block(index: int, weights: dict[str, Weight], others: dict[str, Tensor]) -> tuple[dict, dict]:
            prefix = f"{names[index]}."
            kept = {name: value for name, value in others.items() if name.removeprefix(prefix) not in CACHE_SCALES.values()}
            dtype = next(value.dtype for value in kept.values() if value.is_floating_point())
            for key, largest in ({} if self.per_token else found[index]).items():
                scale = (torch.full((1,), largest) / self.numbers.half).to(dtype)
                kept[prefix + CACHE_SCALES[key]] = scale.clamp_min(torch.finfo(dtype).tiny)
            return weights, kept

        added = {
            f"{model.module_name(index, name)}.{scale}": torch.empty(1, device="meta")
            for index, name in enumerate(names) for scale in CACHE_SCALES.values() if not self.per_token
        }  # fmt: skip
        return Surgery(block=block, added=added, cache=self.scheme(head_dim))


def _record(largest: dict[str, Tensor], which: str, x: Tensor) -> Tensor:
    largest[which] = torch.maximum(largest[which], x.abs().max().float().cpu())
    return x
