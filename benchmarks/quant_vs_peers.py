"""Our quantizers against other libraries' at equal bits: held-out perplexity, paired over calibration samples.

Every contender quantizes the decoder's linear layers of the same float32 checkpoint, calibrated with the same windows (128 of
at most 256 tokens; one sample for each seed), at 4, 3 and 2 bits in groups of 128, 64 and 32 where those divide every layer's
width, else in rows. Everything but bits, group and symmetry is at the contender's own defaults; the peers run in their own
virtual environments (`peers.py`). What each makes of the weights is read back as float32 matrices and scales; the scales are
rounded to float16 and the matrices put on them, so that all count bits + 16/group bits per weight (+ bits/group for an
asymmetric grid's zero points), which is checked, as is that the codes span no more than the bits allow. One evaluator, a plain
transformers forward in float32, then takes everybody's perplexity on the same held-out windows. For the first setting of each
peer's process, its own logits must agree with those of the matrices read back.

Bar: in the mean over the seeds, ours is no higher than each peer's of the same algorithm. The exit status is 1 where it is
missed. Finished settings are kept in the work directory, by contender and by our passes' full settings, and are not done
again; `--fresh NAME` forgets those of a contender (needed when the code of a method has changed, not its defaults).

    python benchmarks/quant_vs_peers.py --ours "gptq awq autoround" --seeds 5
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gptq_speed import TORCH
from quality import DATA
from reconstruction import Artifact
from safetensors.torch import load_file
from subjects import HELD_OUT_WINDOWS, LENGTH, SAMPLES, Setting, Subject

from compress import methods
from compress.demo import MODEL as DEMO
from compress.pipeline import Pipeline
from compress.recipe import Calibration

ROOT = Path(__file__).resolve().parent
ENVIRONMENTS = {
    "llmcompressor-gptq": "llmcompressor==0.14.0.1",
    "gptqmodel-gptq": "gptqmodel==7.6.0",
    "auto-round": "auto-round==0.16.1",
    "llmcompressor-awq": "llmcompressor==0.14.0.1",
}
COUNTERPARTS = {
    "gptq": ("llmcompressor-gptq", "gptqmodel-gptq"), "awq": ("llmcompressor-awq",), "autoround": ("auto-round",),
}  # fmt: skip


class Store:
    """Finished settings, one file each."""

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, contender: str, subject: Subject, setting: Setting) -> Path:
        """Where a result is kept; a change of our defaults makes another name."""
        return self.directory / identity(contender) / subject.name / f"{setting.name}.json"

    def get(self, contender: str, subject: Subject, setting: Setting) -> dict[str, Any] | None:
        """A finished result, or None."""
        path = self.path(contender, subject, setting)
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, contender: str, subject: Subject, setting: Setting, found: dict[str, Any]) -> None:
        """Keep a result."""
        path = self.path(contender, subject, setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        print(subject.name, contender, setting.name, json.dumps(found), file=sys.stderr, flush=True)


def identity(contender: str) -> str:
    """A peer's name, or our label with a digest of all settings of its pass."""
    if contender in ENVIRONMENTS:
        return contender
    settings = json.dumps(methods.parse(contender).model_dump(mode="json"), sort_keys=True)
    return f"{contender.replace(':', '-')}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def interpreter(peer: str, cache: Path) -> Path:
    """The Python of a peer's virtual environment, made where it is not there yet (about 2 GB)."""
    directory = cache / ENVIRONMENTS[peer].replace("==", "-")
    python, ready = directory / "bin" / "python", directory / "ready"
    if not ready.exists():
        print(f"installing {ENVIRONMENTS[peer]} into {directory}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        for packages in ([TORCH], [TORCH, ENVIRONMENTS[peer]]):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        ready.touch()
    return python


def run_peer(peer: str, subject: Subject, settings: list[Setting], cache: Path, store: Store, threads: int) -> None:
    """All settings in one process of the peer's; each is judged and deleted as it comes."""
    with tempfile.TemporaryDirectory(prefix="compress-peer-", dir=subject.work) as scratch:
        outputs = {str(Path(scratch) / f"{setting.name}.safetensors"): setting for setting in settings}
        asked = [
            {
                "tokens": str(subject.tokens(s.seed)),
                "bits": s.bits,
                "group_size": s.group_size,
                "symmetric": s.symmetric,
                "out": out,
            }
            for out, s in outputs.items()
        ]
        listing, log = Path(scratch) / "settings.json", subject.work / "logs" / f"{peer}-{subject.name}.log"
        listing.write_text(json.dumps(asked))
        log.parent.mkdir(exist_ok=True)
        arguments = [str(interpreter(peer, cache)), str(ROOT / "peers.py"), "sweep", peer, str(subject.path), str(listing)]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with open(log, "w") as errors:
            process = subprocess.Popen(
                [*arguments, str(threads)], stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=scratch, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"out"'):
                    answer = json.loads(line)
                    store.put(peer, subject, outputs[answer["out"]], judged(subject, answer, outputs[answer["out"]]))
        if process.wait():
            print(f"{peer} on {subject.name} ended with status {process.returncode}, see {log}", file=sys.stderr)


def judged(subject: Subject, answer: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """A peer's answer as a result."""
    if "failed" in answer:
        return {"failed": answer["failed"]}
    dump = load_file(answer["out"])
    Path(answer["out"]).unlink()
    try:
        return {"seconds": answer["seconds"]} | subject.judge(dump, setting)
    except (ValueError, KeyError) as error:
        return {"failed": f"not comparable: {error}"}


def run_ours(label: str, subject: Subject, setting: Setting) -> dict[str, Any]:
    """One setting through the library as a user runs it."""
    options = f"bits={setting.bits},group_size={setting.group_size},symmetric={str(setting.symmetric).lower()}"
    calibration = Calibration(data=subject.calibration, samples=SAMPLES, length=LENGTH)
    pipeline = Pipeline(
        [f"{label}{',' if ':' in label else ':'}{options}"], calibration=calibration, evaluate=False, seed=setting.seed,
        dtype="float32",
    )  # fmt: skip
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="compress-ours-", dir=subject.work) as scratch:
        pipeline.run(subject.path, Path(scratch) / "out")
        artifact = Artifact(Path(scratch) / "out")
        dump = {name: artifact.tensor(name) for name in artifact.where if name in subject.dense}
        for name in subject.layers:
            dump |= {f"{name}.weight": artifact.matrix(name), f"{name}.scale": artifact.tensor(f"{name}.weight_scale").float()}
        return {"seconds": round(time.monotonic() - start, 2)} | subject.judge(dump, setting)


def settings_of(subject: Subject, options: argparse.Namespace) -> Iterator[Setting]:
    """What is compared on a model; the seeds vary slowest, so that an interrupted run holds whole samples."""
    for seed in range(options.seeds):
        for symmetric in options.symmetric:
            for bits in options.bits:
                for group in (size for size in subject.groups if not options.groups or size in options.groups):
                    yield Setting(bits, group, symmetric, seed)


def measure(subject: Subject, options: argparse.Namespace, store: Store) -> None:
    """Do what is not done yet."""
    settings = list(settings_of(subject, options))
    for contender in [*options.ours, *options.peers]:
        waiting = [setting for setting in settings if store.get(contender, subject, setting) is None]
        if contender in ENVIRONMENTS:
            if waiting:
                run_peer(contender, subject, waiting, options.cache, store, options.threads)
            continue
        for setting in waiting:
            store.put(contender, subject, setting, run_ours(contender, subject, setting))


def compared(subject: Subject, options: argparse.Namespace, store: Store) -> list[dict[str, Any]]:
    """The rows of a model: one for each bits, group and symmetry."""
    rows: dict[tuple[int, int, bool], dict[str, dict[int, dict[str, Any]]]] = {}
    for setting in settings_of(subject, options):
        cell = rows.setdefault((setting.bits, setting.group_size, setting.symmetric), {})
        for contender in [*options.ours, *options.peers]:
            if (found := store.get(contender, subject, setting)) is not None:
                cell.setdefault(contender, {})[setting.seed] = found
    return [
        {"bits": bits, "group_size": group, "symmetric": symmetric} | summary(cell)
        for (bits, group, symmetric), cell in rows.items()
    ]


def summary(cell: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Means, deviations and paired differences of a row. Raises ValueError where the contenders' bits differ."""
    good = {
        who: {seed: found["perplexity"] for seed, found in runs.items() if "perplexity" in found} for who, runs in cell.items()
    }
    bits = {round(found["bits_per_weight"], 9) for runs in cell.values() for found in runs.values() if "perplexity" in found}
    if len(bits) > 1:
        raise ValueError(f"bits per weight differ: {sorted(bits)}")
    failed = {who: next(iter(runs.values()))["failed"] for who, runs in cell.items() if not good[who]}
    pairs = []
    for mine in good:
        for peer in COUNTERPARTS.get(mine.partition(":")[0], ()):
            shared = sorted(good[mine].keys() & good.get(peer, {}).keys())
            if shared:
                change = [good[mine][seed] - good[peer][seed] for seed in shared]
                pairs.append(
                    {
                        "ours": mine, "peer": peer, "difference": statistics.mean(change), "deviation": deviation(change),
                        "relative": statistics.mean(change) / statistics.mean(good[peer][seed] for seed in shared),
                        "not_worse": sum(value <= 0 for value in change), "seeds": len(shared),
                    }
                )  # fmt: skip
    perplexity = {
        who: {"mean": statistics.mean(values.values()), "deviation": deviation(list(values.values())), "seeds": len(values)}
        for who, values in good.items()
        if values
    }
    return {"bits_per_weight": bits.pop() if bits else None, "perplexity": perplexity, "pairs": pairs, "failed": failed}


def deviation(values: list[float]) -> float:
    """Of the sample; zero for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def behind(tables: list[dict[str, Any]]) -> list[str]:
    """The comparisons that ours lost in the mean."""
    return [
        f"{table['model']} {title(row)}: {pair['ours']} {pair['difference']:+.4g} ({pair['relative']:+.2%}) to {pair['peer']}"
        for table in tables for row in table["rows"] for pair in row["pairs"] if pair["difference"] > 0
    ]  # fmt: skip


def title(row: dict[str, Any]) -> str:
    """A row's setting in words."""
    group = "row" if row["group_size"] == -1 else row["group_size"]
    return f"W{row['bits']} group {group} {'symmetric' if row['symmetric'] else 'asymmetric'}"


def markdown(tables: list[dict[str, Any]], contenders: list[str]) -> str:
    """Perplexities, paired differences and the bars."""
    versions = ", ".join(sorted({ENVIRONMENTS[who] for who in contenders if who in ENVIRONMENTS}))
    lines = [
        "# Our quantizers against other libraries' at equal bits", "",
        f"Everything but bits, group and symmetry is at each library's defaults ({versions}). {SAMPLES} calibration windows of "
        f"{LENGTH} tokens, another sample for each seed, the same for all; {HELD_OUT_WINDOWS} held-out windows; float32; scales "
        "of all rounded to float16, so that bits per weight, scales included, are equal. Perplexity per token: mean ± standard "
        "deviation over the seeds. Difference: ours less the peer's, paired by seed; negative is better.", "",
    ]  # fmt: skip
    for table in tables:
        lines += [f"## {table['model']}", "", f"Dense: {table['dense']:.4f}.", ""]
        lines += ["| setting | bits per weight | " + " | ".join(contenders) + " |", "|---" * (2 + len(contenders)) + "|"]
        for row in table["rows"]:
            cells = [_cell(row, who) for who in contenders]
            lines.append(f"| {title(row)} | {row['bits_per_weight'] or 0:.4g} | " + " | ".join(cells) + " |")
        lines += [
            "",
            "| setting | ours | peer | difference | of the peer's | seeds in which ours is no higher |",
            "|---" * 6 + "|",
        ]
        lines += [
            f"| {title(row)} | {pair['ours']} | {pair['peer']} | {pair['difference']:+.4f} ± {pair['deviation']:.4f} | "
            f"{pair['relative']:+.2%} | {pair['not_worse']} of {pair['seeds']} |"
            for row in table["rows"] for pair in row["pairs"]
        ]  # fmt: skip
        lines.append("")
    failures = sorted(
        {f"- {t['model']}: {who}: {why}" for t in tables for row in t["rows"] for who, why in row["failed"].items()}
    )
    if failures:
        lines += ["## Not run", "", *failures, ""]
    lost, n_pairs = behind(tables), sum(len(row["pairs"]) for table in tables for row in table["rows"])
    lines += ["## Bars", "", f"Ours is no higher in {n_pairs - len(lost)} of {n_pairs} comparisons.", ""]
    return "\n".join([*lines, *(f"- MISSED {line}" for line in lost), *([""] if lost else [])])


def _cell(row: dict[str, Any], who: str) -> str:
    found = row["perplexity"].get(who)
    return "-" if found is None else f"{found['mean']:.4f} ± {found['deviation']:.4f}"


def arguments() -> argparse.Namespace:
    """The command line."""

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=lambda text: text.split(), default=list(COUNTERPARTS), help="labels, `gptq awq:key=value`")
    parser.add_argument("--peers", type=names, default=list(ENVIRONMENTS), help="comma-separated, or nothing")
    parser.add_argument("--names", type=names, help="comma-separated names of models (`demo` is the bundled one)")
    parser.add_argument("--bits", type=lambda text: [int(part) for part in names(text)], default=[4, 3, 2])
    parser.add_argument("--groups", type=lambda text: [int(part) for part in names(text)], help="only these group sizes")
    parser.add_argument("--symmetric", type=lambda text: [part == "true" for part in names(text)], default=[True])
    parser.add_argument("--seeds", type=int, default=5, help="calibration samples")
    parser.add_argument("--threads", type=int, default=1, help="of small models: more only wait for one another")
    parser.add_argument("--report", action="store_true", help="measure nothing: tabulate what is finished")
    parser.add_argument("--fresh", type=names, default=[], help="contenders whose results are forgotten first")
    parser.add_argument("--models", type=Path, default=DATA / "models", help="directory of model directories")
    parser.add_argument("--held-out", type=Path, default=DATA / "corpora" / "tinystories_valid.txt")
    parser.add_argument("--calibration", type=Path, default=DATA / "corpora" / "tinystories_train1000.jsonl")
    scratch = Path(tempfile.gettempdir())
    parser.add_argument("--cache", type=Path, default=scratch / "compress-bench-envs", help="the peers' environments")
    parser.add_argument("--work", type=Path, default=scratch / "compress-quant-vs-peers", help="finished settings, logs")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="directory of quant_vs_peers.json and .md")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(ENVIRONMENTS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}; known: {', '.join(ENVIRONMENTS)}")
    return options


def subjects(options: argparse.Namespace) -> list[Subject]:
    """The models that there are and that were asked for."""
    found = [Subject("demo", DEMO, None, None, options.work)] if DEMO.is_dir() else []
    if all(path.exists() for path in (options.models, options.held_out, options.calibration)):
        texts = str(options.held_out), str(options.calibration)
        sources = sorted(path.parent for path in options.models.glob("*/config.json"))
        found += [Subject(path.name, path, *texts, options.work) for path in sources]
    else:
        print(f"skipped the trained models: not all of {options.models}, its texts are there", file=sys.stderr)
    return [subject for subject in found if not options.names or subject.name in options.names]


def main() -> int:
    """Measure, compare, write; returns the exit status."""
    options = arguments()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1"}  # of the fresh processes, too
    known = methods.available()
    for label in [label for label in options.ours if label.partition(":")[0] not in known]:
        print(f"skipped {label}: there is no such method yet", file=sys.stderr)
        options.ours.remove(label)
    store = Store(options.work / "results")
    for contender in options.fresh:
        shutil.rmtree(store.directory / identity(contender), ignore_errors=True)
    tables = []
    for subject in subjects(options):
        if not options.report:
            measure(subject, options, store)
        tables.append({"model": subject.name, "dense": subject.perplexity({}), "rows": compared(subject, options, store)})
    contenders = [*options.ours, *options.peers]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quant_vs_peers.json").write_text(json.dumps({"behind": behind(tables), "models": tables}, indent=1) + "\n")
    (options.out / "quant_vs_peers.md").write_text(markdown(tables, contenders))
    print(markdown(tables, contenders))
    return 1 if behind(tables) else 0


if __name__ == "__main__":
    sys.exit(main())
