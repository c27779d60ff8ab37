"""The demo's two lm-eval tasks, written to a directory with their data.

lm-eval reads a task's data from an absolute path, and the data depend on the running interpreter, so both are generated
where they are needed: the YAML templates ship with the package and only their data path is filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from compress.demo import corpus, world

TEMPLATES = Path(__file__).parent / "task_templates"
N_FACTS = 400
N_TEXTS = 48
TEXT_BYTES = 2000


def write_tasks(directory: str | Path) -> list[str]:
    """Write task files and data into `directory` (made if missing); return the task names.

    The names are `demo_facts` (`N_FACTS` questions, even over the attributes) and `demo_text` (at most `N_TEXTS` pieces
    of held-out text of about `TEXT_BYTES` bytes: topics, docstrings and sources). Pass `directory` to lm-eval's
    `TaskManager(include_path=...)`. Existing files are overwritten, so repeated calls are harmless.
    """
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Iterable[dict[str, Any]]] = {
        "demo_facts": world.questions(N_FACTS),
        "demo_text": [{"text": body} for body in held_out_texts()],
    }
    for name, examples in rows.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        template = Template((TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8"))
        # A JSON string is a valid YAML string, whatever the path holds.
        (directory / f"{name}.yaml").write_text(template.substitute(data=json.dumps(str(data))), encoding="utf-8")
    return list(rows)


def held_out_texts(n: int = N_TEXTS, n_bytes: int = TEXT_BYTES) -> list[str]:
    """Return at most `n` pieces of held-out text of about `n_bytes` bytes, equally many of each kind.

    Pieces are runs of whole lines, spread evenly over the documents of their kind; a kind with too little text gives
    fewer (topics may be missing from a stripped interpreter).
    """
    held_out = corpus.documents("held_out")
    chosen: list[str] = []
    for kind in corpus.KINDS:
        pieces = [piece for name, body in held_out if name.startswith(kind) for piece in _pieces(body, n_bytes)]
        share = min(n // len(corpus.KINDS), len(pieces))
        chosen += [pieces[index * len(pieces) // share] for index in range(share)]
    return chosen


def _pieces(body: str, n_bytes: int) -> list[str]:
    """Cut a text into runs of whole lines of at least `n_bytes`; what remains at the end is left out."""
    pieces, lines, size = [], [], 0
    for line in body.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= n_bytes:
            pieces.append("".join(lines))
            lines, size = [], 0
    return pieces
