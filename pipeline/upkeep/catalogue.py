"""What a store holds, from the footers of its shards: cheap, also at a URL."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.store.checks import SHARD, UNREADABLE
from pipeline.store.kept_mass import KeptMass, KeptMassFound
from pipeline.store.requests import SKIPPED
from pipeline.store.schema import Malformed, read_metadata
from pipeline.store.storage import Storage, StoredFile

_MEASURED = 8  # shards per k and support from which the mass of the kept tokens is read
IDENTITY = re.compile(r"[0-9a-f]{16}")
_REQUEST = re.compile(rf"({IDENTITY.pattern}/{IDENTITY.pattern})/")


@dataclass(frozen=True)
class ShardInfo:
    """One shard as its footer describes it."""

    name: str
    size: int
    modified: float | None
    rows: int
    tokens: int
    k: int
    support: str | None
    engine: dict

    @property
    def kept(self) -> str:
        """For people: `sampled 16`, `topk 8`, `text`."""
        return f"{self.support} {self.k}" if self.support else "text"


@dataclass
class RequestInfo:
    """What one teacher answered to one request. `teacher` and `request` are as in the shards' footers."""

    name: str  # <teacher identity>/<request identity>
    teacher: dict = field(default_factory=dict)
    request: dict = field(default_factory=dict)
    shards: list[ShardInfo] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    damaged: int = 0  # files set aside
    waiting: int = 0  # shards in the outbox of a store at a URL
    skipped: int = 0

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def ks(self) -> list[int]:
        return sorted({shard.k for shard in self.shards})

    @property
    def kept(self) -> list[str]:
        """Every support and k that is stored, with the supports in order."""
        kinds = {(shard.support or "", shard.k): shard.kept for shard in self.shards}
        return [kinds[key] for key in sorted(kinds)]

    @property
    def modified(self) -> float | None:
        return max((shard.modified for shard in self.shards if shard.modified is not None), default=None)

    @property
    def engines(self) -> Counter[str]:
        """Rows by engine and versions."""
        rows: Counter[str] = Counter()
        for shard in self.shards:
            rows[", ".join(f"{name} {value}" for name, value in shard.engine.items())] += shard.rows
        return rows


def files_by_request(storage: Storage, prefix: str = "") -> dict[str, dict[str, StoredFile]]:
    """`<teacher>/<request>` -> its files by their names in the store, which begin with `prefix`.

    Other files are ignored.
    """
    files: dict[str, dict[str, StoredFile]] = {}
    for name, file in storage.find().items():
        inside = _REQUEST.match(name)
        if inside and name.startswith(prefix):
            files.setdefault(inside[1], {})[name] = file
    return files


def catalogue(storage: Storage, prefix: str = "") -> Iterator[RequestInfo]:
    """All requests whose name begins with `prefix`, by name."""
    for request, files in sorted(files_by_request(storage, prefix).items()):
        info = RequestInfo(request)
        for name, file in files.items():
            folder, _, last = name.rpartition("/")
            if folder == f"{request}/damaged":
                info.damaged += 1
            elif folder == request and SHARD.fullmatch(last):
                _add(info, storage, last, file)
            elif name == f"{request}/{SKIPPED}":
                info.skipped = (storage.read_text(name) or "").count("\n")
        info.waiting = len(list(storage.outbox(request).glob("part-*.parquet"))) if storage.remote else 0
        yield info


def _add(info: RequestInfo, storage: Storage, shard: str, file: StoredFile) -> None:
    try:
        with storage.open(f"{info.name}/{shard}") as stream:
            metadata = read_metadata(stream)
        if {"rows", "tokens"} - metadata.keys():
            raise Malformed("the footer does not count rows and tokens")
    except (OSError, UserError, *UNREADABLE):
        if not storage.has_gone(f"{info.name}/{shard}"):  # since it was listed
            info.unreadable.append(shard)
        return
    said = (metadata[entry] for entry in ("rows", "tokens", "k", "support"))
    info.shards.append(ShardInfo(shard, file.size, file.modified, *said, metadata.get("engine", {})))
    info.teacher, info.request = metadata["teacher"], metadata["request"]


def kept_masses(storage: Storage, info: RequestInfo) -> list[tuple[KeptMassFound, str]]:
    """The mass of the kept tokens for each k, top k's first and then samples, and how many shards it was read from.

    At most _MEASURED shards are read for each, evenly spread.
    """
    alike: dict[tuple[bool, int, str], list[str]] = {}
    for shard in info.shards:
        if shard.k:
            alike.setdefault((shard.support == "sampled", shard.k, shard.support), []).append(shard.name)
    masses = []
    for (_, k, support), shards in sorted(alike.items()):
        some = shards[:: -(-len(shards) // _MEASURED)]
        kept = KeptMass()
        for shard in some:
            with storage.open(f"{info.name}/{shard}") as stream:
                for batch in pq.ParquetFile(stream).iter_batches(columns=["topk_logprobs"]):
                    kept.add(batch.column(0).flatten().to_numpy().reshape(-1, k))
        if described := kept.describe(k, support):
            masses.append((described, f"{len(some)} of {len(shards)} shards"))
    return masses


def find_request(storage: Storage, prefix: str) -> str:
    """The one request whose name, or whose identity alone, begins with `prefix`. Raises UserError otherwise."""
    names = sorted(files_by_request(storage))
    matching = [name for name in names if name.startswith(prefix) or name.split("/")[1].startswith(prefix)]
    if len(matching) == 1 or prefix in matching:
        return prefix if prefix in matching else matching[0]
    known = ", ".join(matching or names) or "nothing"
    verb = "they are" if matching else "it holds"
    raise UserError(f"'{prefix}' names {len(matching)} requests of {storage.name}; {verb} {known}")


def describe_request(request: dict) -> str:
    """A request in a few words: what was drawn, or that responses were scored."""
    sampling = request.get("sampling")
    if not sampling:
        return "score"
    drawn = "greedy" if sampling["temperature"] == 0 else f"T {sampling['temperature']:g}"
    nucleus = f", top-p {sampling['top_p']:g}" if sampling["top_p"] < 1 else ""
    return f"sample: {drawn}{nucleus}, {sampling['max_tokens']} tokens, seed {request['seed']}"


def to_json(value: dict) -> str:
    """For people: sorted and indented."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
