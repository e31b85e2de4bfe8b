"""`manifest.json` of a selection: what it holds, sealed by a digest of itself, and the files that belong to it.

Files of rows are named by their content, so that those of a new selection lie beside those of the earlier one, until
the manifest is replaced, which makes the new one the selection at once. Earlier versions named them without a digest.
"""

import json
import re
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import ASIDE, cannot_read, digest, read_text, sha256_file
from pipeline.store.schema import SCHEMAS, with_support

MANIFEST = "manifest.json"
WRITE_AGAIN = "run `xkd-pipeline generate` (or `score`, if that wrote it) again"
_PARTS = r"(train|validation|scored|references|negatives|samples|greedy|sampled|(round|heldout)\d{4,})"
_ROWS = rf"{_PARTS}-\d{{5}}(-[0-9a-f]{{12}})?\.parquet"
_LEFT_BEHIND = re.compile(rf"({re.escape(MANIFEST)}|{_ROWS})(\.aside)?")
_STAGED = re.compile(r"\.tmp-[0-9a-f]{32}")


def rows_name(part: str, number: int, sha256: str) -> str:
    """Name of a part's file of rows with this content."""
    return f"{part}-{number:05d}-{sha256[:12]}.parquet"


def sealed(manifest: dict) -> dict:
    """The manifest with `sha256`, the digest of all its other entries, so that every change of them shows."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return rest | {"sha256": digest(rest)}


def read_manifest(folder: Path) -> dict:
    """A selection's manifest, with its support. Raises UserError where it is missing, damaged or changed."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_text(path))
        version, seal = manifest["schema_version"], manifest["sha256"]
        known = version in SCHEMAS
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no cached teacher at {folder}: run `xkd-pipeline generate` (or `dvc repro generate`) first"
        ) from None
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {WRITE_AGAIN}") from error
    if not known:
        expected = ", ".join(map(str, SCHEMAS))
        raise UserError(f"{path} is of schema version {version}, expected one of {expected}: {WRITE_AGAIN}")
    if sealed(manifest)["sha256"] != seal:
        raise UserError(f"{path} is stale: its sha256 is not that of its entries: {WRITE_AGAIN}")
    return with_support(manifest)


def seal_of(folder: Path) -> str | None:
    """The digest that tells the selection in a folder from others; None without a whole manifest."""
    try:
        return read_manifest(folder)["sha256"]
    except UserError:
        return None


def listed_files(manifest: dict) -> dict[str, dict]:
    """The manifest's entry of every file of rows, by name."""
    return {file["name"]: file for part in manifest["parts"].values() for file in part["files"]}


def unlisted_files(folder: Path, manifest: dict) -> list[Path]:
    """The files of rows in a selection's folder that its manifest does not list."""
    listed = listed_files(manifest)
    return sorted(path for path in folder.iterdir() if re.fullmatch(_ROWS, path.name) and path.name not in listed)


def is_staged(path: Path) -> bool:
    """Whether it is the folder in which a run prepares a selection, or the file in which an earlier version did."""
    return bool(_STAGED.fullmatch(path.name))


def is_of_selection(path: Path) -> bool:
    """Whether it has the name of a selection's file, or of one that was moved aside."""
    return bool(_LEFT_BEHIND.fullmatch(path.name))


def is_left_behind(path: Path) -> bool:
    """Whether it is a file of an earlier selection, or what a killed run prepared."""
    return is_staged(path) or (is_of_selection(path) and not path.is_dir())


def is_named_by_content(path: Path) -> bool:
    """Whether it is a file of rows with its digest in its name, which those of exports and earlier versions lack."""
    name = re.fullmatch(_ROWS, path.name.removesuffix(ASIDE))
    return bool(name and name[3]) and name[3] == f"-{sha256_file(path)[:12]}"


def holds_selection(folder: Path) -> bool:
    """Whether a folder has a selection, whole or damaged."""
    try:
        return any(map(is_of_selection, folder.iterdir()))
    except FileNotFoundError:
        return False
    except OSError:  # something is there that cannot be listed
        return True


def file_fault(folder: Path, file: dict) -> str | None:
    """What is wrong with a file that a manifest lists, or None."""
    path = folder / file["name"]
    if not path.is_file():
        return "it is not a regular file: move it away" if path.exists() else "it is missing"
    return None if sha256_file(path) == file["sha256"] else "its content is not what manifest.json says"
