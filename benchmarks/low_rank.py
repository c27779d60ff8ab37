"""Every low-rank method on the bundled checkpoint: what is left, in numbers and in bytes, what loads it, time, and what it cost.

As `quantizers.py`, whose protocol it is: every method at its defaults, and those that are compared in the literature with 80, 60
and 40 % of the layers' parameters.

    python benchmarks/low_rank.py --write README.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from quantizers import tabulate

from compress import methods

RESULTS = Path(__file__).parent / "results" / "low_rank.json"
MARKS = ("<!-- low rank -->", "<!-- /low rank -->")
COMPANIONS = {"pela": "svd_llm:ratio=0.6 pela:steps=30,length=64"}
COMPARED = ["svd:ratio={}", "asvd:ratio={}", "svd_llm:ratio={}", "svd_llm:ratio={},update=true", "svd_llm:ratio={},ranks=loss"]
OTHERS = ["tensorgpt:form=matrix", "sltrain:ratio=0.6", "svd_llm:ratio=0.6,update=true,ranks=loss", "svd_llm:ratio=0.6 gptq"]


def chains(only: list[str] | None) -> list[list[str]]:
    """What is run."""
    keys = [key for key, method in methods.available().items() if method.__module__.startswith("compress.lowrank.")]
    found = [COMPANIONS.get(key, key) for key in keys]
    found += [chain.format(ratio) for ratio in (0.8, 0.6, 0.4) for chain in COMPARED if ratio < 0.8 or "," in chain] + OTHERS
    return [chain.split() for chain in found if not only or any(part in chain for part in only)]


def markdown(rows: list[dict[str, Any]], protocol: str) -> str:
    """The table of the README."""
    lines = ["| passes | parameters left, M | file, MB | tier | s per M parameters | perplexity |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| `{row['chain']}` | {row['parameters'] / 1e6:.2f} | {row['bytes'] / 1e6:.2f} | {row['tier']} | "
            f"{row['seconds_per_million']:.1f} | {row['perplexity']:.2f} |"
        )
    return "\n".join([*lines, "", protocol])


if __name__ == "__main__":
    sys.exit(tabulate(__doc__, chains, RESULTS, MARKS, markdown))
