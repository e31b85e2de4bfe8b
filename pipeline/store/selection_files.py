"""Making a selection: its rows rewritten canonically, and its manifest, in the place of an earlier one.

The bytes depend on nothing but the request, the samples and the teacher's provenance: prompt order, fixed file size, k
trimmed, no times, hosts or paths. So nothing reruns because of how or when rows got into the store.
"""

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import interrupts
from pipeline.errors import UserError
from pipeline.files import (
    locked,
    replace_file,
    sha256_file,
    sync,
    write_atomically,
    write_json_atomically,
    writing_to,
)  # fmt: skip
from pipeline.store import schema
from pipeline.store.identity import Request
from pipeline.store.manifest import (
    MANIFEST,
    is_left_behind,
    is_staged,
    listed_files,
    read_manifest,
    rows_name,
    sealed,
)  # fmt: skip
from pipeline.store.requests import Location, RequestFolder
from pipeline.store.schema import Row
from pipeline.store.selection import Counted, Label, Selection, labels_of

ROWS_PER_FILE = 4096


@dataclass
class Part:
    """Rows of one name (a split, or `scored`): prompt id -> keys and origins, and where each key is stored.

    stop_token_ids: of a score request, which does not hold them; they say whether a given response has ended.
    texts: prompt id -> the prompt as it was rendered for this selection; stored ones may differ in spaces.
    """

    folder: RequestFolder
    request: Request
    stop_token_ids: tuple[int, ...] | None = None
    keys: dict[str, list[str]] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    locations: dict[str, Location] = field(default_factory=dict)
    counted: Counted | None = None  # what was written

    def add(self, prompt_id: str, key: str, origin: str, location: Location, text: str | None = None) -> None:
        """Add a key that the prompt does not have yet. Without a text, rows keep the stored one."""
        if key not in self.keys.setdefault(prompt_id, []):
            self.keys[prompt_id].append(key)
            self.origins.setdefault(prompt_id, []).append(origin)
            self.locations[key] = location
        if text is not None:
            self.texts[prompt_id] = text

    def labelled(self, labels: Sequence[Label], k: int, support: str | None, folder: Path) -> Iterator[Row]:
        """The stored rows as the selection labels them, with its own prompts' texts. folder: for temporary files."""
        stored = self.folder.read_each((self.locations[label.key] for label in labels), folder)
        for label, row in zip(labels, stored, strict=True):
            if fault := schema.value_fault(row):  # stored by an earlier version, which did not check
                raise UserError(
                    f"row {row.key} in {self.folder} cannot be used: {fault}. Run `xkd-pipeline cache verify`, which "
                    "sets its shard aside, and the same command again"
                )
            yield replace(label.apply(row, k, support), prompt=self.texts.get(label.prompt_id, row.prompt))

    @property
    def rows(self) -> int:
        return sum(map(len, self.keys.values()))

    def drawn(self) -> dict[str, int]:
        """Rows by the k with which their tokens were drawn; it decides which tokens a smaller k has."""
        stored = (self.locations[key] for keys in self.keys.values() for key in keys)
        widths = Counter(location.k for location in stored if location.support == "sampled")
        return {str(k): rows for k, rows in sorted(widths.items())}

    def describe(self) -> dict:
        """The manifest's entry, without files and counts of tokens."""
        stops = {} if self.stop_token_ids is None else {"stop_token_ids": list(self.stop_token_ids)}
        return stops | {
            "request": self.request.describe(), "request_identity": self.request.identity,
            "prompts": len(self.keys), "rows": self.rows, "keys": self.keys, "origins": self.origins,
        }  # fmt: skip


def write_selection(
    out: Path,
    parts: dict[str, Part],
    teacher: dict,
    k: int,
    skipped: int,
    materialize: bool,
    student: str | None = None,
    support: str | None = "topk",
) -> dict:
    """Write `out` and return the manifest; an earlier selection there is replaced once the new one is whole.

    Other files in `out` stay. student: fingerprint of the model that rows of origin `student` are samples of. support:
    of all rows; None for text alone.
    """
    manifest: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION, "teacher": teacher, "k": k, "support": support,
        "materialized": materialize, "skipped": skipped, "parts": {},
    } | ({} if student is None else {"student": student})  # fmt: skip

    def fill(staged: Path) -> None:
        for name, part in parts.items():
            footing = schema.footer(teacher, part.request.describe(), k, support)
            manifest["parts"][name] = _write_part(staged, name, part, footing, materialize)

    _replace(out, manifest, fill)
    return manifest


def join_selections(out: Path, folders: Sequence[Path]) -> dict:
    """Write `out` with the parts of several materialised selections of one teacher, and return the manifest.

    Their parts have different names. An earlier selection in `out` is replaced as `write_selection` does.
    """
    selections = list(map(Selection, folders))
    for other in selections[1:]:
        other.require_same_teacher(selections[0])
    manifest = {name: value for name, value in selections[0].manifest.items() if name != "sha256"}
    manifest["skipped"] = sum(each.manifest["skipped"] for each in selections)
    manifest["parts"] = {name: part for each in selections for name, part in each.parts.items()}

    def fill(staged: Path) -> None:
        for each in selections:
            for name in listed_files(each.manifest):
                shutil.copyfile(each.folder / name, staged / name)
                sync(staged / name)

    _replace(out, manifest, fill)
    return manifest


def _replace(out: Path, manifest: dict, fill: Callable[[Path], None]) -> None:
    """Make what `fill` writes into a folder, and the manifest as it is then, the selection in `out`."""
    with writing_to(out), locked(out):  # two runs with one `out` write one after the other
        _remove(path for path in out.iterdir() if is_staged(path))  # first, since it takes the room of a selection
        staged = out / f".tmp-{uuid.uuid4().hex}"
        try:
            with writing_to(staged):
                fill(staged)
                write_json_atomically(staged / MANIFEST, sealed(manifest))
                with interrupts.deferred():
                    _swap(staged, out, listed_files(manifest))
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _swap(staged: Path, out: Path, files: Collection[str]) -> None:
    """Make the selection in `staged` the one in `out`: at every moment `out` has one that is whole.

    New files lie beside the earlier ones until the manifest is replaced; only then the earlier ones are removed.
    """
    new = {file for file in files if not os.path.lexists(out / file)}
    try:
        for file in files:
            replace_file(staged / file, out / file)
        sync(out)
        replace_file(staged / MANIFEST, out / MANIFEST)
        sync(out)
    except BaseException:
        with suppress(OSError):
            _remove(out / file for file in new - _listed(out))
        raise
    _remove(path for path in out.iterdir() if path.name not in {MANIFEST, *files} and is_left_behind(path))


def _listed(out: Path) -> set[str]:
    """Files of the selection in `out`; none where it has no readable one."""
    try:
        return set(listed_files(read_manifest(out)))
    except UserError:
        return set()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_part(out: Path, name: str, part: Part, footing: dict, materialize: bool) -> dict:
    """Write a part's files, if they are to be materialized, and return its manifest entry. footing: their footer."""
    described = part.describe()
    if footing["k"] and (drawn := part.drawn()):
        described["drawn"] = drawn
    labels, files = labels_of(described), []
    counted = part.counted = Counted()
    rows = counted.through(part.labelled(labels, footing["k"], footing["support"], out))
    if materialize:
        for number, start in enumerate(range(0, len(labels), ROWS_PER_FILE)):
            groups = schema.row_groups(islice(rows, ROWS_PER_FILE))
            path = write_atomically(
                out,
                lambda temporary, groups=groups: schema.write_row_groups(temporary, groups, footing),
                lambda temporary, number=number: rows_name(name, number, sha256_file(temporary)),
            )
            count = min(ROWS_PER_FILE, len(labels) - start)
            files.append({"name": path.name, "rows": count, "sha256": sha256_file(path)})
        return described | {"tokens": counted.tokens, "files": files}
    for _ in rows:
        pass
    return described | {"tokens": counted.tokens, "files": [], "content": counted.content.hexdigest()}


def groups_of(rows: Sequence[Row]) -> np.ndarray:
    """The row group that each row of a part has in the files of a materialised selection, int [N]."""
    files = (rows[start : start + ROWS_PER_FILE] for start in range(0, len(rows), ROWS_PER_FILE))
    sizes = [len(group) for file in files for group in schema.row_groups(file)]
    return np.repeat(np.arange(len(sizes)), sizes)
