"""Every pruner on the bundled checkpoint: what is left, in numbers and in bytes, what loads it, time, and what it cost.

As `quantizers.py`, whose protocol it is, with the pruners at settings that are worth comparing: half of the weights, 2:4, 70 %, a
quarter of the blocks, of the neurons and heads, of the hidden channels.

    python benchmarks/pruners.py --write README.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from quantizers import tabulate

RESULTS = Path(__file__).parent / "results" / "pruners.json"
MARKS = ("<!-- pruners -->", "<!-- /pruners -->")
CHAINS = [
    "magnitude", "wanda", "ria", "sparsegpt", "wanda dsnot", "besa", "wanda pack",
    "magnitude:pattern=2:4", "wanda:pattern=2:4", "ria:pattern=2:4", "permute ria:pattern=2:4", "sparsegpt:pattern=2:4",
    "wanda:sparsity=0.7", "wanda:sparsity=0.7,ratios=owl", "sparsegpt:sparsity=0.7", "sparsegpt:sparsity=0.7,ratios=owl",
    "wanda gptq:bits=4", "sparsegpt gptq:bits=4", "gptq:bits=4 wanda", "sparsegpt:pattern=2:4 gptq:bits=4 pack",
    "shortgpt", "angular", "shortened", "laco", "foldgpt",
    "minitron", "llm_pruner", "flap", "slicegpt", "minitron gptq:bits=4",
]  # fmt: skip


def chains(only: list[str] | None) -> list[list[str]]:
    """What is run."""
    return [chain.split() for chain in CHAINS if not only or any(part in chain for part in only)]


def markdown(rows: list[dict[str, Any]], protocol: str) -> str:
    """The table of the README."""
    lines = [
        "| passes | parameters left, M | file, MB | without zeros, MB | tier | s per M parameters | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['chain']}` | {row['parameters'] / 1e6:.2f} | {row['bytes'] / 1e6:.2f} | {row['ideal_bytes'] / 1e6:.2f} | "
            f"{row['tier']} | {row['seconds_per_million']:.1f} | {row['perplexity']:.2f} |"
        )
    return "\n".join([*lines, "", protocol])


if __name__ == "__main__":
    sys.exit(tabulate(__doc__, chains, RESULTS, MARKS, markdown))
