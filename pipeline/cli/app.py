"""The `xkd-pipeline` command: one thin command per stage. Heavy libraries are imported inside the commands."""

import errno
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipeline import __version__, console, interrupts
from pipeline.cli import options
from pipeline.cli.cache import cache
from pipeline.cli.listing import Form
from pipeline.cli.options import HERE, command, described, load, placed, protect_default, require_unicode
from pipeline.cli.tools import tools
from pipeline.errors import Interrupted, UserError, reason_of
from pipeline.layout import Layout, sibling
from pipeline.params import Role
from pipeline.streams import STDOUT

LEFT_OUT = 3  # exit code: done, but more rows were left out than generate.max_skipped allows
_TINY_WEIGHTS = 64 * 2**20

app = typer.Typer(
    name="xkd-pipeline",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Offline knowledge distillation: run the teacher [bold]once[/bold], keep what it said, distil as often as you "
        "like.\n\nThe stages in order: [cyan]prepare[/cyan], [cyan]teach[/cyan], [cyan]generate[/cyan], "
        "[cyan]score[/cyan], [cyan]reward[/cyan], [cyan]distill[/cyan], [cyan]evaluate[/cyan], "
        "[cyan]report[/cyan]. [cyan]dvc repro[/cyan] runs them all."
    ),
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()
    require_unicode(sys.argv[1:])
    console.quiet_libraries()


@command(
    app,
    "xkd-pipeline prepare",
    "xkd-pipeline prepare --set prepare.task=summarisation --out other/prompts.parquet --tokenizer other/tokenizer",
)
def prepare(
    ctx: typer.Context,
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    out: Annotated[Path | None, placed("prompts", "--out", "Prompt file to write.")] = None,
    tokenizer_out: Annotated[Path | None, placed("tokenizer", "--tokenizer", "Tokenizer folder to write.")] = None,
    root: options.Root = HERE,
) -> None:
    """Draw prompts with references in disjoint splits, from a built-in task or a data set, and make their tokenizer."""
    loaded, layout = load(params, set, root), Layout(root)
    results = layout.results("prepare") if out == layout.prompts else None
    protect_default(ctx, "out", out, results)
    protect_default(ctx, "tokenizer_out", tokenizer_out)
    from stages.prepare import prepare as run

    run(loaded, out, tokenizer_out, results)


@command(app, "xkd-pipeline teach teacher", "xkd-pipeline teach student --set teach.student.pairs=200 --out start")
def teach(
    ctx: typer.Context,
    role: Annotated[Role, typer.Argument(help="Which model to make.")],
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    prompts: options.Prompts = None,
    tokenizer: Annotated[Path | None, placed("tokenizer", "--tokenizer", "Tokenizer folder.")] = None,
    out: Annotated[Path | None, described("--out", help="Model folder.", default="data/models/ROLE")] = None,
    runs: options.Runs = None,
    root: options.Root = HERE,
) -> None:
    """Make the teacher, or the student's starting point: new, or from a base, cut to fewer layers, fine-tuned."""
    loaded, layout = load(params, set, root), Layout(root)
    results = None if out else layout.results("teach", role)
    out = out or layout.model(role)
    protect_default(ctx, "out", out, results)
    from stages.teach import teach as run

    run(loaded, role, prompts, tokenizer, out, runs, results)


@command(
    app,
    "xkd-pipeline generate",
    "xkd-pipeline generate --teacher path/to/model --prompts questions.jsonl --samples 4 -k 32 --out cache",
    "xkd-pipeline generate --responses answers.jsonl --engine text --out answers",
    "xkd-pipeline generate --dry-run",
    "xkd-pipeline generate --dry-run --json",
    "xkd-pipeline generate --dry-run --teacher folder/with/config --tokens 1e9 -k 32 --rate 2500 --gpus 64",
)
def generate(
    ctx: typer.Context,
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="PATH_OR_HUB_NAME", help="The teacher.")] = None,
    prompts: options.Prompts = None,
    out: Annotated[Path | None, placed("selection", "--out", "Folder for this experiment's selection.")] = None,
    results: Annotated[
        Path | None,
        described(help="File for the run's results and costs.", default="data/generate/results.json, else none"),
    ] = None,
    answers: Annotated[
        Path | None,
        described(
            help="Folder for the teacher's answers to the test prompts, which evaluate reads.",
            default="data/answers with the default --out, else none",
        ),
    ] = None,
    store: options.Store = None,
    engine: Annotated[str | None, typer.Option(help="auto, vllm, hf, ray, stub or text.")] = None,
    responses: Annotated[
        str | None, typer.Option(help="Responses made elsewhere (.jsonl, .parquet): scored, not sampled.")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", "-n", help="Responses per training prompt.")] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", help="Tokens kept per position.")] = None,
    support: Annotated[str | None, typer.Option(help="Which tokens: sampled (an unbiased draw) or topk.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest response.")] = None,
    template: Annotated[str | None, typer.Option(help="What the teacher reads, with {prompt} in it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what is cached, what is missing and what that takes.")
    ] = False,
    tokens: options.Tokens = None,
    rate: options.Rate = None,
    gpus: options.Gpus = None,
    gpu_memory: options.GpuMemory = None,
    as_json: options.AsJson = False,
    as_csv: options.AsCsv = False,
    retry_skipped: options.Retry = False,
    root: options.Root = HERE,
) -> None:
    """Run the teacher on what the store does not hold yet, and select this experiment's rows.

    Every answer is kept in plain Parquet files in the store and never asked for twice: not by a rerun, not after
    a crash, not by another experiment. Exit code 3: rows were left out (see generate.max_skipped).
    """
    chosen = {
        "generate.teacher": teacher, "generate.engine": engine, "generate.samples": samples, "generate.k": k,
        "generate.support": support, "generate.responses": responses,
        "generate.temperature": temperature, "max_tokens": max_tokens, "template": template,
    }  # fmt: skip
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in chosen.items() if value is not None}
    overrides = [*(set or []), *(f"{key}={value}" for key, value in quoted.items())]
    loaded, layout = load(params, overrides, root), Layout(root)
    assumptions = {"tokens": tokens, "rate": rate, "gpus": gpus, "memory": gpu_memory}
    assumed = {name: value for name, value in assumptions.items() if value is not None}
    if assumed and not dry_run:
        raise UserError("--tokens, --rate, --gpus and --gpu-memory are for planning: add --dry-run")
    form = Form.of(as_json, as_csv)
    if form is not Form.TEXT and not dry_run:
        raise UserError("--json and --csv print what a dry run finds: add --dry-run")
    own = out == layout.selection
    default = layout.results("generate") if results is None and own else None
    default_answers = layout.answers if answers is None and own else None
    answers = answers or default_answers
    if not dry_run:
        protect_default(ctx, "out", out, default, default_answers)
    _limit_threads(loaded.generate.teacher)
    if dry_run:
        from pipeline.cli.dry_run import Assumptions
        from pipeline.cli.dry_run import dry_run as run_dry

        summary = run_dry(loaded, prompts, store, retry_skipped, Assumptions(**assumed), form, answers is not None)
    else:
        from stages.generate import generate as run

        summary = run(loaded, prompts, out, store, retry_skipped, results=results or default, answers=answers)
    _require_few_skipped(summary.skipped, loaded.generate.max_skipped)


@command(app, "xkd-pipeline score", "xkd-pipeline score --set score.validation_samples=16 --out scored")
def score(
    ctx: typer.Context,
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    prompts: options.Prompts = None,
    student: options.Student = None,
    out: Annotated[Path | None, placed("scored", "--out", "Folder for the scored responses.")] = None,
    samples_out: Annotated[
        Path | None,
        described(
            "--samples",
            help="Folder for the student's samples as it drew them, which keeps them in the store.",
            default="data/samples with the default --out, else none",
        ),
    ] = None,
    store: options.Store = None,
    retry_skipped: options.Retry = False,
    root: options.Root = HERE,
) -> None:
    """Have the teacher score references, corrupted references and the student's samples, into the same store.

    The objective sft learns references; the others are negatives for the reward's fit and for its audit.
    """
    loaded, layout = load(params, set, root), Layout(root)
    own = out == layout.scored
    results, default_samples = (layout.results("score"), layout.samples) if own else (None, None)
    protect_default(ctx, "out", out, results, None if samples_out else default_samples)
    _limit_threads(loaded.generate.teacher)
    from stages.score import score as run

    samples_out = samples_out or default_samples
    summary = run(loaded, prompts, student, out, store, retry_skipped, results=results, samples=samples_out)
    _require_few_skipped(summary.skipped, loaded.generate.max_skipped)


class LeftOut(UserError):
    """The run finished, but left some rows out."""


def _require_few_skipped(skipped: int, most: int) -> None:
    if skipped > most:
        raise LeftOut(
            f"{skipped} rows were left out (generate.max_skipped is {most}); the rest is cached. Shorten their "
            "prompts, or raise generate.max_skipped"
        )


def _scored(option: Path | None, selection: Path, student: Path, layout: Layout) -> Path | None:
    """`--scored`, else the pipeline's own if it exists and selection and student are the pipeline's own too."""
    own = (selection, student) == (layout.selection, layout.start) and _is_written(layout.scored)
    return layout.scored if option is None and own else option


def _is_written(selection: Path) -> bool:
    from pipeline.store.manifest import MANIFEST

    return (selection / MANIFEST).is_file()


def _limit_threads(teacher: str) -> None:
    """One thread for tiny teachers on a CPU: with more, vLLM mostly waits (4 times slower on 2 cores).

    Must run before torch is imported; an OMP_NUM_THREADS of the user's stays.
    """
    from pipeline.models.loading import resolve

    folder = Path(resolve(teacher))
    weights = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    if weights and sum(file.stat().st_size for file in weights) < _TINY_WEIGHTS:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@command(app, "xkd-pipeline reward", "xkd-pipeline reward --set reward.sigma_min=0.5 --out floor")
def reward(
    ctx: typer.Context,
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    selection: options.Selection = None,
    student: options.Student = None,
    out: Annotated[Path | None, placed("reward", "--out", "Folder for the fitted reward.")] = None,
    audit: Annotated[Path | None, described(help="Folder for its audit.", default="data/audit, else OUT-audit")] = None,
    store: options.Store = None,
    runs: options.Runs = None,
    scored: options.Scored = None,
    prompts: options.Prompts = None,
    root: options.Root = HERE,
) -> None:
    """Fit the reward that explains the cached teacher, and audit it on held-out prompts."""
    loaded, layout = load(params, set, root), Layout(root)
    # a reward that is not the pipeline's own does not write over its audit
    default = layout.audit if out == layout.reward else sibling(out, "audit")
    protect_default(ctx, "out", out, None if audit else default)
    from stages.reward import reward as run

    scored = _scored(scored, selection, student, layout)
    run(loaded, selection, student, out, audit or default, runs, store, scored, prompts if scored else None)


@command(
    app,
    "xkd-pipeline distill",
    "xkd-pipeline distill --set distill.objective=jsd --set distill.reward=none --out data/plain",
)
def distill(
    ctx: typer.Context,
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    selection: options.Selection = None,
    student: options.Student = None,
    reward: Annotated[
        Path | None, placed("reward", "--reward", "Fitted reward, for distill.reward frozen, joint and shuffled.")
    ] = None,
    out: Annotated[
        Path | None, described(help="Folder for the student.", default="data/student, or data/plain")
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Train the baseline: the same loss without the X term, if distill.plain is true."),
    ] = False,
    metrics: Annotated[
        Path | None, described(help="Folder for metrics and curves.", default="data/distill, else OUT-metrics")
    ] = None,
    prompts: options.Prompts = None,
    rounds: Annotated[
        Path | None,
        described(
            help="Folder for the student's samples of distill.on_policy, as the teacher scored them.",
            default="data/rounds, else OUT-rounds where there are any",
        ),
    ] = None,
    store: options.Store = None,
    runs: options.Runs = None,
    scored: options.Scored = None,
    root: options.Root = HERE,
) -> None:
    """Train the student on the cached teacher. Killed and started again, it goes on from its last checkpoint."""
    loaded, layout = load(params, [*(set or []), "distill.reward=none"] if plain else set, root), Layout(root)
    out = out or (layout.plain if plain else layout.student)
    # a student that is not the pipeline's own does not write over its metrics
    default = layout.distillation if out == layout.student else sibling(out, "metrics")
    own = {layout.student: layout.rounds, layout.plain: layout.plain_rounds}.get(out)
    protect_default(ctx, "out", out, None if metrics else default, None if rounds else own)
    from stages.distill import distill as run
    from stages.distill import leave_out

    if plain and not loaded.distill.plain:
        return leave_out(out, metrics or default, rounds or own)
    scored = _scored(scored, selection, student, layout)
    run(loaded, selection, student, reward, out, metrics or default, runs, store, scored, prompts, rounds or own)


@command(
    app,
    "xkd-pipeline evaluate",
    "xkd-pipeline evaluate --model plain=data/plain --model x=data/student --out data/comparison",
)
def evaluate(
    ctx: typer.Context,
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    prompts: options.Prompts = None,
    selection: options.Selection = None,
    model: Annotated[
        list[str] | None,
        described(
            metavar="NAME=FOLDER", help="Model to score, repeatable; the last is compared with the others.",
            default="teacher, undistilled, plain and distilled student",
        ),
    ] = None,
    out: Annotated[Path | None, placed("evaluation", "--out", "Folder for metrics and answers.")] = None,
    answers: Annotated[
        Path | None,
        described(
            help="The teacher's cached answers to the test prompts (out of generate).",
            default="data/answers if it exists, with the default --selection",
        ),
    ] = None,
    store: options.Store = None,
    root: options.Root = HERE,
) -> None:  # fmt: skip
    """Score models side by side on the test prompts, with intervals paired over the prompts."""
    loaded, layout = load(params, set, root), Layout(root)
    models: dict[str, str | Path] = {"teacher": loaded.generate.teacher, "undistilled": layout.start}
    models |= {"plain": layout.plain} if (layout.plain / "config.json").is_file() else {}
    models |= {"distilled": layout.student}
    if model:
        models = {}
        for entry in model:
            name, mark, folder = entry.partition("=")
            if not (name and mark and folder):
                raise UserError(f"--model {entry}: expected NAME=FOLDER")
            models[name] = Path(folder)
    protect_default(ctx, "out", out)
    from stages.evaluate import evaluate as run

    if answers is None and selection == layout.selection and _is_written(layout.answers):
        answers = layout.answers
    run(loaded, prompts, models, selection, out, store, answers)


@command(
    app,
    "xkd-pipeline report",
    "xkd-pipeline report --also jsd --also other/data --out comparison.html",
    "xkd-pipeline report --set report.samples=20 --out report.html",
)
def report(
    ctx: typer.Context,
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    data: Annotated[Path | None, placed("data", "--data", "Folder that the stages filled.")] = None,
    out: Annotated[Path | None, placed("report", "--out", "Page to write.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RESULT",
            help="Folder with results, DVC experiment or git revision whose students are shown beside; repeatable.",
        ),
    ] = None,
    store: options.Store = None,
    root: options.Root = HERE,
) -> None:
    """Write one self-contained HTML page about an experiment: tables, curves, rewarded tokens, samples, costs."""
    loaded = load(params, set, root)
    protect_default(ctx, "out", out)
    from stages.report import report as run

    run(loaded.report, Layout(root, data), out, store, also or ())


_STAGES = {command.callback.__name__ for command in app.registered_commands if command.callback}
app.registered_commands += tools.registered_commands
app.add_typer(cache)


def main() -> None:
    """Run the command line; a UserError becomes a short message and exit code 2 (3 for rows left out).

    Ctrl-C, SIGTERM and SIGHUP end it in order, with exit code 130, 143 and 129, after writing what was made so far.
    """
    interrupts.install()
    if console.PLAIN:
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM, rich_utils.FORCE_TERMINAL = None, False
    sys.exit(_exit_code())  # after all handlers, so that what an error holds (loaders with processes) is freed


def _exit_code() -> int:
    try:
        return _run()
    except UserError as error:
        _say_error(str(error))
        return LEFT_OUT if isinstance(error, LeftOut) else 2
    except Interrupted as error:
        console.warn(f"interrupted. {error.kept}")
        return 128 + error.signal
    except Exception as error:
        if number := interrupts.noted():  # the signal broke something, such as a library's process that got it too
            console.warn(f"interrupted ({reason_of(error)}). {interrupts.interrupted().kept}")
            return 128 + number
        if not isinstance(error, OSError) or error.filename is None:
            raise
        _say_error(f"{error.filename}: {error.strerror}")
        return 2


def _say_error(message: str) -> None:
    console.console.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)


def _run() -> int:
    """The exit code of the command; 1 where its output was not read to the end."""
    code, together = 0, False
    with suppress(OSError):  # one of them was closed from the start
        together = os.path.sameopenfile(1, 2)
    try:
        interrupts.begin()
        app()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        code = int(ended.code or 0)
    finally:
        interrupts.end()
    STDOUT.flush()
    lost = STDOUT.failure
    if lost is None or lost.errno == errno.EIO:  # the terminal is gone; the run goes on
        return code
    if lost.errno != errno.EPIPE:
        console.warn(f"could not print everything on stdout: {lost.strerror}")
    elif together:  # the reader of both has seen enough
        return code
    # The output of a stage is its files.
    is_stage = next((word for word in sys.argv[1:] if not word.startswith("-")), "") in _STAGES
    return code if is_stage else code or 1
