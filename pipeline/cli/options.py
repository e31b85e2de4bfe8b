"""The options that several commands share, and the experiment's folder, in which their defaults lie."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipeline.errors import UserError, is_printable, shown
from pipeline.layout import Layout
from pipeline.params import Params
from pipeline.params.file import load_params

# Options that do not change what is made, or only say where it goes.
_NO_INPUTS = {
    "root", "plain", "store", "runs", "retry_skipped",
    "out", "tokenizer_out", "metrics", "audit", "results", "answers", "samples_out",
}  # fmt: skip


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


def described(*names: str, help: str, default: str, **settings) -> typer.models.OptionInfo:
    """An option whose help says what holds without it."""
    return typer.Option(*names, help=f"{help}  [dim]default: {default}[/dim]", **settings)


def placed(name: str, option: str, help: str) -> typer.models.OptionInfo:
    """An option whose default is the path `name` of the layout in `--root`."""
    return described(
        option,
        help=help,
        default=getattr(Layout(), name),
        callback=lambda ctx, value: value or getattr(Layout(ctx.params["root"]), name),
    )


Root = Annotated[
    Path,
    typer.Option(
        "--root",
        is_eager=True,  # read before the others, whose defaults lie in it
        help="Folder of the experiment, with its data/, runs/ and params.yaml.",
        show_default="the current folder",
    ),
]
HERE = Path()
ParamsFile = Annotated[
    Path | None, described("--params", help="Parameter file, may be partial.", default="params.yaml if it exists")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one parameter; repeatable.")
]
Store = Annotated[
    str | None,
    described(
        "--store", metavar="FOLDER_OR_URL", help="Teacher store.", default="$XKD_STORE, else the user's cache directory"
    ),
]
Prompts = Annotated[
    Path | None,
    placed("prompts", "--prompts", "Prompt file (.parquet or .jsonl): prompt, and optionally id, references, split."),
]
Runs = Annotated[Path | None, placed("runs", "--runs", "Checkpoints of unfinished training.")]
Selection = Annotated[Path | None, placed("selection", "--selection", "Cached teacher (out of generate).")]
Scored = Annotated[
    Path | None,
    described(
        "--scored",
        help="Scored responses (out of score).",
        default="data/scored if it exists, with the default selection and student",
    ),
]
Student = Annotated[Path | None, placed("start", "--student", "The student's starting point.")]
Retry = Annotated[bool, typer.Option("--retry-skipped", help="Try rows again that were left out before.")]
Tokens = Annotated[
    float | None,
    typer.Option(
        callback=_finite, min=1, help="With --dry-run: response tokens to plan for, instead of a prompt file."
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(callback=_finite, min=0.01, help="With --dry-run: response tokens per second and GPU, for GPU-hours."),
]
Gpus = Annotated[
    int | None, described("--gpus", min=1, help="With --dry-run: number of GPUs.", default="those of one teacher")
]
GpuMemory = Annotated[
    float | None, described("--gpu-memory", callback=_finite, min=1, help="With --dry-run: GiB per GPU.", default="80")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else on stdout: numbers as numbers, sizes in bytes.")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV, likewise: a line of names, then one line per row.")]


def require_unicode(arguments: Iterable[str]) -> None:
    """Raises UserError for an argument or a folder whose name is not UTF-8: our files could not hold it."""
    places = [*arguments, os.environ.get("XKD_STORE", ""), os.getcwd()]
    if bad := next((text for text in places if not is_printable(text)), None):
        raise UserError(f"{shown(bad)} is not valid UTF-8: give it another name, or write it in UTF-8")


def load(params: Path | None, overrides: list[str] | None, root: Path) -> Params:
    """A command's parameters: its file, else the root's, changed by `--set`; the default teacher is in the root."""
    loaded = load_params(file_of(params, root), overrides or [])
    if loaded.generate.teacher == str(Layout().teacher):
        loaded.generate.teacher = str(Layout(root).teacher)
    return loaded


def file_of(params: Path | None, root: Path) -> Path | None:
    """The parameter file of a command, if there is one: the option's, else the root's."""
    own = Layout(root).params
    return own if params is None and own.exists() else params


def protect_default(ctx: typer.Context, output: str, path: Path, *beside: Path | None) -> None:
    """Raises UserError where a command with inputs of the user's would replace what is at an output's default place.

    A user who names the output may replace it. output: its parameter, and `path` its value; beside: other defaults that
    follow it.
    """
    options = {parameter.name: parameter for parameter in ctx.command.params if parameter.param_type_name == "option"}
    typed = [name for name in options if ctx.get_parameter_source(name).name == "COMMANDLINE"]
    if output in typed:
        return
    changed = [each for name in typed if name not in _NO_INPUTS for each in _as_typed(options[name], ctx.params[name])]
    there = next((place for place in (path, *beside) if place and _holds_something(place)), None)
    if changed and there is not None:
        option, kind = options[output].opts[0], "FILE" if path.suffix else "FOLDER"
        raise UserError(
            f"{there} holds an earlier result, and this command was given other inputs ({', '.join(changed)}): add "
            f"{option} {kind}, or {option} {path} to replace it"
        )


def _as_typed(parameter, value) -> list[str]:
    """An option with each of its values, as on the command line."""
    return [f"{parameter.opts[0]} {each}" for each in (value if isinstance(value, list | tuple) else [value])]


def _holds_something(path: Path) -> bool:
    return any(name != ".gitignore" for name in os.listdir(path)) if path.is_dir() else path.exists()


def command(app: typer.Typer, *examples: str) -> Callable:
    """Makes a function a command of `app`, whose help ends with examples."""
    lines = "\n\n".join(f"[cyan]{escape(example)}[/cyan]" for example in examples)
    return app.command(epilog=f"[bold]Examples[/bold]\n\n{lines}")
