"""A model to be compressed and trained, and what it is trained on."""

from __future__ import annotations

import pytest
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from tests.training import SHAPE, TOKENS, make


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make(LlamaConfig(**SHAPE, attention_bias=True))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return TOKENS
