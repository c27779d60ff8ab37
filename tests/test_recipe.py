"""A recipe is the same thing as YAML, as plain data, as a command line and as objects; what it makes is repeatable."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from compress import Calibration, Evaluation, Pipeline, Recipe, methods, run
from compress.errors import BadInput

METHODS = sorted(methods.available())


def values(field: FieldInfo, annotation: Any = None) -> st.SearchStrategy:
    """Valid values of a setting, from its type and bounds alone, so that a new method needs nothing here."""
    annotation = annotation or field.annotation
    bounds = {name: getattr(item, name) for item in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        kinds = [values(field, kind) for kind in arguments if kind is not type(None)]
        return st.one_of(st.none(), *kinds)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(st.sampled_from(["*", "*.q_proj", "lm_head", "model.layers.[01].*"]), min_size=1, max_size=3).map(tuple)
    if annotation is bool:
        return st.booleans()
    low, high = bounds.get("ge", bounds.get("gt", 0)), bounds.get("le", bounds.get("lt", 1000))
    if annotation is int:
        return st.integers(low + ("gt" in bounds), high - ("lt" in bounds))
    if annotation is float:
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds)
    return st.sampled_from(["row", "tensor", "2:4", "texts/some-file_1.txt"])


@st.composite
def passes(draw: st.DrawFn, key: str):
    """A pass of that method with any of its settings changed."""
    method = methods.get(key)
    drawn = draw(st.fixed_dictionaries({}, optional={name: values(field) for name, field in method.model_fields.items()}))
    try:
        return methods.build(key, drawn)
    except BadInput:  # settings that do not go together
        reject()


@pytest.mark.parametrize("key", METHODS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_round_trips(key: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Through YAML, plain data and the command line's own notation, whatever the settings."""
    step = data.draw(passes(key))
    recipe = Recipe(passes=(step, step), seed=3, calibration=Calibration(data="a.txt", samples=7), evaluation=None)
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(recipe.dump())
    assert Recipe.load(file) == recipe
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe
    assert methods.parse(step.label()) == step
    assert Recipe.load(file).fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("key", METHODS)
def test_defaults_round_trip(key: str):
    recipe = Recipe.parse({"passes": [key]})
    assert yaml.safe_load(recipe.dump()) == {"passes": [key]}
    assert Recipe.parse(yaml.safe_load(recipe.dump())) == recipe
    assert recipe.passes[0].label() == key


def test_passes_from_strings_mappings_and_objects_are_equal():
    gptq = methods.get("gptq")
    spelled = [
        "gptq:bits=3,group_size=-1,symmetric=false,targets=*.q_proj+*.k_proj",
        {"gptq": {"bits": 3, "group_size": None, "symmetric": False, "targets": ["*.q_proj", "*.k_proj"]}},
        gptq(bits=3, group_size=None, symmetric=False, targets=("*.q_proj", "*.k_proj")),
        gptq(bits=3, group_size=-1, symmetric=False, targets="*.q_proj+*.k_proj"),
    ]
    recipes = [Recipe.parse({"passes": [step]}) for step in spelled]
    assert all(recipe == recipes[0] and recipe.fingerprint() == recipes[0].fingerprint() for recipe in recipes)
    bare = [Recipe.parse({"passes": [step]}) for step in ("rtn", {"rtn": None}, {"rtn": {}}, methods.get("rtn")())]
    assert all(recipe == bare[0] for recipe in bare)


# fingerprints

CONTENT = {
    "passes": [{"wanda": {"sparsity": 0.25, "pattern": "tensor"}}, {"gptq": {"bits": 3, "damping": 0.02}}],
    "calibration": {"samples": 9, "length": 33},
    "seed": 5,
    "dtype": "float32",
}


def reordered(value: Any) -> Any:
    return {key: reordered(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


def test_fingerprint_does_not_depend_on_order():
    one, other = Recipe.parse(CONTENT), Recipe.parse(reordered(CONTENT | {"passes": list(map(reordered, CONTENT["passes"]))}))
    assert one == other and one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6}, {"dtype": "bfloat16"}, {"device": "cuda"}, {"fuse": False},
        {"calibration": {"samples": 10, "length": 33}}, {"calibration": {"samples": 9}},
        {"calibration": {"samples": 9, "length": 33, "data": "x.txt"}},
        {"passes": CONTENT["passes"][::-1]}, {"passes": CONTENT["passes"][:1]}, {"passes": [*CONTENT["passes"], "rtn"]},
        {"passes": [{"wanda": {"sparsity": 0.26, "pattern": "tensor"}}, CONTENT["passes"][1]]},
        {"passes": [{"magnitude": {"sparsity": 0.25, "pattern": "tensor"}}, CONTENT["passes"][1]]},
        {"passes": [CONTENT["passes"][0], {"gptq": {"bits": 3, "damping": 0.02, "targets": "*.q_proj"}}]},
    ],
    ids=str,
)  # fmt: skip
def test_fingerprint_depends_on_what_decides_the_weights(change: dict):
    assert Recipe.parse(CONTENT | change).fingerprint() != Recipe.parse(CONTENT).fingerprint()


@pytest.mark.parametrize("key", METHODS)
def test_fingerprint_depends_on_every_setting(key: str):
    """Defaults count too: where one changes in a later release, an interrupted run must not be mixed with it."""
    default = Recipe.parse({"passes": [key]})
    content = default.passes[0].model_dump(mode="json")
    assert set(content) == set(methods.get(key).model_fields)
    changes = {bool: lambda v: not v, int: lambda v: v - 1 or 2, float: lambda v: v * 0.5 or 0.5, list: lambda v: [*v, "another"]}
    changed = 0
    for name, value in content.items():
        change = changes.get(type(value))
        choices = [choice for choice in get_args(methods.get(key).model_fields[name].annotation) if choice != value]
        if value is None:
            choices = ["text" if str in choices else 5]
        changed_value = change(value) if change else choices[0] if choices else value
        try:
            other = Recipe.parse({"passes": [{key: {name: changed_value}}]})
        except BadInput:
            continue
        if other != default:
            changed += 1
            assert other.fingerprint() != default.fingerprint(), name
    assert changed


@pytest.mark.parametrize(
    "change",
    [{"evaluation": None}, {"evaluation": {"limit": 3, "tasks": ["arc_easy"]}}, {"output": "elsewhere"}, {"model": "other"}],
    ids=str,
)
def test_fingerprint_does_not_depend_on_judgement_or_places(change: dict):
    assert Recipe.parse(CONTENT | change).fingerprint() == Recipe.parse(CONTENT).fingerprint()


@pytest.mark.parametrize("name", ["w4", "w3", "sparse-w4", "low-rank-w4", "recovered-2-4", "efficient-qat", "llm-qat"])
def test_presets(name: str):
    recipe = Recipe.load(name)
    assert recipe.passes and Recipe.parse(yaml.safe_load(recipe.dump())) == recipe


# runs

STEPS = ["wanda:sparsity=0.4", "logit_kd:steps=2,batch_size=2,length=16", "gptq:bits=3,group_size=32"]


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*")) if path.is_file()
    }  # fmt: skip


def global_state() -> dict[str, Any]:
    """What a library must leave as it finds it."""
    root = logging.getLogger()
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch's generator": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "numpy's generator": hashlib.sha256(numpy.random.get_state()[1].tobytes()).hexdigest(),
        "python's generator": hash(random.getstate()),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "log handlers": list(root.handlers),
        "log level": root.level,
    }


@pytest.fixture(scope="module")
def place(make_checkpoint, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of artifacts, one of each way to ask for the same thing; ``before`` and ``after`` are on the first."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(place: Path, llama: Path, text_file: Path):
    """(result, global state before, global state after) of a pipeline of objects and strings."""
    torch.manual_seed(7)
    before = global_state()
    wanda, rest = methods.get("wanda"), STEPS[1:]
    chosen = Calibration(data=str(text_file), samples=8, length=24)
    result = Pipeline([wanda(sparsity=0.4), *rest], calibration=chosen, evaluate=False).run(llama, place / "objects")
    return result, before, global_state()


def test_pipeline(first, place: Path, llama: Path):
    result, _, _ = first
    assert result.path == place / "objects" and result.metrics is None and result.report is None
    assert result.bytes == (result.path / "model.safetensors").stat().st_size == result.manifest.nbytes
    assert result.manifest.tier == "native-quantized" and result.manifest.base == str(llama)
    assert [step.label for step in result.manifest.steps] == STEPS
    assert result.verification.how == "stock" and result.verification.max_difference <= 1e-4 * max(result.verification.scale, 1)
    assert {entry.name for entry in place.iterdir()} >= {"objects"} and not (place / "objects.partial").exists()


def test_no_global_state_is_changed(first):
    _, before, after = first
    assert after == before


def test_plain_data_in_the_same_process_gives_the_same_bytes(first, place: Path, llama: Path, text_file: Path):
    content = {
        "model": str(llama), "output": str(place / "data"), "passes": STEPS, "evaluation": None,
        "calibration": {"data": str(text_file), "samples": 8, "length": 24},
    }  # fmt: skip
    torch.manual_seed(1234)  # nor does the caller's random state matter
    run(content)
    ours, theirs = contents(place / "data"), contents(place / "objects")
    ours.pop("recipe.yaml"), theirs.pop("recipe.yaml")  # this one names an output
    assert ours == theirs


def test_recipe_of_an_artifact_repeats_it(first, place: Path):
    copied = place / "again.yaml"
    shutil.copyfile(place / "objects" / "recipe.yaml", copied)
    result = run(str(copied), out=place / "file")
    assert contents(place / "file") == contents(place / "objects")
    assert result.manifest == first[0].manifest


def test_live_module(first, place: Path, llama: Path, reload, tokenizer, text_file: Path):
    model = reload(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = Calibration(data=str(text_file), samples=8, length=24)
    pipeline = Pipeline(STEPS, calibration=chosen, evaluate=False)
    with pytest.raises(BadInput, match="tokenizer"):
        pipeline.run(model, place / "live")
    result = pipeline.run(model, place / "live", tokenizer=tokenizer)
    weights = "model.safetensors"
    assert (place / "live" / weights).read_bytes() == (place / "objects" / weights).read_bytes()
    assert result.manifest.base == "LlamaForCausalLM"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not [entry.name for entry in place.iterdir() if entry.name.startswith(".compress-")]


def test_evaluation_is_a_default():
    assert Pipeline(["rtn"]).recipe.evaluation == Evaluation()
    assert Pipeline(["rtn"], evaluate=False).recipe.evaluation is None
    with pytest.raises(BadInput, match="unknown key 'sead'"):
        Pipeline(["rtn"], sead=3)


def test_effort_sets_the_options_that_nobody_chose():
    parse = lambda effort, step: Recipe.parse({"effort": effort, "passes": [step]}).passes[0]  # noqa: E731
    fast, default, best = (parse(effort, "autoround:bits=3") for effort in ("fast", "default", "best"))
    assert fast.iterations < default.iterations < best.iterations and {step.bits for step in (fast, default, best)} == {3}
    assert parse("best", "autoround:iterations=7").iterations == 7
    assert parse("best", methods.build("autoround", {"iterations": 7})).iterations == 7
    assert parse("best", "rtn") == parse("default", "rtn")
    with pytest.raises(BadInput, match="effort"):
        Recipe.parse({"effort": "utmost", "passes": ["rtn"]})


def test_effort_is_written_out_in_the_passes(tmp_path):
    recipe = Recipe.parse({"effort": "fast", "passes": ["autoround"]})
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again == recipe and again.fingerprint() == recipe.fingerprint()
    assert f"iterations: {recipe.passes[0].iterations}" in recipe.dump()


@pytest.mark.parametrize("key", [key for key, method in methods.available().items() if method.efforts])
def test_efforts_name_real_options(key):
    for effort, chosen in methods.get(key).efforts.items():
        assert effort in ("fast", "best") and methods.build(key, chosen) is not None
