"""The model card: what was done, how to load it, what it measured; its front matter is what the Hugging Face Hub reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from compress.eval.metrics import Metrics, Report
from compress.manifest import Manifest
from compress.writer import write_text

INHERITED = ("license", "license_name", "license_link", "language")
"""What a model made from another keeps of that one's card."""


def write_card(
    directory: Path, manifest: Manifest, source: Path, metrics: Metrics | None = None, report: Report | None = None
) -> None:
    """Write ``README.md``. source: the directory that the model was made from, whose licence it keeps."""
    remote = ", trust_remote_code=True" if manifest.tier == "shim" else ""
    name = f"{Path(manifest.base).name}, compressed"
    results = _results(metrics, report) if metrics is not None and report is not None else []
    body = [
        f"# {name}", "",
        f"Made by `compress` from `{manifest.base}` with, in order: " + ", ".join(f"`{s.label}`" for s in manifest.steps) + ".",
        "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{remote})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")', "```", "", *results, "",
        "`recipe.yaml` repeats it, " * (directory / "recipe.yaml").exists() + "`compress_manifest.json` records every layer"
        + (", `report.html` shows what it cost." if results else "."), "",
    ]  # fmt: skip
    front = _front(manifest, source, name, metrics).to_yaml(line_break="\n")
    write_text(directory / "README.md", f"---\n{front}\n---\n\n" + "\n".join(body))


def _front(manifest: Manifest, source: Path, name: str, metrics: Metrics | None) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=task, metric_type=score.primary.partition(",")[0],
            metric_value=score.value,
        )
        for task, score in (metrics.tasks if metrics else {}).items() if math.isfinite(score.value)
    ]  # fmt: skip
    base = hub_id(manifest.base)
    more: dict[str, Any] = {"base_model": base} if base else {}
    if base and any(record.bits for record in manifest.modules.values()):
        more["base_model_relation"] = "quantized"
    if results:
        more |= {"eval_results": results, "model_name": name, "metrics": sorted({each.metric_type for each in results})}
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation",
        tags=["compress", *sorted({step.method for step in manifest.steps})], **more, **_inherited(source),
    )  # fmt: skip


def hub_id(name: str) -> str | None:
    """``name`` where it can only be a model's name on the hub, else None."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _inherited(source: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(source / "README.md") or {}
    except Exception:  # no card, or one that no YAML reader takes: nothing to keep
        return {}
    return {key: found[key] for key in INHERITED if found.get(key)}


def _results(metrics: Metrics, report: Report) -> list[str]:
    lines = ["| | base | compressed |", "|---|---|---|"]
    lines.append(f"| bytes on disk | {report.base.cost.bytes_on_disk:,} | {metrics.cost.bytes_on_disk:,} |")
    for name, score in metrics.tasks.items():
        lines.append(f"| {name} ({score.primary}) | {report.base.tasks[name].value:.4g} | {score.value:.4g} |")
    if metrics.fidelity is not None:
        lines.append(f"| KL to base, nats/token | 0 | {metrics.fidelity.kl_mean:.4g} |")
    protocol = metrics.protocol
    return [
        *lines, "",
        f"Held-out text: {protocol.data} of {protocol.context_length} tokens; {protocol.dtype}, seed {protocol.seed}.",
    ]  # fmt: skip
