"""Where results go: to a place that is missing, empty or our own, checked before any work and again before writing.

A folder that is replaced as a whole (a model, a tokenizer, a reward) has a mark that says what it holds, and its files.
A folder into which results are written file by file is known by the same mark, or by the `results.json` in it, since
DVC keeps files and not their folder. The content of a mark depends on nothing but the files' names.
"""

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import interrupts
from pipeline.errors import UserError
from pipeline.files import locked, nearest, read_text, require_writable, write_json_atomically, writing_to
from pipeline.layout import RESULTS

MARK = ".xkd-pipeline"
_MADE_BY, _EARLIER = "xkd-pipeline", "-earlier"
_OF_DVC = {".gitignore"}  # DVC writes it beside files that are its outputs


def require_own_folder(folder: Path, holds: str, option: str = "--out") -> None:
    """Raises UserError unless `folder` can be replaced: it is missing, empty, or holds only what `replacing` made.

    holds: what it is to hold (`a model`); a folder of ours that holds something else is not replaced either.
    """
    place = Path(os.path.realpath(folder))
    names = entries(place, option, besides=())
    if names:
        mark = _require_mark(folder, holds, names, option)
        added = sorted(set(_files(place)) - {*mark.get("files", ()), MARK})
        if added:
            raise UserError(
                f"{folder} holds files that xkd-pipeline did not write ({_some(added)}), and would be replaced as a "
                f"whole: nothing was changed. Move them away, or choose another {option}"
            )
    if os.path.ismount(place):
        raise UserError(f"{folder} is the mount point of a disk and cannot be replaced: give {option} a folder in it")
    require_can_write(place.parent)


@contextmanager
def replacing(folder: Path, holds: str, option: str = "--out") -> Iterator[Path]:
    """A new folder to fill; at the end of the block it is marked and takes the place of `folder`: whole or absent.

    Raises UserError as `require_own_folder` does, before and after the block.
    """
    require_own_folder(folder, holds, option)
    place = Path(os.path.realpath(folder))  # replaces what a link points to, not the link
    with writing_to(place.parent):
        _tidy(place, holds)
        made = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            with locked(made):  # against `_tidy` of another run
                _write_mark(made, holds, [])
                yield made
                _write_mark(made, holds, sorted({*_files(made)} - {MARK}))
                made.chmod(0o755)
                for name in _files(made):  # safetensors makes its files private
                    (made / name).chmod(0o644)
                require_own_folder(folder, holds, option)
                with interrupts.deferred(), locked(place.parent):
                    _swap(made, place)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _swap(made: Path, place: Path) -> None:
    """Put a new folder in the place of an earlier one, which is put back where that fails."""
    earlier = made.with_name(f"{made.name}{_EARLIER}")
    moved = place.exists()
    if moved:  # first: a kill must not leave half of it
        place.rename(earlier)
    try:
        made.rename(place)
    except OSError:
        if moved:
            earlier.rename(place)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _tidy(place: Path, holds: str) -> None:
    """Remove what killed runs left beside the folder they were to replace; put the folder back if it is gone."""
    left_behind = re.compile(rf"\.{re.escape(place.name)}-[a-z0-9_]{{8}}({_EARLIER})?")
    with locked(place.parent):
        for path in sorted(place.parent.iterdir()):
            name = left_behind.fullmatch(path.name)
            if not name or _read_mark(path).get("holds") != holds:
                continue
            with suppress(OSError), locked(path, wait=False):  # a run that is at work has the lock
                if name[1] and not place.exists():
                    path.rename(place)
                else:
                    shutil.rmtree(path)


def require_own_results(folder: Path, stage: str, option: str = "--out") -> None:
    """Raises UserError unless `stage` may write into `folder`: it is missing, empty, or has its earlier results."""
    names = entries(folder, option)
    if RESULTS in names:
        if not is_results(folder / RESULTS, stage):
            raise not_ours(folder / RESULTS, option)
    elif names:
        _require_mark(folder, _results_of(stage), names, option)
    require_can_write(folder)


def begin_results(folder: Path, stage: str, option: str = "--out") -> None:
    """Make the folder and mark it, before the first of its files is written."""
    require_own_results(folder, stage, option)
    _write_mark(folder, _results_of(stage), [])


def is_results(path: Path, stage: str) -> bool:
    """Whether a file is the results.json of a stage; earlier versions did not say of which stage."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        provenance = json.loads(read_text(path))["provenance"]
        return provenance.get("stage", stage) == stage and _MADE_BY in provenance["versions"]
    return False


def require_own_file(path: Path, is_ours: Callable[[Path], bool], option: str = "--out") -> None:
    """Raises UserError unless `path` can be written and is missing or a file for which `is_ours` is true."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a file: choose another {option}")
    if path.exists() and not (path.is_file() and is_ours(path)):
        raise not_ours(path, option)
    require_can_write(path.parent)


def require_can_write(folder: Path) -> None:
    """Raises UserError where nothing can be written into `folder` or it cannot be made; does not make it."""
    require_writable(nearest(folder))


def require_apart(whole: Mapping[str, Path | None], others: Mapping[str, Path | None] | None = None) -> None:
    """Raises UserError where two outputs of a command are the same place, or one lies in one of `whole`.

    Both map option -> path. whole: folders that are replaced as a whole or must be empty at first, and files; others:
    folders that may hold other files as well.
    """
    paths = {option: path for option, path in {**whole, **(others or {})}.items() if path is not None}
    places = {option: Path(os.path.realpath(path)) for option, path in paths.items()}
    for (option, place), (other, around) in itertools.permutations(places.items(), 2):
        if place == around:
            raise UserError(f"{option} and {other} are both {paths[option]}: give each a place of its own")
        if other in whole and around in place.parents:
            raise UserError(
                f"{option} {paths[option]} lies in {other} {paths[other]}, which must be a place of its own: choose "
                f"another {option}"
            )


def entries(folder: Path, option: str, besides=_OF_DVC) -> list[str]:
    """Names in a folder except `besides`, sorted; none where it is missing. Raises UserError where it is a file."""
    try:
        return sorted({*os.listdir(folder)} - {*besides})
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise UserError(f"{folder} is a file or lies in one, expected a folder: choose another {option}") from None


def not_ours(path: Path, option: str) -> UserError:
    """The error about a file that we did not write."""
    return UserError(
        f"{path} is not what xkd-pipeline writes under that name, or an earlier version wrote it, or it is damaged: "
        f"nothing was changed. Move it away, or choose another {option}"
    )


def foreign(folder: Path, names: list[str], option: str) -> UserError:
    """The error about a folder that we did not make."""
    return UserError(
        f"{folder} was not made by xkd-pipeline, or by an earlier version, which left no mark (it holds "
        f"{_some(names)}): nothing was changed. Move it away, or choose another {option}"
    )


def _require_mark(folder: Path, holds: str, names: list[str], option: str) -> dict:
    mark = _read_mark(folder)
    if not mark:
        raise foreign(folder, names, option)
    if mark.get("holds") != holds:
        raise UserError(f"{folder} holds {mark.get('holds')}, but {holds} would be written: choose another {option}")
    return mark


def _results_of(stage: str) -> str:
    return f"results of {stage}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _read_mark(folder: Path) -> dict:
    """The content of the mark in a folder; empty where there is no mark of ours."""
    with suppress(OSError, ValueError, RecursionError):
        mark = json.loads(read_text(folder / MARK))
        if isinstance(mark, dict) and mark.get("made_by") == _MADE_BY:
            return mark
    return {}


def _write_mark(folder: Path, holds: str, files: list[str]) -> None:
    write_json_atomically(folder / MARK, {"made_by": _MADE_BY, "holds": holds, "files": files})
