"""Ordered pairs of methods: the second keeps what the first made, and the result opens with equal logits."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest
import torch

from compress import methods
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.manifest import Manifest
from compress.narrow import narrow
from compress.passes import BlockPass, CorrectionPass, LinearPass, ModelPass, StoragePass, StreamPass, Taxon
from compress.quant.aware import QuantizationAware
from compress.quant.codebooks import CodebookQuantizer
from compress.skeleton import Skeleton
from compress.stages import group
from compress.train_pass import TrainPass
from compress.weights import Affine, Coded, Composed, LowRank, Masked, Quantized, Sum, TensorTrain, Weight, leaves, opened
from compress.weights.composed import unmasked

METHODS = {key: method for key, method in methods.available().items() if key != "adapter"}  # which is of one model
ONE_OF_EACH = (
    "gptq", "nf4", "hqq", "spqr", "autoround", "quarot", "wanda", "pack", "minitron", "shortgpt", "foldgpt", "svd_llm",
    "logit_kd",
)  # fmt: skip
"""A method for every kind of thing that passes make of a layer, and for every kind of pass: what a pair can trip over.
Pairs of others are slow tests: there are hundreds."""


def pairs(keys: Iterable[str]) -> list:
    """Every ordered pair."""
    return [
        pytest.param(first, second, marks=[] if {first, second} <= set(ONE_OF_EACH) else pytest.mark.slow)
        for first, second in product(keys, repeat=2)
    ]


ROTATABLE = (
    "quarot", "smoothquant", "kv_cache", "svd", "svd_llm", "asvd", "fwsvd", "welore", "laser", "greenformer", "shortgpt",
    "angular", "shortened", "laco", "minitron", "llm_pruner", "flap", "slicegpt", "permute", "reconstruct",
    *(
        key for key, method in METHODS.items()
        if issubclass(method, TrainPass) and key not in ("gradual", "e2e_qp") and not issubclass(method, QuantizationAware)
    ),
)  # fmt: skip
"""What a rotation can follow: it would fill masks and leave grids, and says so before anything is computed."""
BLOCKS = ("shortgpt", "angular", "shortened", "laco", "foldgpt")
"""What changes which blocks there are."""
WIDTHS = ("minitron", "llm_pruner", "flap")
"""What removes neurons and heads, from the inputs of layers too."""
QUANTIZERS = {key for key, method in METHODS.items() if "compress.quant" in method.__module__ and key not in ROTATABLE}
QUANTIZERS -= {"quarot", "embeddings"}
CODEBOOKS = {key for key, method in METHODS.items() if issubclass(method, CodebookQuantizer)} | {"billm", "bitstack"}
"""What cannot keep zeros, nor get any."""
MASKING = {key for key, method in METHODS.items() if method.taxon is Taxon.UNSTRUCTURED and key != "permute"}
FACTORISING = {key for key, method in METHODS.items() if getattr(method, "factorises", False)}

LINEAR = [key for key, method in METHODS.items() if issubclass(method, LinearPass)]


@pytest.fixture(scope="module")
def first_passes(make_chain):
    return make_chain


@pytest.fixture(scope="module")
def second_passes(make_chain):
    """A stronger setting than the first pass has, so that a method after itself has something to do."""

    def make(key: str):
        stronger = {
            "sparsity": 0.7,
            "bits": 3,
            "group_size": 16,
            "ratio": 0.4,
            "block_size": 32,
            "threshold": 3.0,
            "scheme": "tensor",
        }
        stronger = {} if key in (*BLOCKS, "mixed") else stronger
        return make_chain(key, **{k: v for k, v in stronger.items() if k in METHODS[key].model_fields})

    return make


@pytest.fixture(scope="module")
def after_first(llama, first_passes, run_stages):
    """The artifact of the first method alone."""
    made: dict[str, Path] = {}

    def make(key: str) -> Path:
        if key not in made:
            made[key] = run_stages(llama, first_passes(key))
        return made[key]

    return make


def weights_of(artifact: Path) -> dict[str, Weight]:
    skeleton = Skeleton(Checkpoint(artifact))
    return {
        skeleton.module_name(index, local): weight
        for index in range(len(skeleton.blocks)) if index not in skeleton.owners
        for local, weight in skeleton.read_weights(index).items()
    }  # fmt: skip


def assert_structure_holds(before: Weight, after: Weight, steps: list) -> None:
    """What a weight had before ``steps`` it still has; before and after come from files."""
    trained = all(isinstance(step, TrainPass) and not isinstance(step, QuantizationAware) for step in steps)
    if any(isinstance(step, LinearPass) and step.factorises for step in steps):
        assert isinstance(after, Composed)
        if isinstance(before, LowRank) and isinstance(after, LowRank):
            assert after.rank <= before.rank
        return
    if before.mask is not None:
        assert after.mask is not None and not (after.mask & ~before.mask).any()
        assert not after.dense()[~before.mask].any()
    if isinstance(after, Sum) and not isinstance(before, Sum):  # split, or with a correction beside it
        after = after.parts[0]
    if isinstance(before, LowRank):
        assert isinstance(after, LowRank) and after.rank == before.rank
        assert_structure_holds(before.down, after.down, steps)
        assert_structure_holds(before.up, after.up, steps)
        return
    if isinstance(before, Sum):
        assert isinstance(after, Sum) and len(after.parts) >= len(before.parts)
        for part, later in zip(before.parts, after.parts, strict=False):
            assert_structure_holds(part, later, steps)
        return
    old, new = (weight.inner if isinstance(weight, Masked) else weight for weight in (before, after))
    prunes = all(isinstance(step, LinearPass) and "bits" not in type(step).model_fields for step in steps)
    if trained and isinstance(old, Quantized | Affine):
        assert type(new) is type(old) and new.bits == old.bits
        assert new.codes.equal(old.codes) or steps[-1].method() == "pv_tuning"
    elif prunes and isinstance(old, Quantized) and isinstance(new, Quantized):
        assert new.bits == old.bits and new.scale.equal(old.scale)
        kept = new.dense() != 0
        assert new.codes[kept].equal(old.codes[kept])


def has_matrices(weight: Weight) -> bool:
    """Whether a block pass finds something in a layer: a matrix, a factor or a part that is not a form of its own."""
    return any(not isinstance(unmasked(leaf), Composed) for _, leaf in leaves("layer", weight))


def has_mask(weight: Weight) -> bool:
    return any(leaf.mask is not None for _, leaf in leaves("layer", weight))


def has_rank(weight: Weight) -> bool:
    return isinstance(unmasked(weight), LowRank | TensorTrain)


def has_grid(weight: Weight) -> bool:
    return any(isinstance(unmasked(leaf), Coded) for _, leaf in leaves("layer", weight))


def check(artifact: Path, before: Path, first: list, second: list, assert_reloads, *, fuse: bool) -> None:
    steps = [*first, *second]
    assert_reloads(artifact, atol=0.0 if all(isinstance(step, LinearPass) for step in steps) else 1e-5)
    manifest, labels = Manifest.read(artifact), [step.label() for step in steps]
    stages = [index for index, stage in enumerate(group(steps, fuse)) for _ in stage]
    assert [step.label for step in manifest.steps] == labels and [step.stage for step in manifest.steps] == stages
    earlier, later = weights_of(before), weights_of(artifact)
    stored_so = isinstance(steps[-1], StoragePass) and steps[-1] == first[-1]
    # These leave grids alone, and masks of earlier stages.
    moves = steps[-1].method() in ("permute", "smoothquant", "dsnot", "laser")
    left_alone = moves and any(has_grid(weight) or has_mask(weight) or has_rank(weight) for weight in earlier.values())
    left_alone |= first[-1].method() == steps[-1].method() == "permute"  # the order is the best it finds already
    left_alone |= steps[-1].method() == "reconstruct"  # which keeps what is best on sequences that it does not train on
    if not (stored_so or left_alone) and (not isinstance(steps[-1], BlockPass) or any(map(has_matrices, earlier.values()))):
        assert Checkpoint(artifact).digest != Checkpoint(before).digest, "the second pass did nothing"
    assert sum(record.nbytes for record in manifest.modules.values()) == sum(weight.nbytes for weight in later.values())
    if any(isinstance(step, ModelPass) for step in second):  # layers may be others now, but what was made of them stays
        for what in (has_mask, has_rank, has_grid):
            assert not all(map(what, earlier.values())) or all(map(what, later.values())), what.__name__
        return
    assert earlier.keys() == later.keys()
    assert Checkpoint(artifact).structure == Checkpoint(before).structure
    assert all(weight.shape == earlier[name].shape for name, weight in later.items())
    for name, weight in later.items():
        if stages[len(first) - 1] != stages[len(first)]:  # else its weights may rest on other activations
            assert_structure_holds(earlier[name], weight, second)
        assert not isinstance(earlier[name], LowRank) or isinstance(weight, Composed)
        assert earlier[name].mask is None or weight.mask is not None or isinstance(weight, Composed)
    if all(isinstance(step, LinearPass | TrainPass) for step in steps):  # others may leave layers alone
        assert all(record.passes == labels for record in manifest.modules.values())


@pytest.mark.parametrize(("first", "second"), pairs(LINEAR))
def test_pair_in_one_stream(first, second, llama, after_first, first_passes, second_passes, run_stages, assert_reloads):
    chains = first_passes(first), second_passes(second)
    if message := refusal(first, second):
        with pytest.raises(BadInput, match=message):
            run_stages(llama, [*chains[0], *chains[1]])
        return
    artifact = run_stages(llama, [*chains[0], *chains[1]])
    check(artifact, after_first(first), *chains, assert_reloads, fuse=True)


@pytest.mark.parametrize(("first", "second"), pairs(METHODS))
def test_pair_in_two_stages(
    first, second, llama, make_checkpoint, after_first, first_passes, second_passes, run_stages, assert_reloads
):
    chains = first_passes(first), second_passes(second)
    source, before = llama, after_first
    if first in BLOCKS and second in BLOCKS:  # two blocks would be too few
        source = make_checkpoint("llama", num_hidden_layers=4)

        def before(_: str) -> Path:
            return run_stages(source, chains[0])

    if second in WIDTHS and not all(map(can_lose_inputs, weights_of(after_first(first)).values())):
        with pytest.raises(BadInput, match="prune before quantizing"):
            run_stages(source, [*chains[0], *chains[1]], fuse=False)
        return
    if message := refusal(first, second):
        with pytest.raises(BadInput, match=message):
            run_stages(source, [*chains[0], *chains[1]], fuse=False)
        return
    artifact = run_stages(source, [*chains[0], *chains[1]], fuse=False)
    check(artifact, before(first), *chains, assert_reloads, fuse=False)


def can_lose_inputs(weight: Weight) -> bool:
    """Whether columns can be taken out without tearing groups apart that share a scale."""
    try:
        return bool(narrow(opened(weight), None, torch.arange(weight.shape[1] - 1)))
    except ValueError:
        return False


def refusal(first: str, second: str) -> str | None:
    """What the second method says, before anything is computed, where it cannot take what the first has made."""
    if {first, second} == {"foldgpt", "kv_cache"}:
        return "KV cache"
    if first == "foldgpt" and (second in ("quarot", "slicegpt", "laco") or issubclass(METHODS[second], BlockPass)):
        return "share"
    if second in ("quarot", "slicegpt") and first not in ROTATABLE:
        return f"put {second} before"
    if second == "laco" and first in QUANTIZERS | FACTORISING:
        return "only plain matrices"
    if (first in MASKING and second in CODEBOOKS) or (first in CODEBOOKS and second in MASKING):
        return "zeros of a pruned layer"
    return "several shapes" if (first, second) == ("flap", "laco") else None


def uses_only_the_layer(key: str) -> bool:
    """Whether a method looks at nothing but the layer as it finds it."""
    step = methods.build(key, {})
    return isinstance(step, StreamPass) and not (isinstance(step, CorrectionPass) or step.surveys or step.needs.stats)


@pytest.mark.parametrize(("first", "second"), pairs(filter(uses_only_the_layer, LINEAR)))
def test_without_statistics_one_stream_and_two_stages_agree(first, second, llama, first_passes, second_passes, run_stages):
    steps = [*first_passes(first), *second_passes(second)]
    together, apart = (weights_of(run_stages(llama, steps, fuse=fuse)) for fuse in (True, False))
    for name, weight in together.items():
        assert weight.dense().equal(apart[name].dense()), name


@pytest.mark.parametrize("second", ["gptq", "wanda", "svd_llm", "logit_kd"])
def test_an_artifact_is_a_source_like_any_other(
    second, llama, after_first, first_passes, second_passes, run_stages, assert_reloads
):
    """A second run on the first one's artifact: the same weights as two stages of one run, and the lineage is kept."""
    steps = [*first_passes("wanda"), *second_passes(second)]
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
