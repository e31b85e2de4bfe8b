"""What holds for selections: canonical, labelled for their experiment, verified when read."""

import json
from dataclasses import replace

import pytest

from pipeline.errors import UserError
from pipeline.shards.selection import Part, Selection, write_selection
from pipeline.shards.store import RequestFolder, pick
from tests.test_shards import REQUEST, TEACHER, assert_same, damage_flip, folder, make_row, meta

__all__ = ["folder"]  # the fixture


def part_of(folder: RequestFolder, order: list[int], k: int) -> Part:
    index, part = folder.index(), Part(folder, REQUEST)
    for number in order:
        part.add(f"p{number}", f"key{number}", "teacher", pick(index[f"key{number}"], k))
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
    assert contents[0] == contents[1] and contents[0].keys() == {"manifest.json", "train-00000.parquet"}


@pytest.mark.parametrize("materialize", [True, False])
def test_a_selection_reads_the_same_rows_from_its_files_or_from_the_store(tmp_path, folder, materialize, own_store):
    folder.add([make_row(number) for number in range(3)], meta())
    manifest = write_selection(tmp_path / "out", {"train": part_of(folder, [2, 0], 3)}, TEACHER, 3, 0, materialize)
    selection = Selection(tmp_path / "out", own_store)
    found = list(selection.rows("train"))
    assert [row.key for row in found] == ["key2", "key0"]
    for row in found:
        assert_same(row, make_row(int(row.key[-1])).trimmed(3))
    assert manifest["parts"]["train"]["keys"] == {"p2": ["key2"], "p0": ["key0"]}
    assert manifest["parts"]["train"]["tokens"] == 6
    assert list((tmp_path / "out").glob("*.parquet")) != [] if materialize else True
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    with pytest.raises(UserError, match="has no part 'scored'; it holds train"):
        selection.part("scored")


def test_a_changed_selection_is_refused(tmp_path, folder):
    folder.add([make_row(0)], meta())
    write_selection(tmp_path / "out", {"train": part_of(folder, [0], 3)}, TEACHER, 3, 0, True)
    damage_flip(tmp_path / "out" / "train-00000.parquet")
    with pytest.raises(UserError, match=r"train-00000\.parquet is missing or not what manifest\.json says"):
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
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "train-00000.parquet"]
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
