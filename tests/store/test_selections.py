"""What holds for selections: canonical, labelled for their experiment, verified when read."""

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import sha256_file, write_json_atomically
from pipeline.store.manifest import sealed
from pipeline.store.narrowing import narrowed
from pipeline.store.requests import RequestFolder, pick
from pipeline.store.selection import Selection
from pipeline.store.selection_files import Part, _write_part, write_selection
from pipeline.upkeep.verify import verify_selection
from tests.store.test_shards import REQUEST, TEACHER, assert_same, damage_flip, folder, make_row, meta

__all__ = ["folder"]  # the fixture


def rows_file(out: Path) -> Path:
    """The one file of rows of a selection with one part."""
    (path,) = out.glob("*.parquet")
    return path


def part_of(folder: RequestFolder, order: list[int], k: int) -> Part:
    index, part = folder.index(), Part(folder, REQUEST)
    for number in order:
        part.add(f"p{number}", f"key{number}", "teacher", pick(index[f"key{number}"], k, "topk"))
    return part


def test_a_selection_depends_on_the_rows_and_not_on_how_they_were_stored(tmp_path, own_store):
    contents = []
    for name, batches in (("one", [[0, 1, 2]]), ("two", [[2], [1, 0]])):
        folder = RequestFolder(tmp_path / name, TEACHER["identity"], REQUEST.identity)
        for batch in batches:
            folder.add([make_row(number) for number in batch], meta())
        out = tmp_path / f"selection-{name}"
        write_selection(out, {"train": part_of(folder, [1, 2, 0], 3)}, TEACHER, 3, 0, True)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1]
    (file, manifest) = sorted(contents[0], reverse=True)
    digest = sha256_file(tmp_path / "selection-one" / file)
    assert (file, manifest) == (f"train-00000-{digest[:12]}.parquet", "manifest.json")


@pytest.mark.parametrize("materialize", [True, False])
def test_a_selection_reads_the_same_rows_from_its_files_or_from_the_store(tmp_path, folder, materialize, own_store):
    folder.add([make_row(number) for number in range(3)], meta())
    manifest = write_selection(tmp_path / "out", {"train": part_of(folder, [2, 0], 3)}, TEACHER, 3, 0, materialize)
    selection = Selection(tmp_path / "out", own_store)
    found = list(selection.rows("train"))
    assert [row.key for row in found] == ["key2", "key0"]
    for row in found:
        assert_same(row, narrowed(make_row(int(row.key[-1])), 3, "topk"))
    assert manifest["parts"]["train"]["keys"] == {"p2": ["key2"], "p0": ["key0"]}
    assert manifest["parts"]["train"]["tokens"] == 6
    assert list((tmp_path / "out").glob("*.parquet")) != [] if materialize else True
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    with pytest.raises(UserError, match="has no part 'scored'; it holds train"):
        selection.part("scored")


def test_a_changed_selection_is_refused(tmp_path, folder):
    folder.add([make_row(0)], meta())
    write_selection(tmp_path / "out", {"train": part_of(folder, [0], 3)}, TEACHER, 3, 0, True)
    damage_flip(rows_file(tmp_path / "out"))
    with pytest.raises(UserError, match=r"train-00000-\w{12}\.parquet is missing or not what manifest\.json says"):
        Selection(tmp_path / "out")
    with pytest.raises(UserError, match="no cached teacher at"):
        Selection(tmp_path / "absent")


def test_rows_that_left_the_store_are_named_when_they_were_not_materialised(tmp_path, folder, own_store):
    shard = folder.add([make_row(0)], meta())
    write_selection(tmp_path / "out", {"train": part_of(folder, [0], 3)}, TEACHER, 3, 0, False)
    shard.unlink()
    with pytest.raises(UserError, match=r"row key0 .* is no longer in the store"):
        list(Selection(tmp_path / "out", own_store).rows("train"))


def test_an_earlier_selection_leaves_no_files(tmp_path, folder):
    folder.add([make_row(0), make_row(1)], meta())
    write_selection(
        tmp_path / "out", {"train": part_of(folder, [0], 3), "validation": part_of(folder, [1], 3)}, TEACHER, 3, 0, True
    )
    write_selection(tmp_path / "out", {"train": part_of(folder, [1], 3)}, TEACHER, 3, 0, True)
    assert sorted((tmp_path / "out").iterdir()) == [tmp_path / "out" / "manifest.json", rows_file(tmp_path / "out")]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"].keys() == {"train"}


def test_only_files_of_a_selection_are_removed_from_its_folder(tmp_path, folder):
    folder.add([make_row(0)], meta())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prompts.parquet").write_text("somebody's data")
    write_selection(tmp_path / "out", {"train": part_of(folder, [0], 3)}, TEACHER, 3, 0, True)
    assert (tmp_path / "out" / "prompts.parquet").read_text() == "somebody's data"


@pytest.mark.parametrize("materialize", [True, False])
def test_a_row_is_labelled_for_the_experiment_that_reads_it(tmp_path, folder, own_store, materialize):
    """The store may have got a row under another prompt id, or as a corruption of another reference."""
    folder.add([replace(make_row(0), origin="corrupted", sample=4), make_row(1)], meta())
    index, part = folder.index(), Part(folder, REQUEST)
    for key, origin in (("key0", "reference"), ("key0", "reference"), ("key1", "corrupted")):
        part.add("mine", key, origin, index[key][0])
    write_selection(tmp_path / "out", {"scored": part}, TEACHER, 3, 0, materialize)
    found = [(row.prompt_id, row.origin, row.sample) for row in Selection(tmp_path / "out", own_store).rows("scored")]
    assert found == [("mine", "reference", 0), ("mine", "corrupted", 0)]


def test_a_store_that_holds_other_rows_by_now_is_seen(tmp_path, folder, own_store):
    shard = folder.add([make_row(0)], meta())
    write_selection(tmp_path / "out", {"train": part_of(folder, [0], 3)}, TEACHER, 3, 0, False)
    shard.unlink()
    folder.add([replace(make_row(0), response_ids=make_row(0).response_ids + 1)], meta())
    with pytest.raises(UserError, match="holds other rows than"):
        list(Selection(tmp_path / "out", own_store).rows("train"))


def as_an_earlier_version_wrote(out: Path) -> Path:
    """The same selection with its files named by part and number alone."""
    manifest = json.loads((out / "manifest.json").read_text())
    for part in manifest["parts"].values():
        for file in part["files"]:
            plain = f"{file['name'][: -len('-0123456789ab.parquet')]}.parquet"
            (out / file["name"]).rename(out / plain)
            file["name"] = plain
    write_json_atomically(out / "manifest.json", sealed(manifest))
    return out


def test_a_selection_with_the_names_of_an_earlier_version_is_read_and_replaced(tmp_path, folder):
    folder.add([make_row(0), make_row(1)], meta())
    write_selection(tmp_path / "out", {"train": part_of(folder, [0], 3)}, TEACHER, 3, 0, True)
    out = as_an_earlier_version_wrote(tmp_path / "out")
    assert rows_file(out).name == "train-00000.parquet" and not faults(out)
    assert [row.key for row in Selection(out).rows("train")] == ["key0"]
    write_selection(out, {"train": part_of(folder, [1], 3)}, TEACHER, 3, 0, True)
    assert rows_file(out).name != "train-00000.parquet"
    assert [row.key for row in Selection(out).rows("train")] == ["key1"]


def faults(out: Path) -> set[str]:
    """What verify says, except for the keys of rows, which are made up here."""
    found = {problem.what for problem in verify_selection(out, None, False)}
    return {what for what in found if "has a key that does not fit its tokens" not in what}


class Killed(BaseException):
    """In place of a signal, at a given system call."""


STEPS = ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir")


def die_at(step: int, monkeypatch) -> list[str]:
    """Have the process end before its call number `step` that changes a folder or syncs; names of the calls made."""
    made: list[str] = []

    def counted(name: str, call):
        def instead(*given, **more):
            if len(made) >= step:
                raise Killed  # also whatever tidying would do now
            made.append(name)
            return call(*given, **more)

        return instead

    for name in STEPS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return made


@pytest.mark.parametrize("named", ["by content", "as an earlier version"])
def test_whenever_a_rewrite_ends_before_its_time_one_selection_is_whole(tmp_path, folder, monkeypatch, named):
    """At every call that changes the folder, without any tidying afterwards; and the next write leaves nothing else."""
    monkeypatch.setattr("pipeline.store.selection_files.ROWS_PER_FILE", 1)
    folder.add([make_row(number) for number in range(5)], meta())
    old, new = ({"train": part_of(folder, order, 3)} for order in ([0, 1, 2], [3, 1, 4, 0]))
    out, found = tmp_path / "out", []
    for step in range(200):
        write_selection(out, old, TEACHER, 3, 0, True)
        if named == "as an earlier version":
            as_an_earlier_version_wrote(out)
        with monkeypatch.context() as patch:
            made = die_at(step, patch)
            with suppress(Killed):
                write_selection(out, new, TEACHER, 2, 0, True)
        selection = Selection(out)
        found.append([row.key for row in selection.rows("train")])
        assert {row.k for row in selection.rows("train")} == {selection.manifest["k"]}
        assert faults(out) <= {"manifest.json does not list it"}
        if len(made) < step:
            break
    assert found[0] == ["key0", "key1", "key2"] and found[-1] == ["key3", "key1", "key4", "key0"]
    assert found == sorted(found, key=len) and len(found) > 20 and {len(keys) for keys in found} == {3, 4}
    write_selection(out, old, TEACHER, 3, 0, True)
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", *(file["name"] for file in Selection(out).part("train")["files"])
    }  # fmt: skip


def test_what_a_killed_rewrite_has_left_goes_before_anything_is_written(tmp_path, folder, monkeypatch):
    """On a small disk there would be no room for both, however often the same command is run."""
    folder.add([make_row(0), make_row(1)], meta())
    out, at_first = tmp_path / "out", []
    write_selection(out, {"train": part_of(folder, [0], 3)}, TEACHER, 3, 0, True)
    with monkeypatch.context() as patch:
        die_at(5, patch)
        with suppress(Killed):
            write_selection(out, {"train": part_of(folder, [1], 3)}, TEACHER, 3, 0, True)
    (left,) = out.glob(".tmp-*")
    assert list(left.iterdir()) and not faults(out)
    (out / ".tmp-mine").mkdir()

    def seen(*given):
        at_first.extend(path.name for path in out.glob(".tmp-*"))
        return _write_part(*given)

    monkeypatch.setattr("pipeline.store.selection_files._write_part", seen)
    write_selection(out, {"train": part_of(folder, [1], 3)}, TEACHER, 3, 0, True)
    assert len(at_first) == 2 and ".tmp-mine" in at_first and left.name not in at_first


def test_a_write_that_fails_at_the_swap_leaves_no_new_files(tmp_path, folder, monkeypatch):
    folder.add([make_row(0), make_row(1)], meta())
    write_selection(tmp_path / "out", {"train": part_of(folder, [0], 3)}, TEACHER, 3, 0, True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(path, to):
        if to.name == "manifest.json" and to.parent == tmp_path / "out":
            raise OSError(28, "No space left on device")
        os.replace(path, to)

    monkeypatch.setattr("pipeline.store.selection_files.replace_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_selection(tmp_path / "out", {"train": part_of(folder, [1], 3)}, TEACHER, 3, 0, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
