"""What `xkd-pipeline cache` lists: the columns of its tables, and a request as JSON has it."""

import time
from datetime import datetime
from operator import attrgetter

from pipeline import console
from pipeline.cli.listing import Column

_DATE = "{:%Y-%m-%d %H:%M}".format


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds)


def _days_since(seconds: float | None) -> float | None:
    return None if seconds is None else (time.time() - seconds) / 86400


def request_columns() -> list[Column]:
    """What is said of every request: words in the table, values in JSON and CSV."""
    from pipeline.upkeep.catalogue import describe_request

    def asked(name: str):
        return lambda info: (info.request.get("sampling") or {}).get(name)

    return [
        Column("request", attrgetter("name"), "teacher/request"),
        Column("teacher", lambda info: info.teacher.get("name") or "local model"),
        Column("", lambda info: describe_request(info.request) if info.request else "?", "asked"),
        Column("kind", lambda info: info.request.get("kind"), None),
        *(Column(name, asked(name), None) for name in ("temperature", "top_p", "max_tokens")),
        Column("seed", lambda info: info.request.get("seed"), None),
        Column("rows", attrgetter("rows")),
        Column("tokens", attrgetter("tokens")),
        Column("k", attrgetter("ks"), None),
        Column("kept", attrgetter("kept")),
        Column("bytes", attrgetter("size"), "size", console.size),
        Column("bytes_per_token", lambda info: info.size / info.tokens if info.tokens else None, show="{:,.0f}".format),
        Column("left_out", attrgetter("skipped")),
        Column("damaged", lambda info: info.damaged + len(info.unreadable)),
        Column("changed", lambda info: _time(info.modified), show=_DATE),
    ]


SHARD_COLUMNS = [
    Column("shard", attrgetter("name")),
    Column("rows", attrgetter("rows")),
    Column("tokens", attrgetter("tokens")),
    Column("k", attrgetter("k"), None),
    Column("support", attrgetter("support"), None),
    Column("", attrgetter("kept"), "kept"),
    Column("bytes", attrgetter("size"), "size", console.size),
    Column("changed", lambda shard: _time(shard.modified), show=_DATE),
]
USER_COLUMNS = [
    Column("selection", attrgetter("selection")),
    Column("host", attrgetter("host")),
    Column("last_recorded", lambda user: _time(user.recorded), show=_DATE),
    Column("age", lambda user: _days_since(user.recorded), show="{:,.0f} days".format),
]
FILE_COLUMNS = [
    Column("file", attrgetter("name")),
    Column("size", attrgetter("size"), show=console.size),
    Column("why", attrgetter("why")),
]


def describe(info, storage, users) -> dict[str, object]:
    """A request and what is known about it, without its shards."""
    return {
        "request": info.name,
        "store": storage.name,
        "rows": info.rows,
        "tokens": info.tokens,
        "k": info.ks,
        "kept": info.kept,
        "bytes": info.size,
        "left_out": info.skipped,
        "set_aside": info.damaged,
        "unreadable": info.unreadable,
        "waiting": info.waiting,
        "made_by": [{"engine": engine, "rows": rows} for engine, rows in info.engines.items()],
        "used_by": [{"selection": user.selection, "host": user.host, "state": _state(user)} for user in users],
        "teacher": info.teacher,
        "asked": info.request,
    }


def _state(user) -> str:
    return "not at its place" if user.absent else "complete" if user.complete else "not finished"


def say_user(user) -> str:
    state = _state(user)
    return f"{user.selection} on {user.host}" + (f" ({state})" if state != "complete" else "")
