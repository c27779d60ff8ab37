"""Text that every CPython carries: language topics, docstrings and sources of the running interpreter.

A demonstration has to work offline and must not copy anybody's text into this repository. The interpreter itself holds
several megabytes of prose and code under a known licence, so the corpus is read from it at run time.

Every byte belongs to one document: a module gives one document of its docstrings and one of its source *without* the
docstrings. Both are placed in a split by a hash of the module's name, so neither can leak into the other split, and the
placement is the same for every Python version (the text itself follows the version that runs). A few topics and modules
repeat one another; a held-out document that shares its lines with training ones is left out of both splits.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from zlib import crc32

SPLITS = ("train", "held_out", "calibration")
KINDS = ("topics", "docstrings", "sources")
EXCLUDED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3", "pydoc_data", "__phello__")
)
EXCLUDED_MODULES = frozenset(("html.entities", "stringprep", "this", "antigravity"))
MAX_MODULE_BYTES = 300_000
# A line of this many characters is unlikely to be repeated by chance, and a document with this share of such lines is.
TELLING_CHARACTERS = 40
MAX_REPEATED = 0.1
N_BUCKETS = 20
HELD_OUT_BUCKET = 0
CALIBRATION_BUCKET = 1

Document = tuple[str, str]


def documents(split: str) -> list[Document]:
    """Return the `(name, text)` documents of a split in a fixed, mixed order.

    `split` is "train", "held_out" or "calibration"; the calibration documents are a subset of the training ones, and
    no held-out document is ever trained on. Names read `topics/...`, `docstrings/...` or `sources/...`. The order is by
    a hash of the name, which mixes the three kinds. Raises `ValueError` for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    chosen = [document for document in _all_documents() if _in_split(document[0], split)]
    if split == "held_out":
        trained = {line for _, body in documents("train") for line in _telling_lines(body)}
        chosen = [document for document in chosen if _repeated(document[1], trained) <= MAX_REPEATED]
    return sorted(chosen, key=lambda document: (crc32(f"order/{document[0]}".encode()), document[0]))


def text(split: str, n_bytes: int | None = None) -> str:
    """Join the documents of a split with blank lines, cut to at most `n_bytes` of UTF-8 (default: all of it)."""
    joined = "\n\n".join(body for _, body in documents(split))
    return joined if n_bytes is None else joined.encode()[:n_bytes].decode(errors="ignore")


def _in_split(name: str, split: str) -> bool:
    kind, _, subject = name.partition("/")
    family = "topics" if kind == "topics" else "modules"
    # `_pydatetime` and `datetime` trade places between versions: they must fall on the same side.
    bucket = crc32(f"{family}/{subject.removeprefix('_py')}".encode()) % N_BUCKETS
    if split == "calibration":
        return bucket == CALIBRATION_BUCKET
    return (bucket == HELD_OUT_BUCKET) == (split == "held_out")


def _telling_lines(body: str) -> list[str]:
    return [line for line in map(str.strip, body.splitlines()) if len(line) >= TELLING_CHARACTERS]


def _repeated(body: str, trained: set[str]) -> float:
    """Return the share of a document's telling lines that training documents hold too."""
    lines = _telling_lines(body)
    return sum(line in trained for line in lines) / max(1, len(lines))


@lru_cache(maxsize=1)
def _all_documents() -> tuple[Document, ...]:
    found: list[Document] = []
    # Some distributions strip the topics; the rest is still a corpus.
    with suppress(ImportError):
        from pydoc_data.topics import topics

        found += [(f"topics/{label}", body) for label, body in topics.items()]
    for module, source in _modules():
        tree = _parse(source)
        if tree is not None:
            found.append((f"docstrings/{module}", _docstrings(module, tree)))
            found.append((f"sources/{module}", _code(source, tree)))
    return tuple((name, body.strip() + "\n") for name, body in found if body.strip())


def _modules() -> Iterator[tuple[str, str]]:
    """Yield `(dotted module name, source)` for the standard library's own modules, in order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if EXCLUDED_FOLDERS.intersection(parts) or any("-" in part for part in parts[:-1]):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        # The build's own configuration table describes one machine, not the language.
        if module in EXCLUDED_MODULES or module.startswith("_sysconfigdata"):
            continue
        if path.stat().st_size <= MAX_MODULE_BYTES:
            yield module, path.read_text(encoding="utf-8", errors="ignore")


def _parse(source: str) -> ast.Module | None:
    # A few shipped files (templates, deliberate errors) do not parse, and old ones hold escapes that warn.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _documented(tree: ast.Module) -> Iterator[tuple[str, ast.Expr, str]]:
    """Yield `(qualified name, statement, clean docstring)` for the module, its classes and its functions."""
    waiting: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [("", tree)]
    while waiting:
        qualified, node = waiting.pop(0)
        docstring = ast.get_docstring(node)
        if docstring and isinstance(node.body[0], ast.Expr):
            yield qualified, node.body[0], docstring
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                waiting.append((f"{qualified}.{child.name}".lstrip("."), child))


def _docstrings(module: str, tree: ast.Module) -> str:
    sections = [f"{'.'.join(filter(None, (module, name)))}\n\n{body}\n" for name, _, body in _documented(tree)]
    return "\n".join(sections)


def _code(source: str, tree: ast.Module) -> str:
    hidden: set[int] = set()
    for _, statement, _ in _documented(tree):
        hidden.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    lines = source.splitlines()
    return "\n".join(line.rstrip() for number, line in enumerate(lines, start=1) if number not in hidden)
