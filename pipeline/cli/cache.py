"""`xkd-pipeline cache ...`: list the teacher store, verify it, remove what nobody uses, export from it."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import console
from pipeline.cli import options
from pipeline.cli.cache_listings import FILE_COLUMNS, SHARD_COLUMNS, USER_COLUMNS, describe, request_columns, say_user
from pipeline.cli.listing import Form, Listing, shown
from pipeline.cli.options import HERE, command, described, placed
from pipeline.layout import Layout

cache = typer.Typer(
    name="cache",
    no_args_is_help=True,
    help="Look at the teacher store: what it holds, whether it is whole, what can go, and how to take it elsewhere.",
)

RequestArgument = Annotated[
    str, typer.Argument(metavar="[REQUEST]", help="Only requests whose TEACHER/REQUEST begins like this.")
]


@command(
    cache, "xkd-pipeline cache ls", "xkd-pipeline cache ls --store s3://bucket/teachers", "xkd-pipeline cache ls --json"
)
def ls(
    request: RequestArgument = "",
    store: options.Store = None,
    root: options.Root = HERE,
    as_json: options.AsJson = False,
    as_csv: options.AsCsv = False,
) -> None:
    """List the requests in the store: who was asked what, how much is there."""
    form = Form.of(as_json, as_csv)
    from pipeline.store.requests import open_store
    from pipeline.upkeep.catalogue import catalogue

    storage = open_store(store)
    requests = list(catalogue(storage, request))
    listing = Listing(request_columns(), requests)
    if form is not Form.TEXT:
        return listing.write(form)
    if not requests:
        return console.result(f"{storage.name} holds nothing{f' that begins with {request}' if request else ''}")
    listing.show(f"teacher store {storage.name}")
    total = sum(info.size for info in requests)
    console.result(f"{len(requests)} requests, {sum(info.rows for info in requests):,} rows, {console.size(total)}")


@command(cache, "xkd-pipeline cache show 3f2a", "xkd-pipeline cache show 3f2a --csv")
def show(
    request: Annotated[str, typer.Argument(help="The beginning of a request's name, or of its identity.")],
    store: options.Store = None,
    root: options.Root = HERE,
    as_json: options.AsJson = False,
    as_csv: options.AsCsv = False,
) -> None:
    """Show one request: its teacher, what was asked, engines and versions, every shard, and who uses it.

    CSV lists the shards only.
    """
    form = Form.of(as_json, as_csv)
    from pipeline.store.kept_mass import kept_mass_warning, say_kept_mass
    from pipeline.store.requests import open_store
    from pipeline.store.users import users_of
    from pipeline.upkeep.catalogue import catalogue, find_request, kept_masses, to_json

    storage = open_store(store)
    name = find_request(storage, request)
    (info,) = [info for info in catalogue(storage, name) if info.name == name]
    masses = [] if form is Form.CSV else kept_masses(storage, info)  # CSV lists the shards only
    users = [user for user in users_of(storage)[0] if name in (f"{user.teacher}/{each}" for each in user.requests)]
    shards = Listing(SHARD_COLUMNS, sorted(info.shards, key=lambda shard: shard.modified or 0.0))
    if form is not Form.TEXT:
        described = describe(info, storage, users) | {"kept_mass": [kept for kept, _ in masses]}
        return shards.write(form, "shards", described)
    console.facts(
        name,
        [
            ("store", storage.name),
            ("rows", f"{info.rows:,}"),
            ("tokens", f"{info.tokens:,}"),
            ("size", console.size(info.size)),
            ("kept", shown(info.kept)),
            *((f"mass of {kept['support']} {kept['k']}", f"{say_kept_mass(kept)} ({of})") for kept, of in masses),
            ("left out", f"{info.skipped:,} rows (skipped.jsonl)"),
            ("damaged", f"{info.damaged} set aside, {len(info.unreadable)} unreadable {' '.join(info.unreadable)}"),
            *((("waiting", f"{info.waiting} shards that {storage.name} does not have yet"),) if info.waiting else ()),
            *(("made by", f"{engine or 'unknown'}: {rows:,} rows") for engine, rows in info.engines.items()),
            *(("used by", say_user(user)) for user in users),
        ],
    )
    if masses and (warning := kept_mass_warning(masses[-1][0])):  # the last: samples if any, else the largest k
        console.warn(warning)
    console.result(f"teacher {to_json(info.teacher)}")
    console.result(f"request {to_json(info.request)}")
    shards.show("shards")


@command(cache, "xkd-pipeline cache verify", "xkd-pipeline cache verify --selection data/teacher --dry-run")
def verify(
    request: RequestArgument = "",
    store: options.Store = None,
    selection: Annotated[
        list[Path] | None,
        described(
            help="Selection to verify beside the store, repeatable.",
            default=f"{', '.join(map(str, Layout().selections))}, those that exist",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is wrong; move nothing.")] = False,
    root: options.Root = HERE,
) -> None:
    """Read every byte and every row, and set aside what is damaged: `generate` then makes exactly that again.

    Exit code 1: there are problems.
    """
    from pipeline.store.manifest import holds_selection
    from pipeline.store.requests import open_store
    from pipeline.upkeep.catalogue import files_by_request
    from pipeline.upkeep.verify import verify_selection, verify_store

    storage = open_store(store)
    total = sum(map(len, files_by_request(storage, request).values()))
    with console.progress("verifying", total) as advance:
        problems = list(verify_store(storage, request, not dry_run, advance))
    selections = selection or [folder for folder in Layout(root).selections if holds_selection(folder)]
    for folder in selections:
        problems += verify_selection(folder, store, not dry_run)
    verified = f"{total:,} files of {storage.name}" + "".join(f", {folder}" for folder in selections)
    if not problems:
        well = f"all is well: {verified}" if total or selections else f"nothing to verify: {storage.name} is empty"
        return console.result(well)
    for problem in problems:
        state = " (set aside)" if problem.aside else ""
        console.result(f"{problem.file}: {problem.what}{state}. Then: {problem.repair}")
    console.result(f"{len(problems)} problems in {verified}")
    raise typer.Exit(1)


@command(
    cache,
    "xkd-pipeline cache gc",
    "xkd-pipeline cache gc --keep ../other/data/teacher --yes",
    "xkd-pipeline cache gc --forget /old/data/teacher",
)
def gc(
    store: options.Store = None,
    keep: Annotated[
        list[Path] | None,
        typer.Option(help="Another selection whose rows are kept (one that came from elsewhere); repeatable."),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SELECTION",
            help="Selection that no longer keeps its rows, named as in the list; `all`: every one that is not at its "
            "place any more; repeatable.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    root: options.Root = HERE,
) -> None:
    """Show what no selection refers to, and remove it once you agree.

    The store records every selection that is made from it. Kept are the rows that a selection reads; whole requests for
    an unfinished run, a selection on another machine or one that is not at its place (deleted, moved, on a disk that is
    not mounted); and what is being written. `--forget` gives a selection up.
    """
    from pipeline.store.manifest import MANIFEST
    from pipeline.store.requests import open_store
    from pipeline.store.users import named, users_of
    from pipeline.upkeep.collect import garbage, in_use

    storage = open_store(store)
    own = [folder for folder in Layout(root).selections if (folder / MANIFEST).is_file()]
    selections = [*own, *(keep or [])]
    forgotten = named(users_of(storage)[0], forget or [])
    absent = [user for user in forgotten if user.absent]
    used = in_use(storage, selections, forgotten)
    files = list(garbage(storage, used))
    kept = sorted({*map(say_user, used.kept), *map(str, selections)})
    console.result(f"kept is what these refer to: {', '.join(kept) or 'nothing is known to refer to this store'}")
    if used.absent:
        title = "selections that are not at their place; `--forget SELECTION` gives one up, `--forget all` all of them"
        Listing(USER_COLUMNS, used.absent).show(title)
    if not files:
        console.result(f"nothing to remove in {storage.name}")
        return
    Listing(FILE_COLUMNS, files).show(f"nothing refers to these files of {storage.name}")
    total = f"{len(files)} files, {console.size(sum(file.size for file in files))}"
    if not yes and not console.agrees(f"Remove {total}?"):
        console.result(f"nothing was removed; `--yes` removes {total}")
        return
    # Meanwhile somebody may have begun to use some of it, or an absent selection may have come back.
    forgotten = [user for user in forgotten if user.absent or user not in absent]
    agreed = {file.name for file in files}
    files = [file for file in garbage(storage, in_use(storage, selections, forgotten)) if file.name in agreed]
    for file in files:
        storage.remove(file.name)
    storage.remove_empty({file.name.rpartition("/")[0] for file in files})
    console.result(f"removed {len(files)} files, {console.size(sum(file.size for file in files))}")


@command(
    cache,
    "xkd-pipeline cache export shared/teacher",
    "xkd-pipeline cache export shared/teacher --selection data/scored",
    "xkd-pipeline cache export shared/all --request 3f2a",
)
def export(
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    selection: Annotated[Path | None, placed("selection", "--selection", "Selection to export.")] = None,
    request: Annotated[
        str, typer.Option("--request", help="In place of a selection: all rows of this request in the store.")
    ] = "",
    store: options.Store = None,
    root: options.Root = HERE,
) -> None:
    """Write a plain folder that `datasets.load_dataset` reads, with a card, ready for a hub."""
    from pipeline.store.requests import open_store
    from pipeline.store.selection import Selection
    from pipeline.upkeep.catalogue import find_request
    from pipeline.upkeep.export import export as run
    from pipeline.upkeep.export import require_new, splits_of_request, splits_of_selection

    require_new(out)
    if request:
        storage = open_store(store)
        teacher, splits = splits_of_request(storage, find_request(storage, request))
    else:
        teacher, splits = splits_of_selection(Selection(selection, store))
    counts = run(teacher, splits, out)
    console.facts(
        "exported",
        [*((split, f"{rows:,} rows") for split, rows in counts.items()), ("folder", out), ("card", out / "README.md")],
    )
