"""What is left at two bits: chains of quantization and training by the bits per byte that they lose, beside GPTQ's.

Every chain is run as a user runs it, the reload in a fresh process included. True bits are over the compressed matrices with
everything that they need; a chain's ``ratio`` is how many times fewer bits per byte it loses than `gptq:bits=2,group_size=64` on
the same calibration windows. Rows that are in the results file already are not run again, and methods that are not there are left
out.

    python benchmarks/extreme.py
    python benchmarks/extreme.py --model DIR --data train.jsonl --held-out valid.txt --form length=2,entries=16
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from judged import Judge, Table, arguments, called
from quantizers import Clock, true_bits

from compress import methods
from compress.errors import CompressError
from compress.pipeline import Pipeline
from compress.recipe import Calibration

BASELINE = "gptq:bits=2,group_size=64"
MOST_BITS, LEAST_RATIO = 2.3, 3.0


def chains(form: str, steps: int, length: int) -> list[str]:
    """What is compared. form: settings of codebooks; steps, length: of training."""
    training = f"steps={steps},length={length},learning_rate=0.001"
    distilled, tuned = f"logit_kd:{training}", f"pv_tuning:{training}"
    wanted = [BASELINE, "autoround:bits=2,group_size=64", "quip:bits=2", "nested", "billm", "bitstack", f"bitnet:{training}"]
    wanted += [f"block_ap:bits=2,group_size=64 e2e_qp:{training}"]
    wanted += [f"autoround:bits=2,group_size=64 {distilled}"]
    wanted += [f"{BASELINE} {training}" for training in (distilled, tuned)]
    for codebooks in (f"vptq{form}", f"aqlm{form}"):
        tails = ("", "reconstruct", distilled, tuned, f"reconstruct {tuned}")
        wanted += [f"{codebooks} {tail}".strip() for tail in tails]
    known = methods.available()
    return [chain for chain in wanted if all(step.partition(":")[0] in known for step in chain.split())]


def measure(model: Path, chain: str, judge: Judge, calibration: Calibration) -> dict[str, Any]:
    """One row."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        result = Pipeline(chain.split(), calibration=calibration, evaluate=False, dtype="float32").run(model, out, progress=clock)
        return {
            "chain": chain, "bits": true_bits(result), "bytes": result.bytes, "bits_per_byte": judge(out),
            "seconds_per_million": round(clock.seconds * 1e6 / result.manifest.parameters, 1),
            "difference": result.verification.max_difference,
        }  # fmt: skip


def compared(rows: list[dict[str, Any]], dense: float) -> list[dict[str, Any]]:
    """The rows, each with the bits per byte that it has ``lost``, and its ``ratio`` where GPTQ's row is there."""
    rows = [row | {"lost": row["bits_per_byte"] - dense} for row in rows]
    baseline = next((row["lost"] for row in rows if row["chain"] == BASELINE), None)
    return [row | {"ratio": baseline / row["lost"] if baseline is not None and row["lost"] > 0 else None} for row in rows]


def missed(rows: list[dict[str, Any]], dense: float) -> list[str]:
    """What falls short: the best chain of few bits, and codebooks that PV-Tuning does not improve."""
    rows = compared(rows, dense)
    ratios = [row["ratio"] for row in rows if row["ratio"] and row["bits"] and row["bits"] <= MOST_BITS]
    found = []
    if ratios and max(ratios) < LEAST_RATIO:
        found.append(f"the best chain of at most {MOST_BITS} bits loses {max(ratios):.2f} times fewer bits per byte than GPTQ")
    lost = {row["chain"]: row["lost"] for row in rows}
    for chain, value in lost.items():
        before, _, last = chain.rpartition(" ")
        if last.startswith("pv_tuning") and before in lost and value >= lost[before]:
            found.append(f"{chain} loses no less than {before}")
    return found


def markdown(tables: dict[str, dict[str, Any]]) -> str:
    """A table for every protocol, the best first."""
    lines = []
    for protocol, table in tables.items():
        lines += ["| passes | true bits per weight | file, MB | bits per byte | lost | times fewer than GPTQ | s per M weights |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in sorted(compared(table["rows"], table["dense"]), key=lambda row: row["lost"]):
            bits, ratio = ("-" if row[key] is None else format(row[key], ".2f") for key in ("bits", "ratio"))
            lines.append(
                f"| `{row['chain']}` | {bits} | {row['bytes'] / 1e6:.2f} | {row['bits_per_byte']:.4f} | {row['lost']:.4f} | "
                f"{ratio} | {row['seconds_per_million']:.1f} |"
            )
        lines += ["", f"{protocol} {table['dense']:.4f} bits per byte before.", ""]
    return "\n".join(lines)


def main() -> int:
    """Measure what is missing, write the tables; 1 where a bar is missed."""
    parser = arguments(__doc__, steps=400)
    parser.add_argument("--form", default="", help="settings of codebooks, such as length=2,entries=16 for small matrices")
    parser.add_argument("--more", default="", help="more chains, separated by semicolons")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judge = Judge(options.model, options.held_out, options.windows)
    protocol = (
        f"{called(options.model)}: {options.samples} calibration windows of {options.length} tokens; training steps of 8 windows "
        f"of as many tokens, of other text than what it is judged by, {judge.described}; float32; seconds of a core."
    )
    table = Table("extreme", protocol, judge, options.model, markdown)
    calibration = Calibration(samples=options.samples, length=options.length, data=options.data)
    selected = chains(f":{options.form}" if options.form else "", options.steps, options.length)
    if options.only:
        selected = [chain for chain in selected if any(part in chain for part in options.only.split(";"))]
    for chain in [*selected, *filter(None, options.more.split(";"))]:
        if table.has(chain=chain):
            continue
        try:
            table.add(measure(options.model, chain, judge, calibration))
        except CompressError as error:
            print(f"{chain}: {error}", file=sys.stderr, flush=True)
    return table.close(missed(table.rows, table.dense))


if __name__ == "__main__":
    sys.exit(main())
