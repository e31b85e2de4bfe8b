"""`xkd-pipeline cache ...`: look at the teacher store, verify it, tidy it, take something out of it."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import console
from pipeline.cli.cache_listings import (
    GARBAGE_COLUMNS,
    REFERENCE_COLUMNS,
    SHARD_COLUMNS,
    describe,
    request_columns,
    say_user,
)
from pipeline.cli.listing import Form, Listing, shown
from pipeline.cli.options import HERE, CsvOption, JsonOption, RootOption, StoreOption, example, placed
from pipeline.layout import Layout

cache = typer.Typer(
    name="cache",
    no_args_is_help=True,
    help="Look at the teacher store: what it holds, whether it is whole, what can go, and how to take it elsewhere.",
)

RequestArgument = Annotated[
    str, typer.Argument(metavar="[REQUEST]", help="Only requests whose TEACHER/REQUEST begins like this.")
]


@cache.command(
    epilog=example(
        "xkd-pipeline cache ls", "xkd-pipeline cache ls --store s3://bucket/teachers", "xkd-pipeline cache ls --json"
    )
)
def ls(
    request: RequestArgument = "",
    store: StoreOption = None,
    root: RootOption = HERE,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """List the requests in the store: who was asked what, how much is there."""
    form = Form.of(as_json, as_csv)
    from pipeline.store.requests import open_store
    from pipeline.upkeep.catalogue import catalogue

    storage = open_store(store)
    found = list(catalogue(storage, request))
    listing = Listing(request_columns(), found)
    if form is not Form.TEXT:
        return listing.write(form)
    if not found:
        return console.result(f"{storage.name} holds nothing{f' that begins with {request}' if request else ''}")
    listing.show(f"teacher store {storage.name}")
    total = sum(info.size for info in found)
    console.result(f"{len(found)} requests, {sum(info.rows for info in found):,} rows, {console.size(total)}")


@cache.command(epilog=example("xkd-pipeline cache show 3f2a", "xkd-pipeline cache show 3f2a --csv"))
def show(
    request: Annotated[str, typer.Argument(help="The beginning of a request's name, or of its identity.")],
    store: StoreOption = None,
    root: RootOption = HERE,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Show one request: its teacher, what was asked, engines and versions, every shard, and who uses it.

    CSV has the shards.
    """
    form = Form.of(as_json, as_csv)
    from pipeline.store.kept_mass import kept_mass_warning, say_kept_mass
    from pipeline.store.requests import open_store
    from pipeline.store.users import references
    from pipeline.upkeep.catalogue import catalogue, find_request, kept_masses, to_json

    storage = open_store(store)
    name = find_request(storage, request)
    (info,) = [info for info in catalogue(storage, name) if info.name == name]
    masses = [] if form is Form.CSV else kept_masses(storage, info)  # CSV has the shards alone
    users = [user for user in references(storage)[0] if name in (f"{user.teacher}/{each}" for each in user.requests)]
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
    if masses and (word := kept_mass_warning(masses[-1][0])):  # the widest, or samples, which say it all
        console.warn(word)
    console.result(f"teacher {to_json(info.teacher)}")
    console.result(f"request {to_json(info.request)}")
    shards.show("shards")


@cache.command(
    epilog=example("xkd-pipeline cache verify", "xkd-pipeline cache verify --selection data/teacher --dry-run")
)
def verify(
    request: RequestArgument = "",
    store: StoreOption = None,
    selection: Annotated[
        list[Path] | None,
        typer.Option(
            "--selection",
            help="Selection to verify beside the store, repeatable.  "
            f"[dim]default: {', '.join(map(str, Layout().selections))}, those that exist[/dim]",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is wrong; move nothing.")] = False,
    root: RootOption = HERE,
) -> None:
    """Read every byte and every row, and set aside what is damaged: `generate` then makes exactly that again.

    Exit code 1: something was found.
    """
    from pipeline.store.requests import open_store
    from pipeline.upkeep.catalogue import files_by_request
    from pipeline.upkeep.verify import verify_selection, verify_store

    storage = open_store(store)
    total = sum(map(len, files_by_request(storage, request).values()))
    with console.progress("verifying", total) as advance:
        found = list(verify_store(storage, request, not dry_run, advance))
    selections = selection or [folder for folder in Layout(root).selections if folder.is_dir()]
    for folder in selections:
        found += verify_selection(folder, store, not dry_run)
    looked = f"{total:,} files of {storage.name}" + "".join(f", {folder}" for folder in selections)
    if not found:
        well = f"all is well: {looked}" if total or selections else f"nothing to verify: {storage.name} is empty"
        return console.result(well)
    for problem in found:
        state = " (set aside)" if problem.aside else ""
        console.result(f"{problem.file}: {problem.what}{state}. Then: {problem.repair}")
    console.result(f"{len(found)} problems in {looked}")
    raise typer.Exit(1)


@cache.command(
    epilog=example(
        "xkd-pipeline cache gc",
        "xkd-pipeline cache gc --keep ../other/data/teacher --yes",
        "xkd-pipeline cache gc --forget /old/data/teacher",
    )
)
def gc(
    store: StoreOption = None,
    keep: Annotated[
        list[Path] | None,
        typer.Option(
            "--keep", help="Further selection whose rows are kept (one that came from elsewhere); repeatable."
        ),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            "--forget",
            metavar="SELECTION",
            help="Selection whose rows are no longer kept on its account, as the list shows it; `all`: every one that "
            "is not at its place any more; repeatable.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    root: RootOption = HERE,
) -> None:
    """Show what no selection refers to, and remove it once you agree.

    Selections leave word in the store when they are made. Kept is what one of them reads, all that an unfinished run,
    a selection on another machine or one that is not at its place (deleted, moved, on a disk that is not there) refers
    to, and what is being written. `--forget` gives a selection up.
    """
    from pipeline.store.manifest import MANIFEST
    from pipeline.store.requests import open_store
    from pipeline.store.users import named, references
    from pipeline.upkeep.collect import garbage, in_use

    storage = open_store(store)
    own = [folder for folder in Layout(root).selections if (folder / MANIFEST).is_file()]
    given = [*own, *(keep or [])]
    forgotten = named(references(storage)[0], forget or [])
    absent = [reference for reference in forgotten if reference.absent]
    users = in_use(storage, given, forgotten)
    found = list(garbage(storage, users))
    kept = sorted({*map(say_user, users.kept), *map(str, given)})
    console.result(f"kept is what these refer to: {', '.join(kept) or 'nothing is known to refer to this store'}")
    if users.absent:
        title = "selections that are not at their place; `--forget SELECTION` gives one up, `--forget all` all of them"
        Listing(REFERENCE_COLUMNS, list(users.absent)).show(title)
    if not found:
        console.result(f"nothing to remove in {storage.name}")
        return
    Listing(GARBAGE_COLUMNS, found).show(f"nothing refers to these files of {storage.name}")
    total = f"{len(found)} files, {console.size(sum(each.size for each in found))}"
    if not yes and not console.agrees(f"Remove {total}?"):
        console.result(f"nothing was removed; `--yes` removes {total}")
        return
    # Meanwhile somebody may have begun to use some of it, or an absent selection may have come back.
    forgotten = [reference for reference in forgotten if reference.absent or reference not in absent]
    agreed = {each.name for each in found}
    found = [each for each in garbage(storage, in_use(storage, given, forgotten)) if each.name in agreed]
    for each in found:
        storage.remove(each.name)
    storage.remove_empty({each.name.rpartition("/")[0] for each in found})
    console.result(f"removed {len(found)} files, {console.size(sum(each.size for each in found))}")


@cache.command(
    epilog=example(
        "xkd-pipeline cache export shared/teacher",
        "xkd-pipeline cache export shared/teacher --selection data/scored",
        "xkd-pipeline cache export shared/all --request 3f2a",
    )
)
def export(
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    selection: Annotated[Path | None, placed("selection", "--selection", "Selection to export.")] = None,
    request: Annotated[
        str, typer.Option("--request", help="In place of a selection: all rows of this request in the store.")
    ] = "",
    store: StoreOption = None,
    root: RootOption = HERE,
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
