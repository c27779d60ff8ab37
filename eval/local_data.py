"""Let lm-eval's own tasks, unchanged, read their data from a local directory instead of the hub.

A task's data lie in ``DIR`` with the columns that the task reads, in the first of these places that exists::

    DIR/<task>/<split>.jsonl                        DIR/arc_easy/test.jsonl
    DIR/<task>.jsonl                                DIR/arc_easy.jsonl  (the split that the task is scored on)
    DIR/<data set>/<configuration>/<split>.jsonl    DIR/allenai/ai2_arc/ARC-Easy/test.jsonl
    DIR/<name>/<configuration>/<split>.jsonl        DIR/ai2_arc/ARC-Easy/test.jsonl
    DIR/<data set>/<split>.jsonl                    (only for a data set without configurations)

``.json`` and ``.parquet`` serve as well, as do the hub's own shards (``test-00000-of-00001.parquet``, also in ``data/``), so
that a copy of a data set's repository works as it is. The split for examples in the prompt may be missing where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIXES = ("jsonl", "json", "parquet")
_PACKAGED = {"json", "parquet", "csv", "text", "arrow"}  # such a task names its files itself


@contextmanager
def local_data(directory: str | Path | None) -> Iterator[None]:
    """While open, the tasks that lm-eval builds read their data from ``directory``; None: from wherever they say.

    A task that finds nothing there raises ValueError with the list of places.
    """
    from lm_eval.api.task import ConfigurableTask

    if directory is None:
        yield
        return
    root, original = Path(directory), ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **more: Any) -> None:
        if task.DATASET_PATH in _PACKAGED:
            original(task, dataset_kwargs, **more)
        else:
            task.dataset = read_splits(root, task.config)

    ConfigurableTask.download = download  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        ConfigurableTask.download = original


def read_splits(root: Path, config: Any) -> Any:
    """The ``datasets.DatasetDict`` of a task's configuration. Raises ValueError where the split it is scored on is nowhere."""
    from datasets import DatasetDict, load_dataset

    scored = config.test_split or config.validation_split
    few_shot = getattr(config.fewshot_config, "split", None) or config.fewshot_split
    wanted = {name: None for name in (scored, config.validation_split, config.training_split, few_shot) if name}
    files, places = _find(root, config, scored, list(wanted))
    if scored not in files:
        looked = "\n  ".join(f"{place}.{{{','.join(SUFFIXES)}}}" for place in places)
        raise ValueError(f"no local data for the task {config.task}: its split {scored!r} is none of\n  {looked}")
    found = DatasetDict()
    for split, paths in files.items():
        kind = "parquet" if paths[0].suffix == ".parquet" else "json"
        found[split] = load_dataset(kind, data_files={split: [str(path) for path in paths]}, split=split)
    for split in wanted:  # a task opens all its splits; where no example is drawn from one, it may be empty
        if split not in found:
            found[split] = found[scored].select(range(0))
    return found


def _find(root: Path, config: Any, scored: str, wanted: list[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """Files by split, from the first place that has the scored one; and the places where that was looked for."""
    places: list[Path] = []
    for folder, is_file in _folders(root, config):
        if is_file:
            places.append(folder)
            if files := _files(folder):
                return {scored: files}, places
            continue
        places.append(folder / scored)
        found = {split: files for split in wanted if (files := _files(folder / split) or _files(folder / "data" / split))}
        if scored in found:
            return found, places
    return {}, places


def _folders(root: Path, config: Any) -> Iterator[tuple[Path, bool]]:
    """Where a task's data may lie, and whether that is one file without suffix rather than a folder of splits."""
    yield root / config.task, False
    yield root / config.task, True
    source, name = config.dataset_path or config.task, config.dataset_name
    for parent in dict.fromkeys((source, source.rpartition("/")[2])):
        if name is None:
            yield root / parent, False
            yield root / parent, True
        else:
            yield root / parent / name, False


def _files(stem: Path) -> list[Path]:
    for suffix in SUFFIXES:
        single = stem.with_name(f"{stem.name}.{suffix}")
        if single.is_file():
            return [single]
        if shards := sorted(stem.parent.glob(f"{stem.name}-*-of-*.{suffix}")):
            return shards
    return []
