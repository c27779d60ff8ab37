"""FWSVD: its scales are the gradients', and one of ones is plain SVD."""

from __future__ import annotations

import shutil

import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.gradients import gradients, write_fisher
from compress.journal import block_part
from compress.lowrank.fwsvd import FWSVD
from compress.lowrank.svd import SVD
from compress.manifest import Manifest
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.walk import Walk
from compress.weights import LowRank, Weight
from compress.writer import BlockStore


def stats_of(fisher: torch.Tensor) -> LinearStats:
    return LinearStats(len(fisher), ()).with_fisher(fisher)


def product(result: Weight) -> torch.Tensor:
    assert isinstance(result, LowRank)
    return result.up.dense(torch.float64) @ result.down.dense(torch.float64)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_equal_scales_are_plain_svd(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    plain = product(SVD(rank=7).linear(weight, LinearStats(shape[1], ()), None))
    for fisher in (torch.ones(shape[1]), torch.full((shape[1],), 9.0), torch.zeros(shape[1])):
        torch.testing.assert_close(product(FWSVD(rank=7).linear(weight, stats_of(fisher), None)), plain)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_equals_the_published_form(shape):
    """The scaled matrix is truncated, and its factor on the side of the inputs divided by the scale."""
    weight, fisher = torch.randn(*shape, dtype=torch.float64), torch.rand(shape[1]) * 5 + 0.1
    scale = fisher.double().sqrt()
    u, s, vh = torch.linalg.svd(weight * scale, full_matrices=False)
    published = u[:, :7] * s[:7] @ vh[:7] / scale
    found = product(FWSVD(rank=7).linear(weight, stats_of(fisher), None))
    torch.testing.assert_close(found, published, rtol=1e-9, atol=1e-10)
    tail = s[7:].square().sum()
    torch.testing.assert_close(((weight - found) * scale).square().sum(), tail, rtol=1e-10, atol=0)


def test_an_input_without_gradients_is_not_divided_by_zero():
    fisher = torch.rand(40)
    fisher[3:9] = 0
    weight = torch.randn(24, 40)
    found = product(FWSVD(rank=6).linear(weight, stats_of(fisher), None))
    assert found.isfinite().all() and found.norm() < 2 * weight.norm()


def test_the_store_holds_every_layers_own_sums_and_a_rerun_takes_no_gradients(llama, tokens, tmp_path):
    skeleton, store = Skeleton(Checkpoint(llama)), BlockStore(tmp_path / "fisher")
    walk = Walk(skeleton, tokens, tmp_path)
    write_fisher(walk, store)
    with torch.no_grad():
        for seen in gradients(walk, tokens, squares=True):
            found = store.tensors(block_part(seen.block.index))
            assert found.keys() == set(skeleton.arch.linears)
            for local, squares in seen.squares.items():
                torch.testing.assert_close(found[local], squares.sum(0))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "fisher").iterdir()}
    write_fisher(walk, store)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "fisher").iterdir()} == before
    shutil.rmtree(tmp_path / "fisher")


def test_windows_of_one_token_are_joined(llama, tokens, tmp_path):
    skeleton, apart = Skeleton(Checkpoint(llama)), tokens[:, :32].reshape(-1, 1)
    for name, windows in (("apart", apart), ("joined", apart.view(-1, 64))):
        write_fisher(Walk(skeleton, windows, tmp_path), BlockStore(tmp_path / name))
    found, expected = (BlockStore(tmp_path / name).tensors(block_part(1)) for name in ("apart", "joined"))
    assert all(found[local].equal(expected[local]) for local in found)


def test_ranks_are_shared_out_by_what_gradients_say(llama, run_stages, assert_reloads):
    artifact = run_stages(llama, ["fwsvd:ratio=0.6,ranks=loss"])
    assert_reloads(artifact)
    found = Manifest.read(artifact)
    assert found is not None and len({record.rank for record in found.modules.values()}) > 2
    kept = sum(record.numel for record in found.modules.values())
    assert kept <= 0.6 * sum(m * n for m, n in (record.shape for record in found.modules.values()))


def test_statistics_carry_it(tmp_path):
    stats = LinearStats(4, {"sqnorm"})
    stats.add(torch.randn(9, 4))
    fisher, scale = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    both = stats.with_fisher(fisher)
    assert both.fisher.equal(fisher) and both.sqnorm.equal(stats.sqnorm) and both.n == 9
    assert both.scaled(scale).fisher.equal(fisher / scale.square())
    assert both.permuted(torch.tensor([3, 0, 1, 2])).fisher.equal(fisher[[3, 0, 1, 2]])
    for unread in (stats, both.only({"sqnorm"})):
        with pytest.raises(AttributeError, match="declared"):
            _ = unread.fisher
