"""What blocks are compared with: those of the uncompressed model, where it has blocks that correspond."""

import logging

import torch

from compress.checkpoint import Checkpoint
from compress.manifest import Manifest
from compress.reference import Reference, incomparable
from compress.skeleton import Skeleton


def embedded(path, tokens):
    skeleton = Skeleton(Checkpoint(path))
    return skeleton, next(iter(skeleton.embed([tokens])))


def test_it_goes_through_the_blocks_as_the_model_does(llama, tokens, reload):
    skeleton, entered = embedded(llama, tokens)
    reference = Reference(skeleton, entered.clone(), batch=1)
    with torch.no_grad():
        states = reload(llama)(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(reference.outputs, states[0])
    reference.advance(0)
    torch.testing.assert_close(reference.outputs, states[1])


def test_which_models_have_comparable_blocks(llama, make_checkpoint, tokens, run_stages):
    original, entered = embedded(llama, tokens)
    wanted = {
        "shortgpt": "2 blocks where 1 are left",
        "minitron:units=hidden,sparsity=0.5,round_to=4": "64 hidden channels where 32 are left",
        "quarot": "another basis",
        "minitron": None, "embeddings:bits=4": None,
    }  # fmt: skip
    for chain, reason in wanted.items():
        found = incomparable(original, entered, *embedded(run_stages(llama, [chain]), tokens))
        assert (found is None) if reason is None else (reason in (found or "")), (chain, found)


def test_a_later_stage_still_compares_with_the_original(llama, run_stages, assert_reloads):
    """Between the two stages what was pruned is the model; its own outputs would leave nothing to repair."""
    chain = ["wanda:sparsity=0.6", "reconstruct:iterations=5,learning_rate=0.005"]
    pruned, together, apart = run_stages(llama, chain[:1]), run_stages(llama, chain), run_stages(llama, chain, fuse=False)
    assert_reloads(apart, atol=1e-5)
    first = [Skeleton(Checkpoint(path)).read_weights(0) for path in (pruned, together, apart)]  # whose inputs are the same
    for name, weight in first[1].items():
        assert weight.dense().equal(first[2][name].dense()), name
    assert not all(weight.dense().equal(first[0][name].dense()) for name, weight in first[1].items())


def test_without_such_blocks_the_stage_begins_anew_and_says_so(llama, run_stages, caplog):
    chain = ["shortgpt", "reconstruct:iterations=2"]
    with caplog.at_level(logging.WARNING, logger="compress"):
        repaired = run_stages(llama, chain)
    assert "2 blocks where 1 are left" in caplog.text
    before = run_stages(llama, chain[:1])
    assert Checkpoint(repaired).digest == Checkpoint(before).digest  # nothing was done after the blocks had gone
    assert [step.method for step in Manifest.read(repaired).steps] == ["shortgpt", "reconstruct"]
