"""The configuration of a DeciLM checkpoint, which this file travels with: of a Llama whose blocks have widths of their own.

Readers look at ``block_configs[i].attention.n_heads_in_group`` and ``block_configs[i].ffn.ffn_mult``.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class Entry(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Entry(value) if isinstance(value, dict) else value


class DeciLMConfig(PretrainedConfig):
    """block_configs: for every block its "attention" and its "ffn"."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **settings: Any):
        self.block_configs = [Entry(block) for block in block_configs or ()]
        super().__init__(**settings)
