"""Other libraries doing what compress does, to be run by their own interpreter: imports nothing of compress.

Either one timed job (for `gptq_speed.py`):

    peers.py JOB MODEL TOKENS OUT THREADS

loads the model in float32 on the CPU, calibrates with the safetensors file's "tokens" (n, length) int64 in batches of 8,
writes the artifact, and prints one JSON object as its last line: the seconds from the model on disk to the artifact on
disk, without the imports. Or many settings in one process (for `quant_vs_peers.py`), because the imports take longer than a
small model:

    peers.py sweep PEER MODEL SETTINGS THREADS

SETTINGS is a JSON list of {"tokens", "bits", "group_size" (-1: the whole row), "symmetric", "out"}, or for pruning (for
`prune_vs_peers.py`) of {"tokens", "sparsity", "pattern" ("N:M" or null), "out"}. For each, the weights that
the peer's model computes with are written to "out" as float32 under transformers' names, each quantized matrix's scales
(out, groups) as "NAME.scale" and, for the first setting, the peer's own logits on two windows; then one JSON line is printed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 8
PROBE_WINDOWS = 2

Sweep = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any], dict[str, Any]]]
"""(calibration tokens, setting) -> (model, matrices where its modules hold none, scales), both by the layer's name."""


def gptqmodel_gptq(model: str, tokens: Path, out: str) -> Callable[[], None]:
    """GPTQ of gptqmodel: 4 bits, groups of 128, its own defaults otherwise."""
    quantize, read = _gptqmodel(model), _read

    def run() -> None:
        quantize(read(tokens), bits=4, group_size=128).save(out)

    return run


def llmcompressor_gptq(model: str, tokens: Path, out: str) -> Callable[[], None]:
    """GPTQ of llm-compressor: W4A16 with groups of 128, its own defaults otherwise."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    return _oneshot_job(GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]), model, tokens, out)


def llmcompressor_wanda(model: str, tokens: Path, out: str) -> Callable[[], None]:
    """Wanda of llm-compressor at 50 %."""
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    return _oneshot_job(WandaPruningModifier(sparsity=0.5, ignore=["lm_head"]), model, tokens, out)


def _read(tokens: Path | str) -> Any:
    from safetensors.torch import load_file

    return load_file(tokens)["tokens"]


def _gptqmodel(model: str) -> Callable[..., Any]:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    def quantize(rows: Any, **settings: Any) -> Any:
        examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
        loaded = GPTQModel.load(model, QuantizeConfig(**settings), device="cpu", dtype=torch.float32)
        loaded.quantize(examples, batch_size=BATCH)
        return loaded

    return quantize


def _oneshot(model: str) -> Callable[[Any, Any], Any]:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    def quantize(rows: Any, recipe: Any) -> Any:
        examples = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        oneshot(
            model=loaded, dataset=Dataset.from_dict(examples), recipe=recipe, batch_size=BATCH, pipeline="sequential",
            max_seq_length=rows.shape[1], num_calibration_samples=len(rows), shuffle_calibration_samples=False,
        )  # fmt: skip
        return loaded

    return quantize


def _oneshot_job(modifier: object, model: str, tokens: Path, out: str) -> Callable[[], None]:
    quantize = _oneshot(model)

    def run() -> None:
        quantize(_read(tokens), modifier).save_pretrained(out, save_compressed=True)

    return run


JOBS = {
    "gptqmodel-gptq": gptqmodel_gptq,
    "llmcompressor-gptq": llmcompressor_gptq,
    "llmcompressor-wanda": llmcompressor_wanda,
}


def sweep_gptqmodel_gptq(model: str) -> Sweep:
    """GPTQ of gptqmodel. The matrices are those of its artifact, saved and loaded again by itself.

    Its default order of the inputs, by groups, refuses whole rows; there the order is that of the matrix.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel

    quantize = _gptqmodel(model)

    def run(rows: Any, setting: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        whole_rows = {"act_group_aware": False} if setting["group_size"] == -1 else {}
        loaded = quantize(rows, bits=setting["bits"], group_size=setting["group_size"], sym=setting["symmetric"], **whole_rows)
        with tempfile.TemporaryDirectory() as scratch:
            loaded.save(scratch)
            # Its plain kernel takes no float32; the weights are codes times float16 scales whatever the model's dtype.
            again = GPTQModel.load(scratch, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
        layers = {name: layer for name, layer in again.model.named_modules() if hasattr(layer, "dequantize_weight")}
        assert all(bool((layer.g_idx.diff() >= 0).all()) for layer in layers.values()), "groups are not runs of inputs"
        matrices = {name: layer.dequantize_weight().float().T for name, layer in layers.items()}
        return again.model, matrices, {name: layer.scales.T for name, layer in layers.items()}

    return run


def sweep_llmcompressor(model: str, recipe: Callable[[dict[str, Any]], Any]) -> Sweep:
    """A recipe of llm-compressor, given the arguments of the quantizing modifier."""
    import torch

    quantize = _oneshot(model)

    def run(rows: Any, setting: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        grid = {"num_bits": setting["bits"], "type": "int", "symmetric": setting["symmetric"], "dynamic": False}
        grouped = setting["group_size"] > 0
        grid |= {"strategy": "group", "group_size": setting["group_size"]} if grouped else {"strategy": "channel"}
        groups = {"group_0": {"targets": ["Linear"], "weights": grid}}
        loaded = quantize(rows, recipe({"config_groups": groups, "ignore": ["lm_head"]}))
        layers = {name: layer for name, layer in loaded.named_modules() if hasattr(layer, "weight_scale")}
        # What a layer makes of the unit vectors is what it computes with, fake quantization included.
        matrices = {name: layer(torch.eye(layer.in_features)).T for name, layer in layers.items()}
        return loaded, matrices, {name: layer.weight_scale for name, layer in layers.items()}

    return run


def sweep_llmcompressor_gptq(model: str) -> Sweep:
    """GPTQ of llm-compressor."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    return sweep_llmcompressor(model, lambda arguments: GPTQModifier(**arguments))


def sweep_llmcompressor_awq(model: str) -> Sweep:
    """AWQ of llm-compressor: its transform, then rounding to nearest, as its documentation puts them together."""
    import torch
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():  # it pins memory for a device, and fails where there is none
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    return sweep_llmcompressor(model, lambda arguments: [AWQModifier(), QuantizationModifier(**arguments)])


def sweep_autoround(model: str) -> Sweep:
    """auto-round's tuning of the rounding (SignRound)."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def run(rows: Any, setting: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(BATCH)]
        tuned, _ = AutoRound(
            loaded, tokenizer, bits=setting["bits"], group_size=setting["group_size"], sym=setting["symmetric"],
            dataset=batches, nsamples=len(rows), seqlen=rows.shape[1], batch_size=BATCH, device_map="cpu",
        ).quantize()  # fmt: skip
        layers = {name: layer for name, layer in tuned.named_modules() if isinstance(getattr(layer, "scale", None), torch.Tensor)}
        return tuned, {name: layer.weight for name, layer in layers.items()}, {n: layer.scale for n, layer in layers.items()}

    return run


def sweep_llmcompressor_pruning(model: str, name: str) -> Sweep:
    """A pruning modifier of llm-compressor, by the name of its class."""
    from llmcompressor.modifiers import pruning

    quantize, modifier = _oneshot(model), getattr(pruning, name)

    def run(rows: Any, setting: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        pattern = {"mask_structure": setting["pattern"]} if setting["pattern"] else {}
        return quantize(rows, modifier(sparsity=setting["sparsity"], ignore=["lm_head"], **pattern)), {}, {}

    return run


SWEEPS: dict[str, Callable[[str], Sweep]] = {
    "llmcompressor-sparsegpt": lambda model: sweep_llmcompressor_pruning(model, "SparseGPTModifier"),
    "llmcompressor-wanda": lambda model: sweep_llmcompressor_pruning(model, "WandaPruningModifier"),
    "gptqmodel-gptq": sweep_gptqmodel_gptq,
    "llmcompressor-gptq": sweep_llmcompressor_gptq,
    "llmcompressor-awq": sweep_llmcompressor_awq,
    "auto-round": sweep_autoround,
}


def sweep(peer: str, model: str, settings: Path) -> None:
    """Quantize with every setting, write what each made of the weights, and print a line for each."""
    import torch
    from safetensors.torch import save_file

    quantize = SWEEPS[peer](model)
    for number, setting in enumerate(json.loads(settings.read_text())):
        start, rows = time.monotonic(), _read(setting["tokens"])
        try:
            with torch.no_grad() if peer != "auto-round" else torch.enable_grad():
                loaded, matrices, scales = quantize(rows, setting)
            with torch.no_grad():
                tensors = {name: value.float() for name, value in loaded.named_parameters() if value.is_floating_point()}
                tensors |= {f"{name}.weight": value.float() for name, value in matrices.items()}
                tensors |= {f"{name}.scale": value.float() for name, value in scales.items()}
                if number == 0:
                    tensors["logits"] = loaded(input_ids=rows[:PROBE_WINDOWS], use_cache=False).logits.float()
            partial = Path(setting["out"] + ".partial")
            save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, partial)
            partial.rename(setting["out"])
            line = {"out": setting["out"], "seconds": round(time.monotonic() - start, 2)}
        except Exception as error:  # a library's refusal of one setting is a result; the others must still be run
            traceback.print_exc()
            line = {"out": setting["out"], "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print("\n" + json.dumps(line), flush=True)


def job(name: str, model: str, tokens: str, out: str) -> None:
    """Prepare, time, print."""
    run = JOBS[name](model, Path(tokens), out)
    start = time.monotonic()
    run()
    print(json.dumps({"seconds": round(time.monotonic() - start, 2)}), flush=True)


def main(arguments: list[str]) -> None:
    """A sweep or a timed job."""
    import torch

    torch.set_num_threads(int(arguments[-1]))
    if arguments[0] == "sweep":
        sweep(arguments[1], arguments[2], Path(arguments[3]))
    else:
        job(*arguments[:4])


if __name__ == "__main__":
    main(sys.argv[1:])
