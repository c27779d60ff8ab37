"""Every ordered pair of methods: the second keeps what the first made, and the result opens with equal logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress import methods
from compress.checkpoint import Checkpoint
from compress.manifest import Manifest
from compress.passes import LinearPass, TrainPass
from compress.skeleton import Skeleton
from compress.weights import LowRank, Masked, Quantized, Weight

METHODS = methods.available()
PAIRS = [(first, second) for first in METHODS for second in METHODS]
LINEAR_PAIRS = [pair for pair in PAIRS if all(issubclass(METHODS[key], LinearPass) for key in pair)]


@pytest.fixture(scope="module")
def first_pass(make_pass):
    return make_pass


@pytest.fixture(scope="module")
def second_pass(make_pass):
    """A stronger setting than the first pass has, so that a method after itself has something to do."""

    def make(key: str):
        stronger = {"sparsity": 0.7, "bits": 3, "group_size": 16, "ratio": 0.4}
        return make_pass(key, **{k: v for k, v in stronger.items() if k in METHODS[key].model_fields})

    return make


@pytest.fixture(scope="module")
def after_first(llama, first_pass, run_stages):
    """The artifact of the first method alone."""
    made: dict[str, Path] = {}

    def make(key: str) -> Path:
        if key not in made:
            made[key] = run_stages(llama, [first_pass(key)])
        return made[key]

    return make


def weights_of(artifact: Path) -> dict[str, Weight]:
    skeleton = Skeleton(Checkpoint(artifact))
    return {
        skeleton.module_name(index, local): weight
        for index in range(len(skeleton.blocks))
        for local, weight in skeleton.read_weights(index).items()
    }


def assert_structure_holds(before: Weight, after: Weight, second: type) -> None:
    """What a weight had before ``second`` it still has; before and after come from files."""
    trained = issubclass(second, TrainPass)
    if isinstance(before, LowRank):
        assert isinstance(after, LowRank)
        if trained or not second.factorises:
            assert after.rank == before.rank
            assert_structure_holds(before.down, after.down, second)
            assert_structure_holds(before.up, after.up, second)
        else:
            assert after.rank < before.rank
        return
    if not trained and second.factorises:
        assert isinstance(after, LowRank)
        return
    if before.mask is not None:
        assert after.mask is not None and not (after.mask & ~before.mask).any()
        assert not after.dense()[~before.mask].any()
    old, new = (weight.inner if isinstance(weight, Masked) else weight for weight in (before, after))
    if isinstance(old, Quantized):
        assert isinstance(new, Quantized)
    if isinstance(old, Quantized) and (trained or "bits" not in second.model_fields):
        assert new.bits == old.bits
        kept = new.codes != 0
        assert new.codes[kept].equal(old.codes[kept])
        if trained:
            assert new.codes.equal(old.codes)
        else:
            assert new.scale.equal(old.scale)


def check(artifact: Path, before: Path, first, second, assert_reloads, *, fused: bool) -> None:
    assert_reloads(artifact, atol=1e-5 if isinstance(second, TrainPass) else 0.0)
    earlier, later = weights_of(before), weights_of(artifact)
    assert earlier.keys() == later.keys()
    assert any(not earlier[name].dense().equal(later[name].dense()) for name in later), "the second pass did nothing"
    if not fused or isinstance(first, TrainPass):  # else its weights may rest on other activations
        for name, weight in later.items():
            assert_structure_holds(earlier[name], weight, type(second))
    for name, weight in later.items():
        assert type(earlier[name]) is not LowRank or isinstance(weight, LowRank)
        assert earlier[name].mask is None or weight.mask is not None or isinstance(weight, LowRank)
    manifest = Manifest.read(artifact)
    assert [step.label for step in manifest.steps] == [first.label(), second.label()]
    assert [step.stage for step in manifest.steps] == ([0, 0] if fused else [0, 1])
    assert all(record.passes == [first.label(), second.label()] for record in manifest.modules.values())
    assert sum(record.nbytes for record in manifest.modules.values()) == sum(weight.nbytes for weight in later.values())


@pytest.mark.parametrize(("first", "second"), LINEAR_PAIRS)
def test_pair_in_one_stream(first, second, llama, after_first, first_pass, second_pass, run_stages, assert_reloads):
    steps = first_pass(first), second_pass(second)
    check(run_stages(llama, steps), after_first(first), *steps, assert_reloads, fused=True)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pair_in_two_stages(first, second, llama, after_first, first_pass, second_pass, run_stages, assert_reloads):
    steps = first_pass(first), second_pass(second)
    artifact = run_stages(llama, steps, fuse=False)
    check(artifact, after_first(first), *steps, assert_reloads, fused=False)


@pytest.mark.parametrize(
    ("first", "second"),
    [pair for pair in LINEAR_PAIRS if not any(METHODS[key].needs.stats for key in pair)],
)
def test_without_statistics_one_stream_and_two_stages_agree(first, second, llama, first_pass, second_pass, run_stages):
    steps = first_pass(first), second_pass(second)
    together, apart = (weights_of(run_stages(llama, steps, fuse=fuse)) for fuse in (True, False))
    for name, weight in together.items():
        assert weight.dense().equal(apart[name].dense()), name


@pytest.mark.parametrize("second", ["gptq", "wanda", "svd_llm", "logit_kd"])
def test_an_artifact_is_a_source_like_any_other(second, llama, after_first, first_pass, second_pass, run_stages, assert_reloads):
    """A second run on the first one's artifact: the same weights as two stages of one run, and the lineage is kept."""
    steps = first_pass("wanda"), second_pass(second)
    again = run_stages(after_first("wanda"), steps[1:])
    assert_reloads(again, atol=1e-5)
    manifest, earlier = Manifest.read(again), Manifest.read(after_first("wanda"))
    assert [step.label for step in manifest.steps] == [step.label() for step in steps]
    assert (manifest.base, manifest.base_digest) == (earlier.base, earlier.base_digest)
    assert manifest.parent == str(after_first("wanda"))
    if second != "logit_kd":  # whose teacher is the model that the run was given
        at_once = weights_of(run_stages(llama, steps, fuse=False))
        for name, weight in weights_of(again).items():
            assert weight.dense().equal(at_once[name].dense()), name


def test_a_long_chain(llama, make_pass, run_stages, assert_reloads):
    """Masks, ranks and grids together, with training between and after."""
    steps = [
        make_pass("svd_llm", ratio=0.9, round_to=4), make_pass("wanda", pattern="2:4"), make_pass("logit_kd"),
        make_pass("gptq"), make_pass("logit_kd", trains="weights"),
    ]  # fmt: skip
    artifact = run_stages(llama, steps)
    assert_reloads(artifact, atol=1e-5)
    for name, weight in weights_of(artifact).items():
        assert isinstance(weight, LowRank), name
        for factor in (weight.down, weight.up):
            assert isinstance(factor, Masked) and isinstance(factor.inner, Quantized), name
    for record in Manifest.read(artifact).modules.values():
        assert record.sparsity >= 0.5 and record.bits == 4 and record.rank
        assert record.passes == [step.label() for step in steps]
