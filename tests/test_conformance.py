"""What every method promises, whoever wrote it: it runs through the pipeline, and its artifact is what was computed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress import Pipeline, methods
from compress.checkpoint import Checkpoint, digest_files
from compress.errors import CompressError
from compress.export import to as export_to
from compress.export.bitsandbytes import misread_here
from compress.manifest import Manifest
from compress.passes import CorrectionPass, LinearPass, ModelPass
from compress.pipeline import Result
from compress.quant.aware import QuantizationAware
from compress.recipe import Calibration, Recipe
from compress.skeleton import Skeleton
from compress.train_pass import TrainPass
from compress.verify import verify_artifact

METHODS = [key for key in methods.available() if key != "adapter"]  # which is of one model: see its own tests
LINEAR = [key for key in METHODS if issubclass(methods.get(key), LinearPass)]
FACTORISING = [key for key in LINEAR if methods.get(key).factorises]
MODEL = [key for key in METHODS if issubclass(methods.get(key), ModelPass)]
EACH_FORM = (
    "gptq", "fp8", "nf4", "llm_int8", "hqq", "spqr", "quip", "embeddings", "kv_cache", "pack", "flap", "slicegpt", "foldgpt",
    "svd", "losparse", "compactifai", "vptq", "billm", "bitstack", "logit_kd",
)  # fmt: skip
"""A method for every form that an artifact can have. Those of the others are opened in this process by default, and in a fresh
one by slow tests."""
ALIKE = [
    key for key in METHODS
    if issubclass(methods.get(key), TrainPass) and key not in ("logit_kd", "gkd", "lora", "gradual", "bitnet")
]  # fmt: skip
"""Methods that differ from another in their loss only: what holds of all methods is tested of them in slow tests."""


def each(keys: list[str]) -> list:
    """The methods, as parameters."""
    return [pytest.param(key, marks=[pytest.mark.slow] if key in ALIKE else []) for key in keys]


LEFT_ALONE = {"mxfp4": ("down_proj",)}  # its groups of 32 do not divide the 112 inputs of that layer here
FIXED_BY_A_FORMAT = (
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_global_scale", "input_global_scale",
)  # fmt: skip


def tensor_bytes(directory: Path) -> int:
    """Bytes of the tensors in the weight files, headers left out."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                tensor = reader.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
    return total


def outer_bytes(source: Path) -> int:
    """Bytes of a checkpoint's tensors outside the compressible matrices."""
    skeleton = Skeleton(Checkpoint(source))
    matrices = sum(weight.nbytes for index in range(2) for weight in skeleton.read_weights(index).values())
    return tensor_bytes(source) - matrices


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def everything_in(directory: Path) -> str:
    return digest_files(sorted(file for file in directory.rglob("*") if file.is_file()))


@pytest.fixture(scope="module")
def results(llama, calibration, make_chain, tmp_path_factory) -> dict[str, Result]:
    """Each method run once through the whole pipeline, reload in a fresh process included; filled on demand."""

    class OnDemand(dict):
        def __missing__(self, key: str) -> Result:
            before = everything_in(llama)
            out = tmp_path_factory.mktemp(key) / "out"
            self[key] = Pipeline(make_chain(key), calibration=calibration, evaluate=False).run(llama, out)
            assert everything_in(llama) == before, "the source was changed"
            assert not list(out.parent.glob("*.partial"))
            return self[key]

    return OnDemand()


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.xdist_group(key), *([] if key in EACH_FORM else [pytest.mark.slow])])
        for key in METHODS
    ],
)
class TestPipeline:
    def test_artifact_opens_to_what_was_computed(self, key, results, assert_reloads):
        result = results[key]
        assert result.verification.how == ("streamed" if misread_here(Checkpoint(result.path), "cpu") else "stock")
        assert not result.verification.missing and not result.verification.unexpected
        exact = 0.0 if key in LINEAR else 1e-5
        assert result.verification.max_difference <= exact
        config = json.loads((result.path / "config.json").read_text())
        if result.manifest.tier == "shim":
            assert config["model_type"] == "compress"
            assert_reloads(result.path, atol=exact, remote=False)  # registered by importing compress
            assert_reloads(result.path, atol=exact, remote=True)
        else:
            assert config["model_type"] == "llama" and "auto_map" not in config
            assert not list(result.path.glob("*.py"))
            assert_reloads(result.path, atol=exact, remote=False)

    def test_artifact_is_complete(self, key, results, llama):
        files = {file.name for file in results[key].path.iterdir()}
        copied = {file.name for file in llama.iterdir()} - {"config.json", "model.safetensors"}
        assert files >= copied | {
            "config.json",
            "model.safetensors",
            "compress_manifest.json",
            "recipe.yaml",
            "README.md",
        }
        card = (results[key].path / "README.md").read_text()
        labels = [step.label for step in results[key].manifest.steps]
        assert all(label in card for label in labels)
        assert ("trust_remote_code=True" in card) == (results[key].manifest.tier == "shim")
        repeated = Recipe.load(results[key].path / "recipe.yaml")
        assert [step.label() for step in repeated.passes] == labels

    def test_manifest_names_the_step(self, key, results, llama, make_pass, make_chain):
        manifest = Manifest.read(results[key].path)
        assert manifest == results[key].manifest
        step, labels = manifest.steps[-1], [step.label() for step in make_chain(key)]
        assert [step.label for step in manifest.steps] == labels
        assert (step.method, step.settings) == (key, make_pass(key).model_dump(mode="json"))
        assert step.taxon == methods.get(key).taxon.value and step.paper == methods.get(key).paper
        assert manifest.base == str(llama) and manifest.base_digest == Checkpoint(llama).digest
        assert manifest.modules if key in MODEL else len(manifest.modules) == 14
        records = [r for name, r in manifest.modules.items() if not name.endswith(LEFT_ALONE.get(key, ("nothing",)))]
        if key in LINEAR or issubclass(methods.get(key), TrainPass):
            assert all(record.passes == labels and record.weight_error > 0 for record in records)
        else:  # which may leave matrices alone
            assert all(record.passes in ([], labels) for record in records)

    def test_bytes_add_up(self, key, results, llama):
        result = results[key]
        assert result.bytes == result.manifest.nbytes == (result.path / "model.safetensors").stat().st_size
        records = result.manifest.modules.values()
        outer = tensor_bytes(result.path) - sum(record.nbytes for record in records)
        assert outer > 0 if key in MODEL else outer == outer_bytes(llama)
        assert result.manifest.ideal_nbytes <= tensor_bytes(result.path)
        n_parameters = sum(p.numel() for p in Skeleton(Checkpoint(llama)).model.parameters())
        assert key in MODEL or result.manifest.dense_parameters == n_parameters


def test_artifact_verifies_block_by_block_and_damage_is_noticed(llama, make_pass, run_stages, tmp_path):
    artifact = run_stages(llama, [make_pass("svd_llm"), make_pass("gptq")])
    verification = verify_artifact(artifact, full=False)
    assert verification.how == "streamed" and verification.max_difference == 0
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(CompressError, match="digest"):
        verify_artifact(damaged, full=False)


def test_import_compress_registers_the_loader(run_stages, llama, make_pass, tmp_path):
    """In a fresh process, imported in either order; what the opened model saves opens too."""
    artifact = run_stages(llama, [make_pass(FACTORISING[0])])
    program = """
import sys
source, copy = sys.argv[1:]
import compress
assert "transformers" not in sys.modules, "import compress is to be cheap"
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.from_pretrained(source).base_model_type == "llama"
model, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
model.save_pretrained(copy)
again, report = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
state = again.state_dict()
assert all(value.equal(state[name]) for name, value in model.state_dict().items())
for name in [name for name in sys.modules if name.partition(".")[0] == "compress"]:
    del sys.modules[name]
import compress  # transformers is there already
assert AutoModelForCausalLM.from_pretrained(source).config.model_type == "compress"
"""
    process = subprocess.run(
        [sys.executable, "-c", program, str(artifact), str(tmp_path / "copy")],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("passes", [["svd"], ["hqq"], ["embeddings:bits=8"], ["slicegpt"]], ids=" ".join)
def test_an_opened_artifact_saves_itself_with_its_code(passes, llama, run_stages, tmp_path):
    """In a process that never imports compress: opened with remote code, saved, and opened again."""
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
source, copy = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
model.save_pretrained(copy)
again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
assert "compress" not in sys.modules
tokens = torch.arange(2, 12).unsqueeze(0)
assert torch.equal(model(tokens).logits, again(tokens).logits)
half = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True, dtype=torch.bfloat16)
assert half(tokens).logits.isfinite().all() and half.float()(tokens).logits.isfinite().all()
"""
    process = subprocess.run(
        [sys.executable, "-c", program, str(run_stages(llama, passes)), str(tmp_path / "copy")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]


# The same method on unusual models and data, without the reload in a fresh process.


@pytest.mark.parametrize("key", each(METHODS))
def test_bfloat16_checkpoint(key, make_checkpoint, make_chain, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint("llama", torch.bfloat16), make_chain(key), dtype="float32")
    assert_reloads(artifact, atol=0.0 if key in LINEAR else 1e-5)
    for name, tensor in load_file(artifact / "model.safetensors").items():
        wide = tensor.is_floating_point() and tensor.itemsize > 1 and name.rpartition(".")[2] not in FIXED_BY_A_FORMAT
        assert not wide or tensor.dtype == torch.bfloat16, name


@pytest.mark.parametrize("key", each(METHODS))
def test_biases_and_an_untied_head(key, make_checkpoint, make_chain, run_stages, assert_reloads):
    artifact = run_stages(make_checkpoint("llama-untied"), make_chain(key))
    model = assert_reloads(artifact, atol=0.0 if key in LINEAR else 1e-5)
    table = getattr(model.model.embed_tokens, "weight", None)  # a factored one has none
    assert table is None or model.lm_head.weight.data_ptr() != table.data_ptr()


@pytest.mark.parametrize("key", each(METHODS))
def test_single_token_windows(key, llama, text_file, make_chain, run_stages, assert_reloads):
    settings = {"calibration": Calibration(data=str(text_file), samples=130, length=1)}
    artifact = run_stages(llama, make_chain(key), **settings)
    assert_reloads(artifact, atol=0.0 if key in LINEAR else 1e-5)


@pytest.mark.parametrize("key", LINEAR)
def test_fewer_tokens_than_inputs_and_a_dead_input(key, llama, text_file, make_chain, run_stages, assert_reloads, tmp_path):
    lamed = tmp_path / "lamed"
    shutil.copytree(llama, lamed)
    tensors = load_file(lamed / "model.safetensors")
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"):
        tensors[name][5:9] = 0  # the linear layers behind it never see those inputs
    save_file(tensors, lamed / "model.safetensors", metadata={"format": "pt"})
    settings = {"calibration": Calibration(data=str(text_file), samples=2, length=10)}
    artifact = run_stages(lamed, make_chain(key), **settings)
    assert_reloads(artifact)


@pytest.mark.parametrize("key", LINEAR)
def test_widths_that_nothing_divides(key, make_checkpoint, make_chain, make_pass, run_stages, assert_reloads):
    """Rows that fill no int32, groups that divide no width, and the artifact as the source of another run."""
    source = make_checkpoint("llama", hidden_size=72, intermediate_size=100, head_dim=18)
    settings = {"bits": 3, "group_size": 48, "ratio": 0.7, "sparsity": 0.3}
    artifact = run_stages(source, make_chain(key, **{k: v for k, v in settings.items() if k in methods.get(key).model_fields}))
    assert_reloads(artifact)
    then = run_stages(artifact, [make_pass("rtn", bits=3, group_size=-1)])
    assert_reloads(then)
    last = run_stages(then, [make_pass("magnitude")])
    assert_reloads(last)
    for directory in (artifact, then, last):
        records = Manifest.read(directory).modules
        assert sum(record.nbytes for record in records.values()) + outer_bytes(source) == tensor_bytes(directory)
        skeleton = Skeleton(Checkpoint(directory))
        for index in range(2):
            for local, weight in skeleton.read_weights(index).items():
                name = skeleton.module_name(index, local)
                outlined = skeleton.checkpoint.weight(name, weight.shape, meta=True)
                assert (outlined.shape, outlined.nbytes) == (weight.shape, weight.nbytes), name
                assert weight.nbytes == records[name].nbytes


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_of_code_is_packed_and_opened(bits, symmetric, llama, make_pass, run_stages, assert_reloads):
    artifact = run_stages(llama, [make_pass("rtn", bits=bits, group_size=16, symmetric=symmetric)])
    assert_reloads(artifact)
    assert sum(r.nbytes for r in Manifest.read(artifact).modules.values()) + outer_bytes(llama) == tensor_bytes(artifact)


# Settings that change nothing.


@pytest.mark.parametrize("key", each(METHODS))
def test_neutral_settings_leave_the_model_as_it_is(key, llama, tokens, make_pass, run_stages, reload):
    neutral = {"sparsity": 0.0, "ratio": 1.0, "bits": 8, "group_size": 32, "learning_rate": 1e-12, "trains": "weights"}
    neutral["least"] = neutral["bits"]  # of nested codes: no narrower ones to choose them for
    if key == "kv_cache":  # whose floats of 8 bits are coarser than its integers
        neutral |= {"kind": "int", "dynamic": True}
    method, chain = methods.get(key), []
    chosen = {name: value for name, value in neutral.items() if name in method.model_fields}
    if issubclass(method, QuantizationAware) and "bits" not in chosen:  # whatever it learns, it rounds
        chosen = {}
    if issubclass(method, CorrectionPass) or key == "e2e_qp":
        chain, chosen = [make_pass("rtn", bits=8, group_size=16)], {"learning_rate": 1e-12} if key == "e2e_qp" else {}
    elif not chosen:
        pytest.skip("it has no such settings: what it keeps is its own test's to say")
    artifact = run_stages(llama, [*chain, make_pass(key, **chosen)])
    expected, found = logits_of(reload(llama), tokens), logits_of(reload(artifact), tokens)
    if "bits" in chosen or chain:
        assert (found - expected).norm() < 0.06 * expected.norm()  # OmniQuant begins with a fiftieth of the range cut off
        assert not found.equal(expected)
    elif key not in LINEAR:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if issubclass(method, TrainPass) else 1e-3)
    else:
        assert found.equal(expected)
        stored, original = (load_file(directory / "model.safetensors") for directory in (artifact, llama))
        assert stored.keys() == original.keys()
        assert all(tensor.equal(original[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("key", LINEAR)
def test_layers_that_are_not_targeted_stay_as_they_are(key, llama, make_chain, run_stages, assert_reloads):
    artifact = run_stages(llama, make_chain(key, targets="model.layers.1.*", skip="*.up_proj+q_proj"))
    assert_reloads(artifact)
    records = Manifest.read(artifact).modules
    touched = {name for name, record in records.items() if record.passes}
    assert len(touched) == 5 and all(name.startswith("model.layers.1.") for name in touched)
    stored, original = (load_file(directory / "model.safetensors") for directory in (artifact, llama))
    for name in records.keys() - touched:
        assert stored[f"{name}.weight"].equal(original[f"{name}.weight"])
    for name in touched:
        new, old = stored.get(f"{name}.weight"), original[f"{name}.weight"]
        assert new is None or new.dtype != old.dtype or new.equal(old) == name.endswith(LEFT_ALONE.get(key, ("nothing",)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_export_of_everything_at_once(family, make_checkpoint, make_pass, run_stages, reload, tokens, tmp_path):
    chain = [make_pass("svd_llm"), make_pass("wanda"), make_pass("gptq")]
    artifact = run_stages(make_checkpoint(family), chain)
    dense = export_to("dense", artifact, tmp_path / "dense")
    found, expected = logits_of(reload(dense), tokens), logits_of(reload(artifact), tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert json.loads((dense / "config.json").read_text())["model_type"] == family


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("key", METHODS)
def test_a_gpu_computes_what_the_cpu_does(key, llama, make_chain, run_stages, assert_reloads):
    chain = make_chain(key)
    on_cpu, on_gpu = (run_stages(llama, chain, device=device, dtype="float32") for device in ("cpu", "cuda"))
    assert_reloads(on_gpu, atol=1e-2 if key in LINEAR else 5e-2)
    records = [Manifest.read(artifact).modules for artifact in (on_cpu, on_gpu)]
    for name, record in records[0].items():
        assert records[1][name].weight_error == pytest.approx(record.weight_error, rel=0.05)
        assert (records[1][name].nbytes, records[1][name].rank) == (record.nbytes, record.rank)
