"""What holds for rows whose order is another one than that of the files they are in."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.store.requests import RequestFolder
from tests.benchmarks import shuffled
from tests.store.test_shards import assert_same, folder, make_row, meta

__all__ = ["folder"]  # the fixture


def filled(folder: RequestFolder, shards: int, steps: int = 3) -> list:
    """Shards of 20 rows each; returns where each row is."""
    for shard in range(shards):
        folder.add([make_row(number, steps=steps) for number in range(shard * 20, shard * 20 + 20)], meta())
    index = folder.index()
    return [index[f"key{number}"][0] for number in range(shards * 20)]


ORDERS = {
    "as stored": np.arange(200),
    "shuffled": np.random.default_rng(0).permutation(200),
    "the other way round": np.arange(200)[::-1],
    "one of each shard in turn": np.arange(200).reshape(10, 20).T.ravel(),
    "some of them, several times": np.random.default_rng(1).integers(0, 200, 300),
}


@pytest.mark.parametrize("memory", [2**28, 3000, 0], ids=["in memory", "some in the file", "all in the file"])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_come_in_any_order_and_each_row_group_is_decoded_once(folder, monkeypatch, order, memory, tmp_path):
    monkeypatch.setattr("pipeline.store.schema.ROW_GROUP_VALUES", 100)  # several groups a shard
    monkeypatch.setattr("pipeline.store.ordering.IN_MEMORY", memory)
    monkeypatch.setattr("pipeline.store.ordering.READ_AT_ONCE", 500)
    locations, decoded = filled(folder, 10), []
    for name in ("read_row_group", "read_row_groups"):
        read = getattr(pq.ParquetFile, name)
        monkeypatch.setattr(
            pq.ParquetFile, name, lambda *given, read=read: decoded.extend(np.atleast_1d(given[1])) or read(*given)
        )
    rows = list(folder.read_each([locations[number] for number in ORDERS[order]], tmp_path))
    for number, row in zip(ORDERS[order], rows, strict=True):
        assert_same(row, make_row(number))
    groups = sum(pq.read_metadata(shard).num_row_groups for shard in folder.path.glob("part-*"))
    assert len(decoded) <= groups and groups >= 30
    assert not list(tmp_path.glob("tmp*"))


def test_rows_that_wait_take_no_more_memory_than_they_may(folder, monkeypatch, tmp_path):
    """Also while whoever reads them keeps the last hundred."""
    locations = filled(folder, 100, steps=10)
    order = np.random.default_rng(0).permutation(2000)
    highest = {}
    for memory in (2**28, 50_000):
        monkeypatch.setattr("pipeline.store.ordering.IN_MEMORY", memory)
        monkeypatch.setattr("pipeline.store.ordering.READ_AT_ONCE", 2_000)
        before, highest[memory], kept = pa.total_allocated_bytes(), 0, []
        for row in folder.read_each([locations[number] for number in order], tmp_path):
            kept = [*kept[-99:], row]
            highest[memory] = max(highest[memory], pa.total_allocated_bytes() - before)
        del row, kept
    assert highest[50_000] < 150_000 < 600_000 < highest[2**28]


def test_no_place_for_the_temporary_file_is_a_clear_error(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("pipeline.store.ordering.IN_MEMORY", 0)
    locations = filled(folder, 10)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=rf"cannot write to {tmp_path / 'file'}"):
        list(folder.read_each([locations[number] for number in ORDERS["shuffled"]], tmp_path / "file"))


def test_the_benchmark_of_shuffled_prompts_measures_both_orders():
    found = shuffled.main(rows=600, tokens=6, k=4, rows_per_shard=20, repeat=1)
    assert found["shuffled_over_sorted"] == found["median"]["shuffled"] / found["median"]["sorted"] > 0
    assert found["median"]["shuffled"] < 4 * found["median"]["sorted"]
    assert found["arrow_bytes"].keys() == {"sorted", "shuffled"}
