"""Run as a program of its own, importing nothing of compress: open an artifact as a user would, and compare its logits.

Arguments: artifact directory, safetensors file with "tokens" and "logits", dtype, device, and "remote" to allow the
artifact's own modelling code. Prints one JSON object as its last line.
"""

import json
import sys


def main(directory: str, probe: str, dtype: str, device: str, remote: str) -> None:
    """Load, run, compare, print."""
    from typing import Any

    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    expected = load_file(probe)
    with open(f"{directory}/config.json") as file:
        by_bitsandbytes = json.load(file).get("quantization_config", {}).get("quant_method") == "bitsandbytes"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), trust_remote_code=remote == "remote", output_loading_info=True,
        device_map={"": device} if by_bitsandbytes else None,  # which would else go to a GPU where there is one
    )  # fmt: skip
    model, report = loaded
    with torch.no_grad():
        logits = model.to(device).eval()(input_ids=expected["tokens"].to(device)).logits.float().cpu()
    reference = expected["logits"]
    result = {
        "max_difference": float((logits - reference).abs().max()),
        "scale": float(reference.abs().max()),
        "top1_agreement": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "model_class": type(model).__name__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:6])
