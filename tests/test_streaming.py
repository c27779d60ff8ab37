"""The streamed result is, bit for bit, that of the obvious way: the model in memory, ordinary hooks, block by block."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from compress import methods
from compress.arch import ARCHITECTURES
from compress.calibration import load_tokenizer, read_text, windows
from compress.checkpoint import Checkpoint
from compress.passes import LinearPass
from compress.shards import INDEX
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.stream import Stream
from compress.train import train
from compress.train_pass import TrainPass
from compress.weights import Dense, LowRank, Weight
from compress.writer import BlockStore

METHODS = methods.available()
LINEAR = ["rtn", "gptq", "magnitude", "wanda", "svd", "svd_llm"]  # no statistics, each kind of them, and every kind of result
TRAINING = [key for key, method in METHODS.items() if issubclass(method, TrainPass)]
LENGTH, TOKENS_PER_FORWARD = 24, 4096


@pytest.fixture(scope="module")
def calibration_tokens(llama: Path, calibration) -> Tensor:
    texts, source = read_text(calibration.data)
    tokenizer = load_tokenizer(llama, 256)
    return windows(tokenizer, texts, source, n=calibration.samples, length=calibration.length, seed=0).tokens


class Factored(nn.Module):
    """A low-rank layer as two matrix products."""

    def __init__(self, weight: LowRank, bias: Tensor | None):
        super().__init__()
        self.down, self.up, self.bias = weight.down.dense(), weight.up.dense(), bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.contiguous()), self.up.contiguous(), self.bias)


def install(model: nn.Module, name: str, weight: Weight) -> None:
    module = model.get_submodule(name)
    if isinstance(weight, LowRank):
        model.set_submodule(name, Factored(weight, module.bias))
    else:
        values = weight.dense(torch.float32)
        module.weight.data = (values.T if isinstance(module, Conv1D) else values).contiguous()


@torch.no_grad()
def in_memory(model: nn.Module, step: LinearPass, tokens: Tensor, sequential: bool = False) -> dict[str, Weight]:
    """Compress a model that is whole in memory; returns its weights by layer name."""
    arch = ARCHITECTURES[model.config.model_type]
    source = copy.deepcopy(model) if step.undisturbed else model
    done: dict[str, Weight] = {}
    for index in range(len(model.get_submodule(arch.blocks))):
        for groups in [[group] for group in arch.groups] if sequential else [arch.groups]:
            names = {group: [f"{arch.blocks}.{index}.{local}" for local in group] for group in groups}
            gathered = {}
            handles = []
            for group in groups:
                module = source.get_submodule(names[group][0])
                n_inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
                gathered[group] = LinearStats(n_inputs, step.needs.stats)
                handles.append(module.register_forward_hook(lambda _, x, y, stats=gathered[group]: stats.add(x[0])))
            for batch in tokens.split(TOKENS_PER_FORWARD // tokens.shape[1]):
                source(input_ids=batch, use_cache=False)
            for handle in handles:
                handle.remove()
            for group in groups:
                stats = gathered[group].finish()
                for name in filter(step.matches, names[group]):
                    module = model.get_submodule(name)
                    values = module.weight.data.T.contiguous() if isinstance(module, Conv1D) else module.weight.data.clone()
                    done[name] = step.linear(values, stats, None)
            for name, weight in done.items():
                if name in [name for group in groups for name in names[group]]:
                    install(model, name, weight)
    return done


def assert_same_weights(artifact: Path, expected: dict[str, Weight]) -> None:
    checkpoint = Checkpoint(artifact)
    skeleton = Skeleton(checkpoint)
    for index in range(len(skeleton.blocks)):
        for local, found in skeleton.read_weights(index).items():
            name = skeleton.module_name(index, local)
            pairs = [(found, expected[name])]
            if isinstance(found, LowRank):
                pairs = [(found.down, expected[name].down), (found.up, expected[name].up)]
            for ours, theirs in pairs:
                assert torch.equal(ours.dense(), theirs.dense()), name
                parameters = theirs.parameters()
                for key, value in ours.parameters().items():
                    assert torch.equal(value, parameters[key]), (name, key)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("method", LINEAR)
def test_streaming_equals_memory(method, family, make_checkpoint, make_pass, run_stages, reload, calibration_tokens):
    directory, step = make_checkpoint(family), make_pass(method)
    expected = in_memory(reload(directory), step, calibration_tokens)
    assert_same_weights(run_stages(directory, [step]), expected)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_true_sequential_measures_again_after_each_group(
    family, make_checkpoint, make_pass, run_stages, reload, calibration_tokens
):
    directory, step = make_checkpoint(family), make_pass("gptq", bits=3, true_sequential=True)
    expected = in_memory(reload(directory), step, calibration_tokens, sequential=True)
    artifact = run_stages(directory, [step])
    assert_same_weights(artifact, expected)
    at_once = run_stages(directory, [make_pass("gptq", bits=3)])
    skeletons = Skeleton(Checkpoint(artifact)), Skeleton(Checkpoint(at_once))
    changed = [
        local
        for local, weight in skeletons[0].read_weights(0).items()
        if not torch.equal(weight.dense(), skeletons[1].read_weights(0)[local].dense())
    ]
    first_group = ARCHITECTURES[family.partition("-")[0]].groups[0]
    assert changed and not set(changed) & set(first_group)


@pytest.mark.parametrize("targets", ["o_proj", "down_proj", "k_proj+up_proj", "q_proj"])
def test_the_shortened_forward_reaches_every_wanted_layer(targets, llama, make_pass, run_stages, reload, calibration_tokens):
    """Only some groups are wanted, and the forward stops at the last of them; the others keep their weights."""
    step = make_pass("gptq", targets=targets)
    expected = in_memory(reload(llama), step, calibration_tokens)
    assert {name.rpartition(".")[2] for name in expected} == set(targets.split("+"))
    untouched = Skeleton(Checkpoint(llama))
    for index in range(2):
        for local, weight in untouched.read_weights(index).items():
            expected.setdefault(untouched.module_name(index, local), weight)
    assert_same_weights(run_stages(llama, [step]), expected)


@pytest.mark.parametrize("method", TRAINING)
def test_a_training_stage_equals_training_in_memory(
    method, llama, tokenizer, calibration, make_pass, run_stages, reload, tmp_path
):
    step = make_pass(method)
    texts, source = read_text(calibration.data)
    drawn = windows(tokenizer, texts, source, n=step.n_windows, length=step.length, seed=0, at_most=True)
    before = make_pass({"factors": "svd", "scales": "hqq"}.get(step.trains, "wanda"))
    compressed = run_stages(llama, [before])
    student, masked = reload(compressed), Skeleton(Checkpoint(compressed))
    weights = {
        masked.module_name(index, local): weight for index in range(2) for local, weight in masked.read_weights(index).items()
    }
    trained = train(
        student, weights, reload(llama), drawn.tokens, step,
        seed=0, device="cpu", directory=tmp_path, progress=lambda *_: None,
    )  # fmt: skip
    artifact = run_stages(llama, [before, step])
    assert_same_weights(artifact, trained.weights)
    stored = load_file(artifact / "model.safetensors")
    for name, parameter in student.named_parameters():
        if name in stored:
            assert torch.equal(stored[name], parameter), name


def stream(directory: Path, passes: Sequence[LinearPass], tokens: Tensor, work: Path, **settings) -> dict[str, bytes]:
    """Bytes of every block file that a stream writes."""
    store = BlockStore(work / "blocks")
    result = Stream(Skeleton(Checkpoint(directory)), passes, tokens, store, work, **settings).run()
    files = {file.name: file.read_bytes() for file in sorted(store.directory.iterdir())}
    return files | {"probe": result.probe[1].numpy().tobytes()}


@pytest.fixture
def chain(make_pass: Callable) -> list[LinearPass]:
    return [make_pass("wanda"), make_pass("svd_llm"), make_pass("gptq")]


def test_activations_on_disk_give_the_same_bytes(llama, chain, calibration_tokens, tmp_path):
    in_ram = stream(llama, chain, calibration_tokens, tmp_path / "ram")
    on_disk = stream(llama, chain, calibration_tokens, tmp_path / "disk", spill_bytes=1000)
    assert (tmp_path / "disk" / "activations.bin").stat().st_size == 4 * calibration_tokens.numel() * 64
    assert not (tmp_path / "ram" / "activations.bin").exists()
    assert in_ram == on_disk


def test_shards_give_the_same_bytes(llama, chain, make_checkpoint, calibration_tokens, tmp_path):
    sharded = make_checkpoint("llama", max_shard_size="100KB")
    assert (sharded / INDEX).exists() and len(list(sharded.glob("*.safetensors"))) > 2
    one, many = (stream(source, chain, calibration_tokens, tmp_path / source.parent.name) for source in (llama, sharded))
    assert one == many


def test_a_result_in_several_files_holds_the_same_tensors(llama, chain, calibration_tokens, reload, tmp_path):
    stream(llama, chain, calibration_tokens, tmp_path)
    store, parts = BlockStore(tmp_path / "blocks"), ["outer", "block-00000", "block-00001"]
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    (file,) = store.assemble(parts, tmp_path / "one")
    files = store.assemble(parts, tmp_path / "many", max_shard_bytes=1000)
    assert [file.name for file in files] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    whole, pieces = load_file(file), {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert whole.keys() == pieces.keys() and all(tensor.equal(pieces[name]) for name, tensor in whole.items())
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_the_batch_changes_nothing_material(llama, make_pass, calibration_tokens, tmp_path, monkeypatch):
    """Sums over batches are rounded in another order, no more."""
    results = []
    for n_tokens in (LENGTH, 3 * LENGTH, 4096):
        monkeypatch.setattr("compress.stream._TOKENS_PER_FORWARD", n_tokens)
        work = tmp_path / str(n_tokens)
        stream(llama, [make_pass("svd_llm"), make_pass("gptq", bits=8, full_range=False)], calibration_tokens, work)
        results.append(BlockStore(work / "blocks"))
    for index in range(2):
        for name, value in results[0].tensors(f"block-{index:05d}").items():
            others = [result.tensors(f"block-{index:05d}")[name] for result in results[1:]]
            for other in others:
                if value.is_floating_point():
                    torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-3)
        errors = [result.record(f"block-{index:05d}")["layers"] for result in results]
        for layer in errors[0]:
            assert errors[1][layer]["output_error"] == pytest.approx(errors[0][layer]["output_error"], rel=1e-2)
            assert errors[2][layer]["output_error"] == pytest.approx(errors[0][layer]["output_error"], rel=1e-2)


def test_layers_that_share_an_input_share_statistics(llama, make_pass, calibration_tokens, tmp_path):
    """q, k and v are given the same sums; o, which reads something else, others."""
    seen: dict[str, LinearStats] = {}

    class Spy(type(make_pass("wanda"))):
        def linear(self, weight, stats, mask):
            seen[len(seen)] = stats
            return Dense(weight)

    stream(llama, [Spy()], calibration_tokens, tmp_path)
    query, key, value, output, gate, up, down = (seen[number].sqnorm for number in range(7))
    assert query.data_ptr() == key.data_ptr() == value.data_ptr()
    assert gate.data_ptr() == up.data_ptr()
    assert len({tensor.data_ptr() for tensor in (query, output, gate, down)}) == 4
    assert seen[0].n == calibration_tokens.numel()
    hidden = reload_first_input(llama, calibration_tokens)
    torch.testing.assert_close(query, hidden.square().sum((0, 1)))


@torch.no_grad()
def reload_first_input(directory: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory).model
    return base.layers[0].input_layernorm(base.embed_tokens(tokens))


def test_a_rerun_propagates_what_the_first_run_had(llama, chain, calibration_tokens, tmp_path):
    """A block read back from its file computes the same bits as the one in memory, so what follows is the same too."""
    for name, steps in {"chain": chain, "svd": chain[1:2]}.items():
        whole = stream(llama, steps, calibration_tokens, tmp_path / name / "whole")
        (tmp_path / name / "again").mkdir()
        shutil.copytree(tmp_path / name / "whole" / "blocks", tmp_path / name / "again" / "blocks")
        for file in (tmp_path / name / "again" / "blocks").glob("block-00001*"):
            file.unlink()
        assert stream(llama, steps, calibration_tokens, tmp_path / name / "again") == whole
