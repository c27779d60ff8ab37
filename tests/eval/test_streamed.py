"""A model that goes block by block gives the numbers of the same model in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.eval.fidelity import base_logprobs, compare, perplexity
from compress.eval.harness import evaluate
from compress.eval.streamed import StreamedModel
from compress.skeleton import Skeleton


@pytest.fixture
def streamed(model_directory) -> StreamedModel:
    return StreamedModel(Skeleton(Checkpoint(model_directory)))


def test_scores_are_those_of_the_model_in_memory(streamed, model, tokenizer, settings):
    resident = evaluate(model, tokenizer, settings, device="cpu")
    found = evaluate(streamed, tokenizer, settings, device="cpu")
    assert set(found.scores) == set(resident.scores)
    for name, score in found.scores.items():
        assert score.metrics == pytest.approx(resident.scores[name].metrics, rel=1e-5)
    for name, own in found.documents.items():
        assert [d.answer for d in own] == [d.answer for d in resident.documents[name]]
        assert [d.outcome for d in own] == pytest.approx([d.outcome for d in resident.documents[name]], rel=1e-5)


def test_windows_longer_than_the_context_are_cut_alike(streamed, model, tokenizer, settings):
    pages = replace(settings, tasks=("tiny_pages",))
    resident = evaluate(model, tokenizer, pages, device="cpu", max_length=24)
    found = evaluate(streamed, tokenizer, pages, device="cpu", max_length=24)
    assert found.scores["tiny_pages"].metrics == pytest.approx(resident.scores["tiny_pages"].metrics, rel=1e-5)


def test_divergence_is_none_and_portions_change_nothing(streamed, model, tmp_path):
    windows = torch.randint(320, (5, 40), generator=torch.Generator().manual_seed(0))
    path = base_logprobs(model, windows, tmp_path / "base.npy")
    assert compare(streamed, windows, path).kl_max < 1e-5
    whole = list(streamed.logits(windows.split(2)))
    streamed.activation_bytes = 1  # a portion is one batch
    assert all(torch.equal(one, other) for one, other in zip(whole, streamed.logits(windows.split(2)), strict=True))
    assert perplexity(streamed, windows).token_perplexity == pytest.approx(perplexity(model, windows).token_perplexity, rel=1e-5)


def test_only_one_block_is_ever_filled(streamed, monkeypatch):
    skeleton, most = streamed.skeleton, 0
    run = skeleton.run_block

    def counting(index, hidden):
        nonlocal most
        filled = [block for block in skeleton.blocks if not any(p.is_meta for p in block.parameters())]
        most = max(most, len(filled))
        return run(index, hidden)

    monkeypatch.setattr(skeleton, "run_block", counting)
    tokens = torch.ones(1, 8, dtype=torch.int64)
    assert next(iter(streamed.logits([tokens]))).shape == (1, 8, 320)
    assert most == 1 and all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_writing_is_refused(streamed, tokenizer, settings, tmp_path):
    (tmp_path / "writing.yaml").write_text(
        f"""
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {settings.include[0]}/choices.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 2}}
metric_list: [{{metric: exact_match}}]
"""
    )
    writing = replace(settings, tasks=("tiny_writing",), include=(str(tmp_path),))
    with pytest.raises(ValueError, match="tiny_writing: the model would write text"):
        evaluate(streamed, tokenizer, writing, device="cpu")
