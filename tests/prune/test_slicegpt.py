"""SliceGPT: principal components, bases that follow one another, the sliced model is the one that was measured, and what is
refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.manifest import Manifest
from compress.methods import build
from compress.pipeline import plan
from compress.progress import silent
from compress.prune.components import aligned, principal
from compress.prune.slicegpt import SliceGPT
from compress.recipe import Recipe
from compress.skeleton import Skeleton
from compress.stream import forward
from compress.surgery import operate
from compress.weights import LowRank
from compress.writer import BlockStore

SLICEABLE = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "phi3"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(d: int, size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(d, size, seed=seed))[0]


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def logits(directory: Path, tokens: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return forward(Skeleton(Checkpoint(directory), dtype=dtype), tokens)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.fixture(scope="module")
def exact(make_checkpoint) -> Path:
    """A float64 checkpoint."""
    return make_checkpoint("llama", torch.float64)


@pytest.fixture(scope="module")
def operated(exact, tokens, tmp_path_factory):
    """``operated(**settings)`` -> (directory of the bases, logits of the operated model), all of it in float64."""

    def run(source: Path = exact, **settings) -> tuple[Path, Tensor]:
        directory = tmp_path_factory.mktemp("operated")
        step = build("slicegpt", settings)
        assert isinstance(step, SliceGPT)
        store = BlockStore(directory / "store")
        _, streamed = operate(
            Checkpoint(source), step, tokens, store, directory, device="cpu", dtype=torch.float64, progress=silent
        )
        return directory / "bases", streamed.probe[1].double()

    return run


@pytest.fixture(scope="module")
def sliced(llama, run_stages) -> Path:
    return run_stages(llama, ["slicegpt:sparsity=0.25"])


@pytest.mark.parametrize("size", [1, 17, 40])
def test_what_slicing_loses_is_the_discarded_eigenvalues(size):
    x = draw(200, 40) @ draw(40, 40, seed=1)
    basis = principal(x.T @ x, size)
    torch.testing.assert_close(basis.T @ basis, identity(size))
    lost = (x - x @ basis @ basis.T).square().sum()
    discarded = torch.linalg.eigvalsh(x.T @ x)[: 40 - size].sum()
    torch.testing.assert_close(lost, discarded, rtol=1e-10, atol=1e-9 * float(x.square().sum()))
    energies = (x @ basis).square().sum(0)
    assert bool((energies.diff() <= 1e-9 * energies[0]).all()), "the largest come first"


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 24), st.data())
def test_neighbouring_bases_differ_by_a_few_directions(d, data):
    """The shortcut is exact with d - d' columns, and the aligned basis has the same span."""
    size = data.draw(st.integers(1, d))
    earlier = data.draw(st.integers(0, 3))
    start, basis = orthonormal(d, size), orthonormal(d, size, seed=1)
    factor = 0.9 * orthonormal(d, min(d, earlier), seed=2)
    turned, found = aligned(start, basis, min(size, d - size + earlier), factor if earlier else None)
    torch.testing.assert_close(turned.T @ turned, identity(size))
    torch.testing.assert_close(turned @ turned.T, basis @ basis.T)
    change = start.T @ (identity(d) - factor @ factor.T) @ turned
    torch.testing.assert_close(identity(size) - found @ found.T, change, atol=1e-7, rtol=0)
    assert torch.linalg.matrix_norm(start - turned) <= torch.linalg.matrix_norm(start - basis) + 1e-9 or earlier


@pytest.mark.parametrize("family", SLICEABLE)
def test_the_rotation_alone_leaves_the_function(family, make_checkpoint, operated, tokens):
    source = make_checkpoint(family, torch.float64)
    bases, found = operated(source, sparsity=0)
    assert_close(found, logits(source, tokens), 2e-5 if family == "phi3" else 1e-5)  # norms compute in float32
    for file in sorted(bases.glob("*.safetensors")):
        basis = load_file(file)["basis"]
        torch.testing.assert_close(basis.T @ basis, identity(64))


@pytest.mark.parametrize("settings", [{}, {"final_orientation": "pca"}, {"shared": True}, {"seed": 3}], ids=str)
def test_the_sliced_model_is_the_dense_one_confined_to_the_bases(settings, exact, operated, reload, tokens):
    """The model as it was, whose stream is projected on the measured bases wherever a norm reads it. So no orientation of the
    bases changes the function, and neither do the shortcuts' few columns."""
    directory, found = operated(sparsity=0.3, **settings)
    files = sorted(directory.glob("*.safetensors"))
    bases = [load_file(file)["basis"] for file in files] * (5 if settings.get("shared") else 1)
    assert len(bases) == 5 and all(basis.shape == (64, 40) for basis in bases)
    model, entered = reload(exact, dtype=torch.float64), {}

    def confined(x: Tensor, place: int) -> Tensor:
        return x @ bases[place] @ bases[place].T

    def enter(index: int):
        def hook(_, inputs: tuple) -> tuple:
            entered[index] = confined(inputs[0], 2 * index)
            return (entered[index], *inputs[1:])

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(enter(index))
        layer.self_attn.register_forward_hook(
            lambda _, __, out, i=index: (confined(entered[i] + out[0], 2 * i + 1) - entered[i], *out[1:])
        )
    model.model.norm.register_forward_pre_hook(lambda _, inputs: (confined(inputs[0], 4),))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    assert_close(found, expected, 1e-5)
    assert not torch.allclose(found, logits(exact, tokens).double(), atol=0.1)


@pytest.mark.parametrize("shared", [False, True])
def test_a_stream_of_few_dimensions_is_sliced_without_loss(shared, exact, operated, tokens, tmp_path):
    span = orthonormal(64, 40, seed=5)
    shutil.copytree(exact, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensors[name] = tensor @ span @ span.T
        elif "o_proj" in name or "down_proj" in name:
            tensors[name] = (span @ span.T @ tensor).contiguous()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    _, found = operated(tmp_path / "model", sparsity=0.375, shared=shared)
    assert_close(found, logits(tmp_path / "model", tokens), 1e-5)


def test_the_published_order_loses_less_than_one_basis(exact, operated, tokens):
    before = logits(exact, tokens)
    each, one = (operated(sparsity=0.3, shared=shared)[1] for shared in (False, True))
    assert (each - before).norm() < (one - before).norm()


@pytest.mark.parametrize("family", SLICEABLE)
def test_artifacts(family, make_checkpoint, run_stages, assert_reloads):
    """Heads keep their size; without shortcuts it is a model like any other; a plan knows the size."""
    source = make_checkpoint(family)
    for step, model_type in (("slicegpt:sparsity=0.3", "compress"), ("slicegpt:sparsity=0.3,shared=true", None)):
        planned = plan(Recipe.parse({"model": str(source), "passes": [step]}))
        artifact = run_stages(source, [step])
        config = json.loads((artifact / "config.json").read_text())
        assert config["model_type"] == (model_type or Checkpoint(source).base_model_type)
        assert config["hidden_size"] == 40 and config["head_dim"] == (24 if family == "qwen3" else 16)
        assert config["tie_word_embeddings"] is False
        assert_reloads(artifact, atol=1e-5)
        real = (artifact / "model.safetensors").stat().st_size
        assert abs(planned.predicted_bytes - real) < 2000 and planned.tier == ("shim" if model_type else "native")


def test_shortcuts_have_as_many_columns_as_channels_went(sliced):
    structure = Checkpoint(sliced).structure
    assert {name.partition(".layers.")[2] for name in structure} == {
        f"{index}.{name}_shortcut" for index in range(2) for name in ("self_attn", "mlp")
    }
    assert all(spec["rank"] == 16 for spec in structure.values())
    factor = load_file(sliced / "model.safetensors")["model.layers.1.mlp_shortcut.factor"]
    assert factor.shape == (48, 16) and torch.linalg.matrix_norm(factor, 2) <= 1 + 1e-5


def test_an_opened_model_generates_learns_casts_and_copies(sliced, reload, tokens):
    model = reload(sliced, remote=True)
    texts = [model.generate(tokens[:, :8], max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert texts[0].equal(texts[1]) and texts[0].shape[1] > 8
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(tokens).logits
        other.model.layers[0].self_attn_shortcut.factor.zero_()
        assert not torch.allclose(other(tokens).logits, expected, atol=1e-3), "the copy computes with its own factors"
        assert model(tokens).logits.equal(expected)
        half = other.to(torch.bfloat16)
        assert half(tokens).logits.dtype == torch.bfloat16 and bool(half(tokens).logits.isfinite().all())
    model.gradient_checkpointing_enable()
    model.train()(tokens, labels=tokens).loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn_shortcut.factor.grad.abs().sum() > 0 and layer.mlp_shortcut.factor.grad.abs().sum() > 0


def test_what_an_opened_model_saves_opens_again(sliced, reload, tokens, tmp_path):
    model = reload(sliced, remote=True)
    model.save_pretrained(tmp_path)
    assert reload(tmp_path, remote=False)(tokens).logits.equal(model(tokens).logits)


@pytest.mark.parametrize(
    "then",
    [
        "wanda gptq:bits=4",
        "svd:ratio=0.9",
        "awq:bits=4,group_size=16",
        "logit_kd",
        "shortgpt:blocks=1",
        "foldgpt:blocks=1",
        "slicegpt:sparsity=0.2",
    ],
)
def test_later_passes(then, sliced, make_pass, run_stages, assert_reloads):
    chain = [make_pass("logit_kd")] if then == "logit_kd" else then.split()
    artifact = run_stages(sliced, chain)
    assert_reloads(artifact, atol=1e-5)
    structure = {name: spec for name, spec in Checkpoint(artifact).structure.items() if spec["kind"] == "shortcut"}
    assert len(structure) == (2 if "shortgpt" in then else 4)
    assert all(spec["rank"] == (32 if "slicegpt" in then else 16) for spec in structure.values())
    manifest = Manifest.read(artifact)
    assert manifest is not None and manifest.steps[0].method == "slicegpt" and manifest.tier == "shim"


@pytest.mark.parametrize("then", ["quarot", "slicegpt:sparsity=0", "slicegpt:sparsity=0,shared=true"])
def test_rotations_after_it_leave_the_function(then, exact, run_stages, tokens):
    first = run_stages(exact, ["slicegpt"])
    assert_close(logits(run_stages(first, [then]), tokens), logits(first, tokens), 2e-5)


def test_low_rank_layers_are_sliced_through_their_outer_factors(llama, run_stages, assert_reloads):
    artifact = run_stages(llama, ["svd:ratio=0.5", "slicegpt"])
    weight = Skeleton(Checkpoint(artifact)).read_weight(0, "mlp.down_proj")
    assert isinstance(weight, LowRank) and weight.shape == (48, 112)
    assert_reloads(artifact, atol=1e-5)


def test_shapes_of_earlier_passes_follow(llama):
    """A layer of a shape of its own gets the new size of the stream, on the side that meets it."""
    name = "model.layers.0.mlp.{}"
    old = {"kind": "shape", "out_features": 104, "in_features": 64, "bias": False}
    shapes = {name.format("up_proj"): old, name.format("down_proj"): old | {"out_features": 64, "in_features": 104}}
    model = Skeleton(Checkpoint(llama).altered({}, shapes))
    found = SliceGPT.model_validate({"sparsity": 0.25}).surgery(model).structure or {}
    assert (found[name.format("up_proj")]["in_features"], found[name.format("up_proj")]["out_features"]) == (48, 104)
    assert (found[name.format("down_proj")]["in_features"], found[name.format("down_proj")]["out_features"]) == (104, 48)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {}, "cannot be sliced"),
        ("opt", {}, "cannot be sliced"),
        ("gpt_neox", {}, "cannot be sliced"),
        ("gemma2", {}, "norms each layer's output"),
        ("llama", {"sparsity": 0.9}, "none would stay"),
    ],
)
def test_what_cannot_be_sliced_is_refused(family, settings, message, make_checkpoint):
    model = Skeleton(Checkpoint(make_checkpoint(family)))
    with pytest.raises(BadInput, match=message):
        SliceGPT.model_validate(settings).surgery(model)


@pytest.mark.parametrize("first", ["wanda", "rtn", "embeddings", "foldgpt:blocks=1"])
def test_what_it_would_undo_is_refused(first, llama):
    with pytest.raises(BadInput, match="put slicegpt before"):
        plan(Recipe.parse({"model": str(llama), "passes": [first, "slicegpt"]}))


@pytest.mark.parametrize(("sparsity", "round_to", "size"), [(0.3, 8, 40), (0.3, 4, 44), (0.1, 1, 56), (0.25, 8, 48), (0, 48, 64)])
def test_sizes(sparsity, round_to, size, llama):
    """A multiple of round_to, and, for a Llama, of the number of heads."""
    model = Skeleton(Checkpoint(llama))
    assert SliceGPT.model_validate({"sparsity": sparsity, "round_to": round_to}).size(model) == size
