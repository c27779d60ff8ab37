"""What a causal language model says about tokens, before its logits exist."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import BadInput
from compress.train_pass import Batch, Signal


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from final hidden states (..., d) to logits (..., vocabulary) that the model's forward applies.

    Beside the output matrix: Cohere and Granite scale their logits, Gemma caps them softly at ``cap * tanh(x / cap)``.
    """
    config = model.config.get_text_config()
    if (output := model.get_output_embeddings()) is None:
        raise BadInput(f"a {config.model_type} model has no output head to train with")
    scale = getattr(config, "logit_scale", None)
    if scale is None and config.model_type.startswith("granite"):
        scale = 1 / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden)
        if scale is not None:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


def signal_of(model: PreTrainedModel, batch: Batch, states: bool = False) -> Signal:
    """The model's signal at the tokens from which the batch's are predicted."""
    output = model.get_decoder()(input_ids=batch.tokens, use_cache=False, output_hidden_states=states)
    hidden = batch.before_predicted(output.last_hidden_state)
    return Signal(hidden, head_of(model), tuple(map(batch.before_predicted, output.hidden_states)) if states else ())


@torch.no_grad()
def check_head(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raise BadInput unless hidden states and head give the model's own logits. tokens: (n, length), any."""
    signal = signal_of(model, Batch(tokens))
    ours = signal.head(signal.hidden).float()
    theirs = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    if not torch.allclose(ours, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()), equal_nan=True):
        raise BadInput(f"training does not know how a {model.config.model_type} model computes its logits")
