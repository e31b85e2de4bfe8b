"""What holds for reading a selection to train on: every row once an epoch, by seed, resumable, in little memory."""

import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.learning.batches import collate
from pipeline.store.open_files import OpenFiles
from pipeline.store.requests import RequestFolder
from pipeline.store.schema import Row
from pipeline.store.selection import Selection
from pipeline.store.selection_files import Part, write_selection
from pipeline.store.training_rows import BucketedBatches, RowLoader, TeacherRows
from tests.conftest import ROOT
from tests.store.test_selections import as_an_earlier_version_wrote
from tests.store.test_shards import REQUEST, TEACHER, assert_same, make_row, meta


def keys_of(rows) -> list[str]:
    return [row.key for row in rows]


def make_selection(folder, count: int, materialize: bool = True, steps=lambda number: 1 + number % 7) -> Selection:
    """Rows of several lengths, a third of them references, over several shards in another order than the selection."""
    store = RequestFolder(folder / "store", TEACHER["identity"], REQUEST.identity)
    rows = [replace(make_row(n, steps=steps(n)), origin="teacher" if n % 3 else "reference") for n in range(count)]
    for start in range(0, count, 10):
        store.add(rows[start : start + 10][::-1], meta())
    index, part = store.index(), Part(store, REQUEST)
    for row in rows:
        part.add(row.prompt_id, row.key, row.origin, index[row.key][0])
    write_selection(folder / "out", {"train": part}, TEACHER, 3, 0, materialize)
    return Selection(folder / "out", folder / "store")


@pytest.fixture(params=[True, False], ids=["copied", "in the store"])
def selection(request, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.schema.ROW_GROUP_VALUES", 200)  # several row groups a file
    monkeypatch.setattr("pipeline.store.selection_files.ROWS_PER_FILE", 30)
    return make_selection(tmp_path, 75, request.param)


def test_rows_by_number_are_those_of_the_selection_in_order(selection):
    dataset, rows = TeacherRows(selection, "train"), list(selection.rows("train"))
    assert len(dataset) == 75 and dataset.keys == keys_of(rows) and len(set(dataset.groups)) > 5
    order = np.random.default_rng(0).permutation(75)
    for index, found in zip(order, dataset.__getitems__(order), strict=True):
        row = rows[index]
        assert (found.key, found.origin, found.sample) == (row.key, row.origin, row.sample)
        np.testing.assert_array_equal(found.topk_ids, row.topk_ids)
        np.testing.assert_array_equal(found.topk_logprobs, row.topk_logprobs)
        assert (dataset.prompt_tokens[index], dataset.response_tokens[index]) == (5, len(row.response_ids))
    assert {row.k for row in dataset.__getitems__(range(75))} == {3}


def test_one_origin_or_no_top_k_where_that_is_asked(selection):
    dataset = TeacherRows(selection, "train", topk=False, origin="reference")
    expected = [row for row in selection.rows("train") if row.origin == "reference"]
    assert dataset.keys == keys_of(expected) == keys_of(dataset.__getitems__(range(25)))
    assert {row.k for row in dataset.__getitems__(range(25))} == {0}
    np.testing.assert_array_equal(dataset[3].logprobs, expected[3].logprobs)


def test_a_token_beyond_a_vocabulary_is_found(selection):
    dataset = TeacherRows(selection, "train")
    highest = max(max(row.response_ids) for row in selection.rows("train"))
    assert dataset.beyond(highest + 1) is None
    row, token = dataset.beyond(highest)
    assert token == highest == max(row.response_ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(selection, workers):
    epochs = []
    for seed in (0, 0, 1):
        loader = RowLoader(TeacherRows(selection, "train"), 8, seed, keys_of, workers)
        epochs += [list(loader), list(loader)]
    for batches in epochs:
        assert len(batches) == len(loader) == 10 and sorted(len(batch) for batch in batches) == [3, *[8] * 9]
        assert len({key for batch in batches for key in batch}) == 75
    first, second, again, _, other, _ = epochs
    assert first == again and first != second and first != other


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 4, 10, 13])
def test_an_epoch_goes_on_where_it_was_left(selection, workers, taken):
    def loader():
        return RowLoader(TeacherRows(selection, "train"), 8, 5, keys_of, workers)

    def forever(loader):
        while True:
            yield from loader

    whole = list(islice(forever(loader()), 20))
    left = loader()
    before = list(islice(forever(left), taken))
    resumed = loader()
    resumed.load_state_dict(left.state_dict())
    after = list(islice(forever(resumed), 20 - taken))
    assert before + after == whole


def test_batches_are_of_similar_length_and_micro_batches_are_parts_of_them():
    rng = np.random.default_rng(0)
    lengths, groups = rng.integers(1, 1000, 2000), np.arange(2000) // 50
    whole = list(BucketedBatches(lengths, groups, 32, seed=0))
    spread = np.mean([np.ptp(lengths[batch]) for batch in whole[:-1]])
    assert spread < 0.1 * np.mean([np.ptp(lengths[rng.integers(0, 2000, 32)]) for _ in range(50)])
    means = [lengths[batch].mean() for batch in whole]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3  # and not from short to long
    parts = BucketedBatches(lengths, groups, 32, seed=0, parts=4)
    assert len(list(parts)) == len(parts) == 4 * 62 + 2
    assert [i for batch in parts for i in batch] == [i for batch in whole for i in batch]


@pytest.mark.parametrize("rows_a_group", [10, 50, 2000])
def test_the_window_and_not_the_row_groups_says_how_alike_a_batch_is(rows_a_group):
    """A batch of one length teaches less a step, so that must not follow from how the rows are stored."""
    rng = np.random.default_rng(0)
    lengths, groups = rng.integers(1, 1000, 2000), np.arange(2000) // rows_a_group

    def spread(window: int) -> float:
        batches = list(BucketedBatches(lengths, groups, 10, seed=0, window=window))
        assert sorted(row for batch in batches for row in batch) == list(range(2000))
        return np.mean([np.ptp(lengths[batch]) for batch in batches])

    assert spread(1) > 750 and 200 < spread(4) < 300 and spread(8) < 0.6 * spread(4)


def test_a_group_is_decoded_about_once_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.schema.ROW_GROUP_VALUES", 300)
    dataset, read = TeacherRows(make_selection(tmp_path, 1500), "train"), []
    load = dataset._source.load
    dataset._source = SimpleNamespace(load=lambda group: read.append(group) or load(group))
    list(RowLoader(dataset, 4, 0, keys_of))
    assert 40 < len(set(dataset.groups)) <= len(read) < 1.3 * len(set(dataset.groups))


LIMITED = """
import resource, sys
import torch, numpy
from itertools import islice
from pipeline.learning.batches import collate
from pipeline.store.training_rows import RowLoader, TeacherRows
from pipeline.store.selection import Selection

dataset = TeacherRows(Selection(sys.argv[1]), "train")
next(iter(RowLoader(dataset, 8, 0, collate)))  # what the libraries need at all
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
tokens = 0
for batch in RowLoader(dataset, 8, 1, collate):
    tokens += int((batch["labels"] >= 0).sum())
print(tokens)
try:
    everything = [dataset._source.load(group) for group in range(len(set(dataset.groups)))]
except MemoryError:
    print("limited")
"""


@pytest.mark.slow
def test_a_selection_larger_than_the_memory_is_read_to_its_end(tmp_path):
    """400 MB of rows with 96 MB to spare, which a reader of everything at once runs out of."""
    store = RequestFolder(tmp_path / "store", TEACHER["identity"], REQUEST.identity)
    rng, part, total, k = np.random.default_rng(0), Part(store, REQUEST), 0, 64
    for number in range(60):
        rows = []
        for place in range(16):
            steps = int(rng.integers(500, 1500))
            total += steps
            ids = rng.integers(0, 50, (steps, k)).astype(np.int32)
            row = make_row(0, steps=1)
            rows.append(replace(
                row, key=f"{number}-{place}", response_ids=ids[:, 0].copy(), topk_ids=ids, lse=None,
                logprobs=np.full(steps, -1, np.float32), topk_logprobs=np.full((steps, k), -5, np.float16),
                tail=np.full(steps, 0.5, np.float32),
            ))  # fmt: skip
        store.add(rows, meta(k))
    for key, locations in store.index().items():
        part.add(key, key, "teacher", locations[0])
    write_selection(tmp_path / "out", {"train": part}, TEACHER, k, 0, True)
    decoded = sum(
        column.total_uncompressed_size
        for file in (tmp_path / "out").glob("*.parquet")
        for metadata in [pq.read_metadata(file)]
        for group in range(metadata.num_row_groups)
        for column in [metadata.row_group(group).column(c) for c in range(metadata.num_columns)]
    )
    assert total * k * 6 > 350e6 and decoded > 96e6
    environment = {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}  # which reserves nothing ahead
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "out"), str(96 * 2**20)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == [str(total), "limited"]


def test_a_batch_of_rows_is_the_batch_of_their_responses(selection):
    rows = list(selection.rows("train"))[:4]
    extras = {"mu": {row.key: np.full(len(row.response_ids), 2.0) for row in rows}}
    batch = collate(rows, topk=True, extras=extras)
    assert batch["topk_ids"].shape == (4, 4, 3) and float(batch["mu"].sum()) == 2 * sum(
        len(r.response_ids) for r in rows
    )
    loader = RowLoader(TeacherRows(selection, "train"), 4, 0, partial(collate, topk=True))
    assert {len(batch["input_ids"]) for batch in loader} == {4, 3}


# While somebody rewrites what is read


def rewrite(folder: Path, plain_names: bool = False) -> None:
    """Put another selection, of other rows and another k, in the place of the one that is read; empty its store."""
    store = RequestFolder(folder / "store", TEACHER["identity"], REQUEST.identity)
    earlier = list(store.path.glob("part-*.parquet"))
    store.add([make_row(n, steps=2) for n in range(1000, 1060)], meta())
    index, part = store.index(), Part(store, REQUEST)
    for number in range(1000, 1060):
        part.add(f"p{number}", f"key{number}", "teacher", index[f"key{number}"][0])
    materialize = bool(list((folder / "out").glob("*.parquet")))
    write_selection(folder / "out", {"train": part}, TEACHER, 2, 0, materialize)
    if plain_names:  # those of the earlier files, then
        as_an_earlier_version_wrote(folder / "out")
    for shard in earlier:
        shard.unlink()


def in_another_process(function, *given) -> None:
    process = multiprocessing.get_context("fork").Process(target=function, args=given)
    process.start()
    process.join()
    assert process.exitcode == 0


def as_it_is(rows) -> list[Row]:
    return list(rows)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("names", ["by content", "as an earlier version", "in the store"])
def test_an_epoch_ends_with_the_selection_that_it_began_with(tmp_path, monkeypatch, names, workers):
    """Another process replaces the selection in the middle of an epoch, and empties the store of its rows."""
    monkeypatch.setattr("pipeline.store.schema.ROW_GROUP_VALUES", 200)
    monkeypatch.setattr("pipeline.store.selection_files.ROWS_PER_FILE", 30)
    selection = make_selection(tmp_path, 300, names != "in the store")
    if names == "as an earlier version":
        selection = Selection(as_an_earlier_version_wrote(tmp_path / "out"))
    expected = {row.key: row for row in selection.rows("train")}
    loader, served = RowLoader(TeacherRows(selection, "train"), 8, 0, as_it_is, workers), []
    for batch in loader:
        served += batch
        if len(served) == 16:
            in_another_process(rewrite, tmp_path)
    served += [row for batch in loader for row in batch]  # and one more epoch
    assert len(served) == 600 and {row.key for row in served} == expected.keys()
    for row in served:
        assert_same(row, expected[row.key])
    if names != "in the store":  # whose rows would be looked up again
        assert {row.key for row in selection.rows("train")} == expected.keys()
    assert len(TeacherRows(Selection(tmp_path / "out", tmp_path / "store"), "train")) == 60


@pytest.mark.parametrize("names", ["by content", "as an earlier version", "in the store"])
def test_a_copy_in_another_process_reads_the_same_rows_or_says_that_they_are_gone(tmp_path, names):
    """What is sent to a process that was not forked, such as a DataLoader's worker on macOS, has no open files."""
    selection = make_selection(tmp_path, 40, names != "in the store")
    if names == "as an earlier version":
        selection = Selection(as_an_earlier_version_wrote(tmp_path / "out"))
    sent = pickle.dumps(TeacherRows(selection, "train"))
    for path in [*tmp_path.glob("out/*.parquet"), *tmp_path.glob("store/*/*/part-*.parquet")]:
        os.utime(path, (0, 0))  # the same content under another date is looked at, and found to be the same
    copy = pickle.loads(sent)
    for row, found in zip(selection.rows("train"), copy.__getitems__(range(40)), strict=True):
        assert_same(row, found)
    rewrite(tmp_path, names == "as an earlier version")
    lost = "was removed from the store" if names == "in the store" else "the selection was rewritten"
    with pytest.raises(UserError, match=rf"is (gone|another file than before): .*{lost}"):
        pickle.loads(sent).__getitems__(range(40))


@pytest.mark.parametrize("materialize", [True, False])
def test_a_selection_of_more_files_than_may_be_open_is_read_and_its_change_is_seen(tmp_path, monkeypatch, materialize):
    monkeypatch.setattr("pipeline.store.selection_files.ROWS_PER_FILE", 1)
    if not materialize:
        monkeypatch.setattr(RequestFolder, "add", one_row_a_shard(RequestFolder.add))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 80, limit[1]))
    try:
        dataset = TeacherRows(make_selection(tmp_path, 120, materialize), "train")
        assert len(list(RowLoader(dataset, 8, 0, keys_of))) == 15 and len(set(dataset.groups)) == 120
        assert len(os.listdir("/dev/fd")) - before < 40
        monkeypatch.undo()
        rewrite(tmp_path)
        dataset._decoded.clear()
        with pytest.raises(UserError, match=r"is gone: .*Run the same command again"):
            dataset.__getitems__(range(120))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def one_row_a_shard(add):
    return lambda store, rows, footer: [add(store, [row], footer) for row in rows]


def test_a_selection_that_is_rewritten_while_it_is_opened_is_opened_anew(tmp_path, monkeypatch):
    make_selection(tmp_path, 40)
    add, calls = OpenFiles.add, []

    def slow(files, *given, **more):
        calls.append(given)
        if len(calls) == 1:
            rewrite(tmp_path)
        return add(files, *given, **more)

    monkeypatch.setattr(OpenFiles, "add", slow)
    assert len(list(Selection(tmp_path / "out").rows("train"))) == 60
