"""The logits of a model as training computes them."""

from __future__ import annotations

import pytest
import torch
from transformers import Cohere2Config, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, OPTConfig

from compress.errors import BadInput
from compress.signals import head_of
from tests.training import GPT2_SHAPE, SHAPE, compressed, fit, make, masked


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        GPT2Config(**GPT2_SHAPE),
        Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=2.0),
        GraniteConfig(**SHAPE, logits_scaling=8.0),
        Cohere2Config(**SHAPE),
        OPTConfig(**{name: value for name, value in SHAPE.items() if name in vars(OPTConfig())}, word_embed_proj_dim=32),
    ],
    ids=lambda config: config.model_type,
)
def test_head_of_gives_the_logits_of_the_model(config, tokens):
    model = make(config).eval()
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=tokens[:2], use_cache=False).last_hidden_state
        torch.testing.assert_close(head_of(model)(hidden), model(tokens[:2]).logits)


def test_a_head_that_is_not_understood_is_refused(llama, tokens, tmp_path, monkeypatch):
    student, weights = compressed(llama, masked)
    forward = student.forward

    def doubled(**arguments):
        output = forward(**arguments)
        return type(output)(logits=2 * output.logits)

    monkeypatch.setattr(student, "forward", doubled)
    with pytest.raises(BadInput, match="llama"):
        fit(student, weights, llama, tokens, tmp_path)
