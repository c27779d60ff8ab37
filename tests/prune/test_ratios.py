"""Ratios: sketches of scores, OWL's and global sparsities, and counts that are met."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.checkpoint import Checkpoint
from compress.manifest import Manifest
from compress.prune.magnitude import Magnitude
from compress.prune.masks import Pruner, wanda_scores
from compress.prune.ratios import Sketch, by_outliers, by_threshold, in_whole_parts, outlier_share
from compress.prune.wanda import Wanda
from compress.skeleton import Skeleton
from compress.stats import LinearStats

GROUPS = [("model.layers.0.q",), ("model.layers.0.k",), ("model.layers.1.q",), ("model.layers.1.k",)]


def survey_of(step: Pruner, matrices: dict[str, torch.Tensor], x: torch.Tensor) -> dict:
    """What a survey of plain layers that all read ``x`` finds, after a trip through JSON."""
    from compress.weights import Dense

    stats = LinearStats(x.shape[1], {"sqnorm"})
    stats.add(x)
    found = {name: step.survey(Dense(weight), stats.finish(), lambda _: 0.0) for name, weight in matrices.items()}
    return json.loads(json.dumps(found))


@given(st.integers(0, 10**6), st.floats(0.1, 9))
@settings(max_examples=40, deadline=None)
def test_a_sketch_tells_the_share_of_outliers(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(40, 30, generator=generator).abs() * scale for scale in (1.0, 3.0)]
    scores = torch.cat([part.flatten() for part in parts])
    limit = threshold * scores.double().mean()
    near = ((scores / limit - 1).abs() < 1 / 256).sum() / len(scores)
    exact = (scores > limit).double().mean()
    assert abs(outlier_share([Sketch.of(part) for part in parts], threshold) - exact) <= near + 1e-12


def test_a_sketch_keeps_every_score_and_leaves_removed_weights_out():
    scores = torch.cat([torch.zeros(5), torch.tensor([1e-30, 1e-3, 1.0, 1.0, 7e4])])
    sketch = Sketch.of(scores)
    assert sum(sketch.counts) == sketch.n == 10 and sketch.total == pytest.approx(70002.001)
    assert sketch.above(0.5) == 3 and sketch.above(1e5) == 0 and len(sketch.counts) < 10_000
    mask = scores > 0.5
    assert sum(Sketch.of(scores, mask).counts) == 3 and Sketch.of(scores, mask).n == 10
    assert Sketch.of(scores, torch.zeros(10, dtype=torch.bool)).counts == []


@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=40), st.floats(0.3, 0.75), st.floats(0, 0.1))
@settings(max_examples=80, deadline=None)
def test_owl_meets_the_mean_and_the_spread(shares, sparsity, spread):
    found = by_outliers(shares, sparsity, spread)
    assert sum(found) / len(found) == pytest.approx(sparsity, abs=1e-12)
    if max(shares) - min(shares) > 1e-6:
        assert max(found) - min(found) == pytest.approx(2 * spread, abs=1e-12)
        assert found[shares.index(max(shares))] == min(found)


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.95, 0.99])
def test_owl_narrows_a_spread_that_does_not_fit(sparsity):
    found = by_outliers([0.0, 0.01, 0.05], sparsity, 0.2)
    assert sum(found) / 3 == pytest.approx(sparsity, abs=1e-12)
    assert min(found) + 1e-12 >= 0 and max(found) <= 1 - 0.25 * (1 - sparsity) + 1e-12


@given(st.integers(0, 10**6), st.floats(0, 0.97), st.booleans())
@settings(max_examples=40, deadline=None)
def test_one_threshold_for_all(seed, sparsity, masked):
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(size, generator=generator) * scale for size, scale in ((300, 1.0), (500, 4.0), (200, 0.1))]
    masks = [torch.rand(len(layer), generator=generator) > 0.3 if masked else None for layer in layers]
    found = by_threshold([Sketch.of(*pair) for pair in zip(layers, masks, strict=True)], sparsity)
    sizes = [300, 500, 200]
    assert sum(map(lambda share, n: share * n, found, sizes)) == pytest.approx(sparsity * 1000, abs=1e-6)
    if not masked and sparsity > 0.01:
        threshold = torch.cat(layers).sort().values[int(sparsity * 1000) - 1]
        for share, layer in zip(found, layers, strict=True):
            near = ((layer / threshold - 1).abs() < 1 / 128).double().mean() + 1 / len(layer)
            assert abs(share - (layer <= threshold).double().mean()) <= near


@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(2, 60), st.integers(1, 50)), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_whole_parts(layers):
    sparsities, n_parts, sizes = (list(column) for column in zip(*layers, strict=True))
    numbers = in_whole_parts(sparsities, n_parts, sizes)
    wanted = [share * parts for share, parts in zip(sparsities, n_parts, strict=True)]
    assert all(0 <= number < parts for number, parts in zip(numbers, n_parts, strict=True))
    free = [number for number, parts in zip(numbers, n_parts, strict=True) if number < parts - 1]
    assert all(abs(n - w) <= 1 + 1e-6 for n, w in zip(numbers, wanted, strict=True))
    removed, total = (sum(map(lambda n, size: n * size, some, sizes)) for some in (numbers, wanted))
    assert removed <= total + 0.01
    if len(free) == len(numbers) and set(sizes) == {1}:
        assert removed == int(total + 1e-3)


@pytest.mark.parametrize(("kind", "pattern"), [(Magnitude, "tensor"), (Wanda, "tensor"), (Wanda, "row"), (Wanda, "4:8")])
@pytest.mark.parametrize("ratios", ["owl", "global"])
def test_each_layer_gets_its_own(kind, pattern, ratios):
    generator = torch.Generator().manual_seed(0)
    names = [name for group in GROUPS for name in group]
    scales = (1.0, 0.5, 2.0, 1.0)
    matrices = {n: torch.randn(16, 64, generator=generator) ** 3 * s for n, s in zip(names, scales, strict=True)}
    x = torch.randn(50, 64, generator=generator)
    step = kind(pattern=pattern, ratios=ratios, owl_spread=0.1, owl_threshold=3) if ":" in pattern else kind(
        sparsity=0.6, pattern=pattern, ratios=ratios, owl_spread=0.1, owl_threshold=3
    )  # fmt: skip
    chosen = step.allocate(survey_of(step, matrices, x), GROUPS)
    stats = LinearStats(64, {"sqnorm"})
    stats.add(x)
    kept = {name: chosen[name].linear(weight, stats, None).mask for name, weight in matrices.items()}
    n_removed = {name: int((~mask).sum()) for name, mask in kept.items()}
    part = {"tensor": 1, "row": 16, "4:8": 128}[pattern]
    wanted = int(step.sparsity * 4 * 1024)
    assert wanted - part < sum(n_removed.values()) <= wanted and len(set(n_removed.values())) > 1
    assert pattern == "tensor" or all(removed % part == 0 for removed in n_removed.values())
    if ratios == "global" and pattern == "tensor":
        assert sum(n_removed.values()) == wanted
        score = Magnitude().scores if kind is Magnitude else wanda_scores
        scores = {name: score(weight, stats) for name, weight in matrices.items()}
        lowest_kept = min(float(scores[name][mask].min()) for name, mask in kept.items())
        highest_gone = max(float(scores[name][~mask].max()) for name, mask in kept.items())
        assert highest_gone <= lowest_kept * (1 + 1 / 128)


def test_global_magnitude_of_16_bit_weights_is_exact():
    generator = torch.Generator().manual_seed(0)
    names = [name for group in GROUPS for name in group]
    matrices = {name: (torch.randn(16, 64, generator=generator)).bfloat16() for name in names}
    step = Magnitude(sparsity=0.6, ratios="global")
    assert step.surveys is not None and not step.surveys.stats
    chosen = step.allocate(survey_of(step, matrices, torch.empty(0, 64)), GROUPS)
    kept = {name: chosen[name].linear(weight, LinearStats(64, ()), None).mask for name, weight in matrices.items()}
    assert sum(int((~mask).sum()) for mask in kept.values()) == int(0.6 * 4 * 1024)
    lowest_kept = min(float(matrices[name][mask].abs().min()) for name, mask in kept.items())
    assert max(float(matrices[name][~mask].abs().max()) for name, mask in kept.items()) <= lowest_kept


def test_uniform_ratios_survey_nothing():
    assert Wanda().surveys is None and Wanda(ratios="owl").surveys.stats == {"sqnorm"}
    with pytest.raises(ValidationError):
        Wanda(ratios="random")


def test_a_pruner_without_scores_has_no_threshold():
    class Blind(Pruner):
        pass

    assert Blind(ratios="owl").surveys
    with pytest.raises(ValidationError, match="use ratios=owl"):
        Blind(ratios="global")


@pytest.mark.parametrize("passes", [["magnitude:sparsity=0.6,ratios=global"], ["svd:ratio=0.6", "wanda:sparsity=0.6,ratios=owl"]])
def test_layers_differ_in_the_artifact(passes, llama, run_stages, assert_reloads):
    artifact = run_stages(llama, passes)
    assert_reloads(artifact)
    records = Manifest.read(artifact).modules.values()
    assert len({record.sparsity for record in records}) > 1
    sizes = [record.shape[0] * record.shape[1] for record in records]
    mean = sum(map(lambda record, size: record.sparsity * size, records, sizes)) / sum(sizes)
    assert mean == pytest.approx(0.6, abs=1e-5 if len(passes) == 1 else 0.02)


def test_mixed_n_of_8(llama, run_stages):
    skeleton = Skeleton(Checkpoint(run_stages(llama, ["wanda:pattern=4:8,ratios=global"])))
    found = set()
    for index in range(2):
        for weight in skeleton.read_weights(index).values():
            counts = weight.mask.unflatten(1, (-1, 8)).sum(2)
            assert len(counts.unique()) == 1
            found.add(int(counts[0, 0]))
    assert len(found) > 1
