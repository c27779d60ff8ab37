"""The command line: a thin layer over the library. Exit codes: 0 done, 1 failed, 2 bad input, 3 a gate missed."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any
from unicodedata import category

import typer
import typer.core

from compress.errors import BadInput, CompressError, GateMissed


class _Interrupted(Exception):
    """Control-C, under a name that no version of typer handles in its own way."""


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress a Hugging Face causal language model: quantize, prune, factorise, distil, in any order; then prove it.",
)

Model = Annotated[str | None, typer.Argument(help="a checkpoint directory, a hub id, or `demo`", show_default=False)]
Passes = Annotated[list[str] | None, typer.Argument(help="`name:key=value,key=value`, in order", show_default=False)]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="a YAML recipe, or the name of a preset")]
CalibrationOption = Annotated[str | None, typer.Option(help=".txt, .jsonl, .parquet or hub dataset; default: bundled text")]
Column = Annotated[str | None, typer.Option(help="the text's column in that data")]
BeginOption = Annotated[
    str | None,
    typer.Option("--begin", help="where windows begin: anywhere in joined text, or only where documents do [anywhere]"),
]
Samples = Annotated[int | None, typer.Option(help="calibration windows [128]")]
Length = Annotated[int | None, typer.Option(help="tokens per window [512]")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks, comma-separated")]
Include = Annotated[list[str] | None, typer.Option(help="directory of local lm-eval YAML tasks; repeatable")]
Limit = Annotated[int | None, typer.Option(help="questions per task")]
Shots = Annotated[int | None, typer.Option("--n-shot", help="examples in the prompt [what each task says]")]
BatchSize = Annotated[str | None, typer.Option(help="of the tasks, or auto [8]")]
Data = Annotated[Path | None, typer.Option("--data", help="directory of local data sets for lm-eval's own tasks")]
TaskSeed = Annotated[int | None, typer.Option(help="seed of the tasks [lm-eval's own]")]
LogSamples = Annotated[bool, typer.Option("--log-samples", help="write what lm-eval logs of each question under samples/")]
StreamedOption = Annotated[
    bool | None, typer.Option("--streamed/--resident", help="measure block by block [where the model does not fit into memory]")
]
MinRecovery = Annotated[float | None, typer.Option(help="gate: share of the base's score that must be kept, such as 0.97")]
MaxBytes = Annotated[str | None, typer.Option(help="gate: largest weight files, such as 2.5GB")]
MaxKL = Annotated[float | None, typer.Option("--max-kl", help="gate: largest mean divergence from the base, nats per token")]
MaxFlips = Annotated[float | None, typer.Option(help="gate: largest share of answers that go from right to wrong")]
Junit = Annotated[Path | None, typer.Option("--junit", help="write gates and tasks as a JUnit file, for CI")]
Track = Annotated[str | None, typer.Option("--track", help="record in an experiment tracker: mlflow")]
References = Annotated[
    list[Path] | None, typer.Option("--reference", help="measured dense model of a family, for densities; repeatable")
]
TrainingTokens = Annotated[
    str | None, typer.Option(help="that the base model was trained on, such as 15T: says what low bits cost it [unknown]")
]
Seed = Annotated[int | None, typer.Option(help="seed of sampling and training [0]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [cpu]")]
Dtype = Annotated[str | None, typer.Option(help="of forward passes: auto, float32, bfloat16, float16 [auto]")]
Effort = Annotated[str | None, typer.Option(help="how hard methods try: fast, default or best [default]")]
Json = Annotated[bool, typer.Option("--json", help="print the result as one JSON object")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing output")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="let the source run its own code")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="read pickled weights")]


def _recipe(model: str | None, passes: list[str] | None, recipe: str | None, **options: Any) -> Any:
    """The recipe of a command: a file or preset first, then what the command line says."""
    from compress.recipe import Recipe

    base = Recipe.load(recipe) if recipe else Recipe()
    if recipe and passes:
        raise BadInput("give passes on the command line or in --recipe, not both")
    content = {name: getattr(base, name) for name in Recipe.model_fields}
    if passes:
        content["passes"] = passes
    content["model"] = model or base.model
    for group in ("calibration", "evaluation"):
        own = {key: value for key, value in options.pop(group).items() if value is not None}
        if own:
            content[group] = dict(content[group] or {}) | own
    content |= {key: value for key, value in options.items() if value is not None}
    return Recipe.parse(content, recipe or "command line")


def _measuring(tasks: str | None, include: list[str] | None, limit: int | None, **more: Any) -> dict[str, Any]:
    """The evaluation's settings among a command's options."""
    data, references = more.pop("data", None), more.pop("references", None)
    return {
        "tasks": _split(tasks), "limit": limit, "include": tuple(include) if include else None,
        "task_data": str(data) if data else None,
        "references": tuple(map(str, references)) if references else None,
        "log_samples": more.pop("log_samples", None) or None,
        **more,
    }  # fmt: skip


def _split(tasks: str | None) -> tuple[str, ...] | None:
    if tasks is None:
        return None
    names = tuple(filter(None, (task.strip() for task in tasks.split(","))))
    if not names:
        raise BadInput(f"--tasks {tasks!r}: names no task")
    return names


@app.command("run")
def run_command(
    model: Model = None, passes: Passes = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="output directory")] = None,
    recipe: RecipeOption = None, calibration: CalibrationOption = None, column: Column = None, samples: Samples = None,
    length: Length = None, begin: BeginOption = None, tasks: Tasks = None, include: Include = None, limit: Limit = None,
    n_shot: Shots = None, batch_size: BatchSize = None, data: Data = None, task_seed: TaskSeed = None,
    log_samples: LogSamples = False, streamed: StreamedOption = None, reference: References = None,
    training_tokens: TrainingTokens = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="do not measure base and result")] = False,
    seed: Seed = None, device: Device = None, dtype: Dtype = None, effort: Effort = None, overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
    trust_remote_code: Trust = False, allow_pickle: Pickle = False,
    min_recovery: MinRecovery = None, max_bytes: MaxBytes = None, max_kl: MaxKL = None, max_flips: MaxFlips = None,
    junit: Junit = None, track: Track = None,
    push_to: Annotated[str | None, typer.Option("--push-to", help="upload the result to this repository of the HF Hub")] = None,
) -> None:  # fmt: skip
    """Compress MODEL with PASSES into a directory that stock tools load; measure it; chart what it cost."""
    from compress.gates import Gates
    from compress.handover import Handover
    from compress.pipeline import run
    from compress.processes import is_helper
    from compress.progress import Bar

    settings = _recipe(
        model, passes, recipe,
        calibration={"data": calibration, "samples": samples, "length": length, "column": column, "begin": begin},
        evaluation=_measuring(
            tasks, include, limit, n_shot=n_shot, batch_size=batch_size, data=data, task_seed=task_seed,
            log_samples=log_samples, streamed=streamed, references=reference, training_tokens=training_tokens, begin=begin,
        ),
        seed=seed, device=device, dtype=dtype, effort=effort, trust_remote_code=trust_remote_code or None,
        allow_pickle=allow_pickle or None,
    )  # fmt: skip
    if no_eval:
        settings = settings.model_copy(update={"evaluation": None})
    gates = Gates.typed(min_recovery, max_bytes, max_kl, max_flips)
    handover = Handover() if is_helper() else Handover(junit, track, push_to)
    try:
        with Bar("compress", enabled=not (quiet or is_helper())) as bar:
            result = run(settings, out=out, overwrite=overwrite, progress=bar, gates=gates)
    except GateMissed as missed:
        _say(handover.made(settings, missed.result), err=True)
        raise
    if is_helper():
        return
    typer.echo(json.dumps(result.summary()) if as_json else "\n".join(result.lines()))
    _say(handover.made(settings, result), err=as_json)


def _say(lines: Iterable[str], *, err: bool) -> None:
    for line in lines:
        typer.echo(_printable(line), err=err)


def _printable(text: str) -> str:
    """Names come from files that others wrote: they must not steer the terminal."""
    return "".join(sign if sign in "\n\t" or category(sign) not in ("Cc", "Cs") else "\ufffd" for sign in text)


@app.command("plan")
def plan_command(
    model: Model = None, passes: Passes = None, recipe: RecipeOption = None, calibration: CalibrationOption = None,
    column: Column = None, samples: Samples = None, length: Length = None, begin: BeginOption = None, tasks: Tasks = None,
    include: Include = None, limit: Limit = None, n_shot: Shots = None, batch_size: BatchSize = None, data: Data = None,
    task_seed: TaskSeed = None, log_samples: LogSamples = False, streamed: StreamedOption = None, reference: References = None,
    training_tokens: TrainingTokens = None, seed: Seed = None, device: Device = None, dtype: Dtype = None,
    effort: Effort = None, as_json: Json = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="ignored: a plan writes nothing")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="ignored: a plan measures nothing")] = False,
    trust_remote_code: Trust = False, allow_pickle: Pickle = False,
) -> None:  # fmt: skip
    """Say what a run would do, before any compute: layers, stages, bytes, tier, memory, time."""
    from compress.pipeline import plan

    settings = _recipe(
        model, passes, recipe,
        calibration={"data": calibration, "samples": samples, "length": length, "column": column, "begin": begin},
        evaluation=_measuring(
            tasks, include, limit, n_shot=n_shot, batch_size=batch_size, data=data, task_seed=task_seed,
            log_samples=log_samples, streamed=streamed, references=reference, training_tokens=training_tokens, begin=begin,
        ),
        seed=seed, device=device, dtype=dtype, effort=effort, trust_remote_code=trust_remote_code or None,
        allow_pickle=allow_pickle or None,
    )  # fmt: skip
    found = plan(settings)
    typer.echo(found.model_dump_json() if as_json else "\n".join(found.lines()))


@app.command("methods")
def methods_command(
    names: Annotated[list[str] | None, typer.Argument(help="of the methods to show [all]")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="the table of the README")] = False,
) -> None:
    """Show the taxonomy tree with methods, their options and defaults."""
    from compress import methods

    typer.echo(methods.markdown() if markdown else methods.tree(names or ()))


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="an artifact or any checkpoint")],
    base: Annotated[str | None, typer.Option(help="compare with this base model [the artifact's own, where it is found]")] = None,
    tasks: Tasks = None, include: Include = None, limit: Limit = None, n_shot: Shots = None, batch_size: BatchSize = None,
    begin: BeginOption = None, data: Data = None, task_seed: TaskSeed = None, log_samples: LogSamples = False,
    streamed: StreamedOption = None, reference: References = None, training_tokens: TrainingTokens = None,
    device: Device = None, dtype: Dtype = None, as_json: Json = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write metrics.json and report.html there")] = None,
    min_recovery: MinRecovery = None, max_bytes: MaxBytes = None, max_kl: MaxKL = None, max_flips: MaxFlips = None,
    junit: Junit = None, track: Track = None,
) -> None:  # fmt: skip
    """Measure any artifact or checkpoint: tasks, divergence from its base, size and speed."""
    from compress.checkpoint import resolve
    from compress.evaluation import evaluate_artifact
    from compress.gates import Gates, missed
    from compress.handover import Handover
    from compress.progress import Bar

    gates = Gates.typed(min_recovery, max_bytes, max_kl, max_flips)
    handover = Handover(junit, track)
    evaluation = _measuring(
        tasks, include, limit, n_shot=n_shot, batch_size=batch_size, data=data, task_seed=task_seed,
        log_samples=log_samples, streamed=streamed, references=reference, training_tokens=training_tokens, begin=begin,
    )  # fmt: skip
    settings = _recipe(None, None, None, calibration={}, evaluation=evaluation, device=device, dtype=dtype)
    with Bar("eval") as bar:
        report = evaluate_artifact(model, base, settings.evaluation, settings.device, settings.dtype, out, bar, gates=gates)
    typer.echo(report.dump() if as_json else _printable("\n".join(report.lines())))
    measured = (*report.points, report.base)[0]
    checked = gates.checked(measured.cost.bytes_on_disk, measured)
    _say(handover.measured(resolve(model), settings.evaluation, report, checked, out), err=as_json)
    if failure := missed(checked):
        raise GateMissed(failure)


@app.command("compare")
def compare_command(
    a: Annotated[str, typer.Argument(help="an artifact or metrics.json; #LABEL follows where that holds several models")],
    b: Annotated[str, typer.Argument(help="what to compare with it, likewise; #base: its base model")],
    as_json: Json = False,
    junit: Annotated[Path | None, typer.Option("--junit", help="write a test case for each task, for CI")] = None,
    not_worse: Annotated[bool, typer.Option("--not-worse", help="gate: exit with 3 where B is worse than A on a task")] = False,
) -> None:
    """Say whether two measured models differ, task by task, and by how much: paired intervals, flips, bytes, speed."""
    from compress.eval.junit import write_junit
    from compress.evaluation import compare_artifacts

    found = compare_artifacts(a, b)
    typer.echo(found.model_dump_json() if as_json else _printable("\n".join(found.lines())))
    if junit is not None:
        write_junit(junit, f"{b} against {a}", found.cases())
    if not_worse and found.worse:
        raise GateMissed(f"--not-worse: {b} is worse than {a} on {', '.join(found.worse)}")


@app.command("schema")
def schema_command() -> None:
    """Print the JSON schema of metrics.json."""
    from compress.eval.schema import metrics_schema

    typer.echo(metrics_schema(), nl=False)


@app.command("chart")
def chart_command(
    artifacts: Annotated[list[Path], typer.Argument(help="artifacts, or metrics.json files, of one base model")],
    out: Annotated[Path, typer.Option("-o", "--out", help="directory for report.html, chart.svg and chart.png")] = Path("report"),
    training_tokens: TrainingTokens = None,
) -> None:
    """Put the measurements of many runs into one chart and report."""
    from compress.evaluation import chart_artifacts

    typer.echo(str(chart_artifacts(artifacts, out, training_tokens)))


@app.command("verify")
def verify_command(
    artifact: Annotated[Path, typer.Argument(help="an artifact")],
    device: Device = None, as_json: Json = False,
    full: Annotated[bool, typer.Option("--full", help="open it with stock transformers whatever its size")] = False,
) -> None:  # fmt: skip
    """Reload an artifact in a fresh process: digests, structure, and logits must be what its manifest says."""
    from compress.verify import verify_artifact

    found = verify_artifact(artifact, device=device or "cpu", full=full or None)
    typer.echo(found.model_dump_json() if as_json else "\n".join(found.lines(artifact)))


@app.command("export")
def export_command(
    artifact: Annotated[Path, typer.Argument(help="an artifact")],
    to: Annotated[str, typer.Option("--to", help="awq, bitnet, decilm, dense, gptq, peft, gguf, or gguf:TYPE such as gguf:q4_0")],
    out: Annotated[Path, typer.Option("-o", "--out", help="output directory; for gguf a file")],
    overwrite: Overwrite = False,
) -> None:
    """Write an artifact in another format."""
    from compress import export

    typer.echo(str(export.to(to, artifact, out, overwrite=overwrite)))


@app.command("open")
def open_command(
    artifact: Annotated[Path, typer.Argument(help="an artifact of bitstack or nested")],
    out: Annotated[Path, typer.Option("-o", "--out", help="output directory")],
    size: Annotated[str | None, typer.Option(help="largest weight files, such as 1.2GB: as many parts as fit are opened")] = None,
    bits: Annotated[int | None, typer.Option(help="width of all codes, instead of a size: of nested")] = None,
    device: Device = None, overwrite: Overwrite = False, as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
) -> None:  # fmt: skip
    """Open an artifact at a size or width of your choice, without compressing again: compress open STORE --size 1.2GB -o OUT."""
    from compress.opening import open_stack
    from compress.progress import Bar

    with Bar("open", enabled=not quiet) as bar:
        result = open_stack(
            artifact, out, size=size, bits=bits, overwrite=overwrite, device=device or "cpu", progress=bar
        )  # fmt: skip
    typer.echo(json.dumps(result.summary()) if as_json else "\n".join(result.lines()))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("-o", "--out", help="output directory")] = Path("compress-demo"),
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
    as_json: Json = False,
) -> None:
    """Compress the bundled model in a dozen ways and chart size against accuracy; minutes on two CPU cores."""
    from compress.demo.tour import tour
    from compress.progress import Bar

    with Bar("demo", enabled=not quiet) as bar:
        report = tour(out, bar)
    if as_json:
        typer.echo(json.dumps({"report": str(report)}))
    else:
        typer.echo(f"Open {report}")


@app.callback()
def _options(verbose: Annotated[bool, typer.Option("--verbose", help="log what happens to stderr")] = False) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    for noisy in ("httpx", "datasets", "fsspec", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> None:
    """Entry point of the ``compress`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except GateMissed as error:
        _fail("gate missed", error, 3)
    except BadInput as error:
        _fail("error", error, 2)
    except CompressError as error:
        _fail("failed", error, 1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _fail("error", f"{error.strerror}: {error.filename or 'output'}; make room, then run the same command to resume", 2)
        logging.getLogger(__name__).info("where it failed:", exc_info=True)
        _fail("failed", error, 1)
    except _Interrupted:
        _fail("interrupted", "run the same command again to resume", 130)


def _fail(kind: str, message: object, code: int) -> None:
    typer.echo(_printable(f"{kind}: {message}"), err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
