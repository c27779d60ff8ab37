"""LoRC: the residual it must leave, weighted and plain, on every kind of layer, and what it leaves alone."""

import pytest
import torch

from compress.apply import apply, outline
from compress.errors import BadInput
from compress.lowrank.svd import SVD
from compress.prune.magnitude import Magnitude
from compress.quant.hqq import HQQ
from compress.quant.lorc import LoRC
from compress.quant.rtn import RTN
from compress.stages import group
from compress.stats import LinearStats, energy
from compress.weights import Dense, LowRank, Masked, Quantized, Sum, Weight, assert_structure_kept, structure

NO_STATS = LinearStats(48, ())


def matrix(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def statistics() -> LinearStats:
    generator = torch.Generator().manual_seed(1)
    stats = LinearStats(48, {"covariance"})
    x = torch.randn(400, 48, generator=generator, dtype=torch.float64)
    stats.add(x @ torch.randn(48, 48, generator=generator, dtype=torch.float64))
    return stats.finish()


def corrected(step: LoRC, before: Weight, original: torch.Tensor, stats: LinearStats = NO_STATS) -> Weight:
    result = apply(step, before, stats, original)
    assert_structure_kept("layer", structure(before), result)
    return result


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_residual_is_the_sum_of_the_discarded_singular_values(rank):
    weight = matrix()
    grid = RTN(bits=3, group_size=16).linear(weight, NO_STATS, None)
    result = corrected(LoRC(rank=rank), grid, weight)
    assert isinstance(result, Sum) and result.parts[0] is grid and isinstance(result.parts[1], LowRank)
    assert result.parts[1].rank == min(rank, 32)
    discarded = torch.linalg.svdvals(weight - grid.dense())[rank:].square().sum()
    residual = weight - grid.dense() - result.parts[1].up.dense() @ result.parts[1].down.dense()
    torch.testing.assert_close(residual.square().sum(), discarded, rtol=1e-10, atol=1e-20)


def test_weighted_correction_is_best_for_the_outputs():
    weight, stats = matrix(), statistics()
    grid = RTN(bits=3, group_size=16).linear(weight, NO_STATS, None)
    plain, weighted = (
        weight - corrected(LoRC(rank=6, weighted=flag), grid, weight, stats).dense(torch.float64) for flag in (False, True)
    )
    assert energy(weighted, stats.covariance) < 0.95 * energy(plain, stats.covariance)
    assert plain.norm() < weighted.norm()
    root = torch.linalg.cholesky(stats.covariance)
    discarded = torch.linalg.svdvals((weight - grid.dense()) @ root)[6:].square().sum()
    torch.testing.assert_close(energy(weighted, stats.covariance), discarded, rtol=1e-4, atol=0, check_dtype=False)


def test_only_a_weighted_correction_needs_data():
    assert not LoRC().needs.stats and LoRC(weighted=True).needs.stats == {"covariance"}


def test_every_kind_of_layer_is_brought_closer():
    weight = matrix(torch.float32)
    quantizer = RTN(bits=3, group_size=16)
    factors = SVD(rank=8).linear(weight, NO_STATS, None)
    kinds = [
        quantizer.linear(weight, NO_STATS, None), HQQ(bits=3, group_size=16).linear(weight, NO_STATS, None),
        apply(quantizer, factors, NO_STATS), corrected(LoRC(rank=2), quantizer.linear(weight, NO_STATS, None), weight),
    ]  # fmt: skip
    for before in kinds:
        after = corrected(LoRC(rank=4), before, weight)
        assert isinstance(after, Sum)
        assert (after.dense() - weight).norm() < 0.95 * (before.dense() - weight).norm()
    assert len(corrected(LoRC(), kinds[-1], weight).children()) == 3  # beside the first, not around it


def test_layers_with_removed_weights_and_dense_ones_are_left_alone(caplog):
    weight = matrix(torch.float32)
    pruned = Magnitude(sparsity=0.5).linear(weight, NO_STATS, None)
    masked = apply(RTN(), pruned, NO_STATS)
    assert isinstance(masked, Masked)
    assert corrected(LoRC(), masked, weight) is masked and "fill its zeros" in caplog.text
    dense = Dense(weight * 0.9)
    assert corrected(LoRC(), dense, weight) is dense


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_factors(bits):
    weight = matrix(torch.float32)
    grid = RTN(bits=2, group_size=16).linear(weight, NO_STATS, None)
    exact, rounded = (corrected(LoRC(rank=8, factor_bits=b), grid, weight) for b in (None, bits))
    assert isinstance(rounded, Sum) and isinstance(rounded.parts[1], LowRank)
    for factor in (rounded.parts[1].down, rounded.parts[1].up):
        assert isinstance(factor, Quantized) and factor.bits == bits and factor.scale.shape[1] == 1
    slack = {4: 1.2, 8: 1.001}[bits]
    assert (rounded.dense() - weight).norm() < slack * (exact.dense() - weight).norm()


@pytest.mark.parametrize("settings", [{}, {"ratio": 0.3}, {"factor_bits": 8}, {"rank": 100}])
def test_outline_has_the_result_s_sizes(settings):
    weight, step = matrix(torch.float32), LoRC(**settings)
    for before in (RTN().linear(weight, NO_STATS, None), HQQ().linear(weight, NO_STATS, None)):
        result, outlined = corrected(step, before, weight), outline(step, before.map(lambda tensor: tensor.to("meta")))
        assert (type(outlined), outlined.nbytes) == (type(result), result.nbytes)


def test_ratio_is_a_share_of_the_parameters():
    result = corrected(LoRC(ratio=0.3), RTN().linear(matrix(torch.float32), NO_STATS, None), matrix(torch.float32))
    assert isinstance(result, Sum) and 0.25 < result.parts[1].numel / (32 * 48) <= 0.3


def test_nothing_to_correct_is_refused(make_pass):
    with pytest.raises(BadInput, match="lorc"):
        group([make_pass("lorc")], True)
    with pytest.raises(BadInput, match="lorc"):
        group([make_pass("rtn"), make_pass("logit_kd"), make_pass("lorc")], True)


@pytest.mark.parametrize("first", ["gptq", "hqq", "autoround"])
def test_run_after_a_quantizer(first, llama, make_pass, run_stages, assert_reloads):
    """The error is that against the layer as the stage found it, whatever kind of pass has quantized it."""
    from compress.manifest import Manifest

    chain = [make_pass(first, bits=3, group_size=16, **({"iterations": 2} if first == "autoround" else {}))]
    plain = run_stages(llama, chain, fuse=False)
    artifact = run_stages(llama, [*chain, make_pass("lorc", weighted=True)], fuse=False)
    assert_reloads(artifact)
    without, found = (Manifest.read(directory).modules for directory in (plain, artifact))
    first_layer = "model.layers.0.self_attn.q_proj"
    assert found[first_layer].kind == "sum" and found[first_layer].weight_error < 0.8 * without[first_layer].weight_error
