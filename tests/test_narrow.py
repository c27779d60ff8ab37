"""Rows and columns of weights in every representation, and of whole models: what stays computes what it did."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.narrow import Attention, Kept, attention, n_neurons, narrow, narrowed
from compress.passes import ModelPass, Taxon
from compress.progress import silent
from compress.quant.fp8 import FP8
from compress.quant.rtn import RTN
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.stream import forward
from compress.surgery import Surgery, operate
from compress.weights import Dense, LowRank, Masked, Quantized, Sum, Weight
from compress.writer import BlockStore

HEADED = ("llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2")
WITHOUT_HEADS = ("phi3", "gpt2", "opt", "gpt_neox")
WITH_HIDDEN = ("llama", "llama-untied", "mistral", "qwen2", "qwen3")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(**settings) -> Weight:
    return RTN(**settings).linear(draw(12, 32), LinearStats(32, ()), None)


FORMS: dict[str, Weight] = {
    "dense": Dense(draw(12, 32)),
    "masked": Dense(draw(12, 32)).masked(draw(12, 32, seed=1) > 0),
    "low-rank": LowRank(Dense(draw(5, 32)), Dense(draw(12, 5)).masked(draw(12, 5, seed=1) > 0)),
    "sum": Sum((Dense(draw(12, 32)), LowRank(Dense(draw(5, 32)), Dense(draw(12, 5))))),
    "rows on a grid": quantized(bits=4, group_size=-1, symmetric=False),
    "masked grid": quantized(bits=4, group_size=-1).masked(draw(12, 32, seed=1) > 0),
    "8-bit floats": FP8.model_validate({}).linear(draw(12, 32), LinearStats(32, ()), None),
}
ROWS, COLUMNS = torch.tensor([0, 3, 4, 11]), torch.tensor([1, 2, 17, 30, 31])


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_narrowing_selects_from_what_is_computed_with(form, meta):
    weight = FORMS[form]
    for rows, columns in ((ROWS, None), (None, COLUMNS), (ROWS, COLUMNS)):
        expected = weight.dense()
        expected = expected if rows is None else expected[rows]
        expected = expected if columns is None else expected[:, columns]
        found = narrow(weight, rows, columns)
        assert type(found) is type(weight) and found.shape == tuple(expected.shape)
        torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-5 if form in ("low-rank", "sum") else 0)
        if meta:
            outlined = narrow(weight.map(lambda tensor: tensor.to("meta")), rows, columns)
            assert (outlined.shape, outlined.nbytes) == (found.shape, found.nbytes)
    assert narrow(weight) is weight


def test_masks_and_bits_stay():
    masked, grid = narrow(FORMS["masked grid"], ROWS, COLUMNS), narrow(FORMS["rows on a grid"], ROWS, COLUMNS)
    before = FORMS["masked grid"]
    assert isinstance(masked, Masked) and isinstance(before, Masked) and masked.kept.equal(before.kept[ROWS][:, COLUMNS])
    assert not masked.dense()[~masked.kept].any()
    assert isinstance(grid, Quantized) and grid.bits == 4


def test_groups_of_inputs_refuse_to_be_torn_apart_but_lose_outputs():
    grouped = quantized(bits=4, group_size=16)
    assert narrow(grouped, ROWS, None).dense().equal(grouped.dense()[ROWS])
    with pytest.raises(ValueError, match="prune before quantizing"):
        narrow(grouped, None, COLUMNS)
    with pytest.raises(ValueError, match="prune before quantizing"):
        narrow(LowRank(grouped, Dense(draw(9, 12))), None, COLUMNS)


class Chosen(ModelPass):
    """A pass that keeps what a test says."""

    taxon: ClassVar[Taxon] = Taxon.STRUCTURED
    paper: ClassVar[str] = ""
    choose: ClassVar[Callable[[Skeleton], tuple[list[Kept], Tensor | None]]]

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        return narrowed(model, *type(self).choose(model))


@pytest.fixture
def cut(make_checkpoint, tokens, tmp_path):
    """``cut(source or family, choose)`` -> (logits before, logits after, the model afterwards)."""

    def run(source: str | Path, choose: Callable) -> tuple[Tensor, Tensor, Skeleton]:
        Chosen.choose = staticmethod(choose)
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        source = make_checkpoint(source) if isinstance(source, str) else source
        model, result = operate(
            Checkpoint(source), Chosen(), tokens, BlockStore(directory / "store"), directory,
            device="cpu", dtype=torch.float32, progress=silent,
        )  # fmt: skip
        return forward(Skeleton(Checkpoint(source)), tokens), result.probe[1], model

    return run


def shuffled(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", [*HEADED, *WITHOUT_HEADS])
def test_neurons_in_another_order_compute_the_same(family, cut):
    before, after, model = cut(family, lambda model: ([Kept(shuffled(n_neurons(model, 0)))] * 2, None))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4)
    assert not model.checkpoint.structure


@pytest.mark.parametrize("family", HEADED)
def test_heads_in_another_order_compute_the_same(family, cut):
    kept = Kept(groups=torch.tensor([1, 0]), queries=torch.tensor([3, 2, 0, 1]))
    before, after, _ = cut(family, lambda model: ([kept] * 2, None))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", WITH_HIDDEN)
def test_hidden_channels_in_another_order_compute_the_same(family, cut):
    before, after, _ = cut(family, lambda model: ([Kept()] * 2, shuffled(64)))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", [*HEADED, *WITHOUT_HEADS])
def test_neurons_that_nothing_reads_can_go(family, make_checkpoint, cut, tmp_path):
    """Ragged: 20 in the first block, 30 in the second; what they put out is multiplied by zero."""
    source = tmp_path / "lamed"
    shutil.copytree(make_checkpoint(family), source)
    tensors, model = load_file(source / "model.safetensors"), Skeleton(Checkpoint(source))
    reader = model.arch.neurons.reader
    for index, count in enumerate((20, 30)):
        matrix = tensors[f"{model.module_name(index, reader)}.weight"]
        (matrix if model.is_conv1d(reader) else matrix.T)[:count] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    before, after, narrower = cut(source, lambda _: ([Kept(torch.arange(20, 112)), Kept(torch.arange(30, 112))], None))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)
    assert [n_neurons(narrower, index) for index in range(2)] == [92, 82]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("family", HEADED)
def test_heads_that_nothing_reads_can_go(family, ragged, make_checkpoint, cut, tmp_path):
    """One of the two query heads of each group, or the second group of the last block."""
    source = tmp_path / "lamed"
    shutil.copytree(make_checkpoint(family), source)
    tensors = load_file(source / "model.safetensors")
    head_dim = attention(Skeleton(Checkpoint(source)), 0).head_dim
    gone = {0: [], 1: [2, 3]} if ragged else {0: [0, 3], 1: [0, 3]}
    for index, heads in gone.items():
        for head in heads:
            tensors[f"model.layers.{index}.self_attn.o_proj.weight"][:, head * head_dim : (head + 1) * head_dim] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    kept = [Kept(), Kept(groups=torch.tensor([0]))] if ragged else [Kept(queries=torch.tensor([1, 2]))] * 2
    before, after, narrower = cut(source, lambda _: (kept, None))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)
    shapes = [attention(narrower, index) for index in range(2)]
    assert shapes == ([(4, 2, head_dim), (2, 1, head_dim)] if ragged else [(2, 2, head_dim)] * 2)
    assert bool(narrower.checkpoint.structure) == ragged


def test_numbers_of_heads_that_transformers_refuses_become_own_shapes(make_checkpoint, cut):
    """Its Llama wants 64 channels to be a multiple of the number of heads."""
    source = make_checkpoint("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    kept = Kept(queries=torch.tensor([0, 1, 2, 5, 6, 7]))
    _, _, model = cut(source, lambda _: ([kept] * 2, None))
    assert model.checkpoint.structure and attention(model, 1) == Attention(6, 2, 8)
    assert model.blocks[0].self_attn.num_key_value_groups == 3  # type: ignore[union-attr]
    _, after, again = cut(model.checkpoint.path, lambda _: ([Kept(queries=torch.tensor([0, 1, 3, 4]))] * 2, None))
    assert not again.checkpoint.structure and attention(again, 1) == Attention(4, 2, 8) and after.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_offsets_are_added_to_biases(family, cut):
    """Opposite ones in the two blocks' readers; where the architecture has that bias anyway, the model stays an ordinary one."""
    offset = draw(64)

    def choose(sign: float) -> Callable:
        return lambda model: ([Kept(offsets={model.arch.neurons.reader: sign * offset})] * 2, None)

    before, after, model = cut(family, choose(1))
    assert not torch.allclose(after, before, atol=1e-2)
    assert bool(model.checkpoint.structure) == (family == "llama")
    _, back, _ = cut(model.checkpoint.path, choose(-1))
    torch.testing.assert_close(back, before, rtol=0, atol=1e-4)


def test_a_model_with_biases_of_its_own_keeps_them_when_it_is_cut_again(cut):
    _, _, model = cut("llama", lambda model: ([Kept(offsets={"mlp.down_proj": draw(64)})] * 2, None))
    before, after, again = cut(model.checkpoint.path, lambda _: ([Kept(shuffled(112))] * 2, None))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert "mlp.down_proj.bias" in again.other_names(1)


def test_hidden_channels_and_ragged_neurons_at_once(cut):
    kept = [Kept(torch.arange(96)), Kept(torch.arange(64))]
    _, after, model = cut("llama", lambda _: (kept, torch.arange(8, 64)))
    assert model.shape(1, "mlp.down_proj") == (56, 64) and model.shape(0, "mlp.up_proj") == (96, 56)
    assert model.shape(0, "self_attn.q_proj") == (64, 56) and after.isfinite().all()


@pytest.mark.parametrize("family", WITHOUT_HEADS)
def test_heads_and_hidden_channels_that_cannot_go(family, cut):
    with pytest.raises(BadInput, match="units=neurons"):
        cut(family, lambda model: ([Kept(groups=torch.arange(attention(model, 0).n_groups - 1))] * 2, None))
    with pytest.raises(BadInput, match="hidden channels"):
        cut(family, lambda model: ([Kept()] * 2, torch.arange(56)))


def test_hidden_channels_of_gemma_stay(cut):
    with pytest.raises(BadInput, match="hidden channels"):
        cut("gemma2", lambda model: ([Kept()] * 2, torch.arange(56)))
