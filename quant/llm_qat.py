"""LLM-QAT: train rounded weights, inputs and KV cache towards what the model itself predicts on text that it wrote, without data
(Liu et al., 2305.17888)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compress.passes import Needs, Taxon
from compress.quant.aware import QuantizationAware
from compress.quant.grids import GridSettings, GroupSize
from compress.rollouts import Rollouts
from compress.train_pass import Batch
from compress.weights import Quantized

_GREEDY = (3, 5)  # the likeliest tokens come first: so many, which of these is drawn


class LLMQAT(GridSettings, QuantizationAware):
    """Weights are kept in float32 and rounded at every step to the grid of their row's largest magnitude; gradients pass as if
    they were not. ``activations`` rounds inputs, token by token, in training as readers do. A KV cache that an earlier pass
    rounds (``kv_cache:bits=8,kind=int``) is rounded in training too: keys and values per token and head.

    Every training sequence begins with a token drawn from the vocabulary; the uncompressed model goes on with the likeliest
    ones for 3 to 5 tokens and then draws from all that it predicts. Training text is used for the lengths of sequences, and
    for the held-out loss.

    The grid at 2 bits is that of every quantizer here, which has a zero; the published one of +-1/4 and +-3/4 has none and fits
    no integer grid, nor does that of one bit. Where the published grids leave the lowest code unused, here it is used. See
    :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.QAT
    paper: ClassVar[str] = "2305.17888"

    group_size: GroupSize = Field(None, description="consecutive inputs that share a scale; -1: the whole row")
    data_free: bool = Field(True, description="train on what the uncompressed model writes; false: on the text")

    @field_validator("mse")
    @classmethod
    def _extremes_matter(cls, value: bool) -> bool:
        if value:
            raise ValueError("the grid is fitted at every step, to its group's extreme: leave out mse")
        return value

    @property
    def writes(self) -> bool:
        return self.data_free

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return Needs(teacher=self.data_free or super().needs.teacher)

    def grid(self, values: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Quantized:
        return self.nearest(values, None, dtype)  # type: ignore[return-value]

    def prepare(self, batch: Batch, rollouts: Rollouts) -> Batch:
        if not self.data_free:
            return batch
        assert rollouts.teacher is not None
        generator, n, device = rollouts.generator(batch.tokens, batch.index), len(batch.tokens), batch.tokens.device
        vocabulary = rollouts.teacher.config.get_text_config().vocab_size
        starts = torch.randint(vocabulary, (n, 1), generator=generator, device=device)
        greedy = torch.randint(_GREEDY[0], _GREEDY[1] + 1, (n,), generator=generator, device=device)
        begun = batch._replace(tokens=torch.cat([starts, batch.tokens[:, 1:]], 1), counted=None)
        return rollouts.rewrite(begun, 0, teacher=1.0, greedy=greedy)
