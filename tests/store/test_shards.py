"""What holds for the store: plain files, content names, whole or absent, damage seen and set aside."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.files import sha256_file, write_atomically
from pipeline.store.identity import Request, Sampling, sample_key, sample_seed, score_key
from pipeline.store.requests import RequestFolder, open_store, pick
from pipeline.store.schema import SCHEMA, Row, footer, from_table, read_metadata, write_shard

TEACHER = {"identity": "teacher0", "vocab_size": 50, "tokenizer": "t", "name": None, "licence": "mit"}
REQUEST = Request("sample", "{prompt}", 1, 0, Sampling(1.0, 1.0, 8, (2,)))


def make_row(number: int, k: int = 4, steps: int = 3, lse: bool = True, support: str = "topk") -> Row:
    rng = np.random.default_rng(number)
    return Row(
        key=f"key{number}", origin="teacher", prompt_id=f"p{number}", sample=0, prompt="a b", response="c",
        prompt_ids=np.arange(5, dtype=np.int32), response_ids=rng.integers(0, 50, steps).astype(np.int32),
        finish="stop", logprobs=-rng.random(steps, np.float32),
        topk_ids=rng.permutation(50)[: steps * k].reshape(steps, k).astype(np.int32),
        topk_logprobs=-rng.random((steps, k), np.float32).astype(np.float16),
        lse=rng.random(steps, np.float32) if lse else None,
        **{"tau" if support == "sampled" else "tail": rng.random(steps, np.float32)},
    )  # fmt: skip


def assert_same(one: Row, other: Row) -> None:
    for name in SCHEMA.names:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or np.array_equal(a, b), name


@pytest.fixture
def folder(own_store) -> RequestFolder:
    return RequestFolder(own_store, TEACHER["identity"], REQUEST.identity)


def meta(k: int = 4, support: str = "topk") -> dict:
    return footer(TEACHER, REQUEST.describe(), k, support, engine={"engine": "stub"})


# Schema


def test_rows_read_back_as_written_also_without_lse_and_of_any_length(tmp_path):
    rows = [make_row(0, steps=1), make_row(1, steps=7), make_row(2, lse=False), make_row(3)]
    write_shard(tmp_path / "s.parquet", rows, meta())
    for row, back in zip(rows, from_table(pq.read_table(tmp_path / "s.parquet")), strict=True):
        assert_same(row, back)
    part = from_table(pq.read_table(tmp_path / "s.parquet").slice(1, 2))
    assert_same(rows[1], part[0])
    assert_same(rows[2], part[1])


def readers(path: str, cache: str) -> list:
    """Ways in which others read a file: each gives the rows as dictionaries."""
    import datasets
    import duckdb
    import pandas
    import polars

    def of_pandas():
        return pandas.read_parquet(path).to_dict("records")

    def of_polars():
        return polars.read_parquet(path).to_dicts()

    def of_duckdb():
        relation = duckdb.sql(f"select * from '{path}'")
        return [dict(zip(relation.columns, values, strict=True)) for values in relation.fetchall()]

    def of_datasets():
        return list(datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=cache))

    return [of_pandas, of_polars, of_duckdb, of_datasets]


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_a_shard_is_read_by_others_without_our_code(tmp_path, support):
    rows = [make_row(0, support=support), make_row(1, lse=False, support=support)]
    write_shard(tmp_path / "s.parquet", rows, meta(4, support))
    for read in readers(str(tmp_path / "s.parquet"), str(tmp_path / "hf")):
        found = read()
        assert list(found[0]) == SCHEMA.names, read.__name__
        for row, values in zip(rows, found, strict=True):
            assert values["key"] == row.key and values["finish"] == "stop"
            assert list(values["response_ids"]) == row.response_ids.tolist()
            assert list(values["topk_ids"]) == row.topk_ids.ravel().tolist()
            np.testing.assert_array_equal(np.asarray(values["topk_logprobs"], np.float16), row.topk_logprobs.ravel())
            np.testing.assert_array_equal(np.asarray(values["logprobs"], np.float32), row.logprobs)
            for name in ("lse", "tau", "tail"):
                expected = getattr(row, name)
                assert values[name] is None if expected is None else np.array_equal(values[name], expected), name


def test_a_shard_describes_itself(tmp_path):
    write_shard(tmp_path / "s.parquet", [make_row(0)], meta())
    found = read_metadata(tmp_path / "s.parquet")
    assert found["request"]["sampling"] == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "stop_token_ids": [2]}
    assert (found["k"], found["vocab_size"], found["teacher"]["licence"], found["engine"]["engine"]) == (
        4,
        50,
        "mit",
        "stub",
    )


# Identity


def test_a_request_is_what_is_asked_and_not_how_much_of_it():
    assert REQUEST.identity == replace(REQUEST).identity
    for other in (
        replace(REQUEST, seed=1),
        replace(REQUEST, template="Q {prompt}"),
        replace(REQUEST, template_version=2),
        replace(REQUEST, sampling=replace(REQUEST.sampling, temperature=0.5)),
        replace(REQUEST, sampling=replace(REQUEST.sampling, max_tokens=9)),
        Request("score", "{prompt}", 1),
    ):
        assert other.identity != REQUEST.identity
    assert Request("score", "{prompt}", 1, seed=1).identity == Request("score", "{prompt}", 1).identity


def test_a_sample_is_its_prompt_and_number_and_its_seed_follows():
    ids = np.array([1, 2], np.int32)
    keys = {
        sample_key(REQUEST, ids, 0),
        sample_key(REQUEST, ids, 1),
        sample_key(REQUEST, ids[:1], 0),
        score_key(ids, ids),
    }
    assert len(keys) == 4 and sample_key(REQUEST, ids.astype(np.int64), 0) in keys
    assert score_key(ids[:1], np.array([2, 3])) != score_key(ids, np.array([3]))  # where the prompt ends matters
    seeds = {sample_seed(key) for key in keys}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)


# Writing


def test_a_shard_is_named_by_its_content(folder):
    path = folder.add([make_row(0), make_row(1)], meta())
    assert path.name == f"part-{sha256_file(path)[:16]}.parquet"
    assert folder.add([make_row(0), make_row(1)], meta()) == path  # the same content is the same file
    assert [p.name for p in folder.path.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    def half(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
        write_atomically(tmp_path / "store", half, "part")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_store_that_cannot_be_written_is_a_clear_error(folder, own_store):
    own_store.write_text("a file where the store should be")
    with pytest.raises(UserError, match=rf"cannot write to {own_store}"):
        folder.add([make_row(0)], meta())


# Reading


def test_rows_come_in_the_order_asked_for_from_any_shards(folder):
    rows = [make_row(number) for number in range(6)]
    folder.add(rows[:3], meta())
    folder.add(rows[3:], meta())
    index = folder.index()
    order = [5, 0, 3, 2, 4, 1, 0]
    for number, row in zip(order, folder.read(index[f"key{number}"][0] for number in order), strict=True):
        assert_same(row, rows[number])


def test_the_copy_with_enough_tokens_a_position_is_picked(folder):
    folder.add([make_row(0, k=8)], meta(8))
    folder.add([make_row(0, k=4)], meta(4))
    locations = folder.index()["key0"]
    assert [pick(locations, k, "topk").k for k in (1, 4, 5, 8)] == [4, 4, 8, 8] and pick(locations, 9, "topk") is None


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage_empty(path):
    path.write_bytes(b"")


def damage_swap(path):
    write_shard(path, [make_row(9)], meta())


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_empty, damage_swap])
def test_a_damaged_shard_is_named_set_aside_and_never_read(folder, damage):
    good, bad = folder.add([make_row(0)], meta()), folder.add([make_row(1)], meta())
    damage(bad)
    assert folder.index(set_aside=False).keys() == {"key0"} and bad.exists()
    assert folder.index().keys() == {"key0"}
    assert folder.damaged.keys() == {bad.name}
    assert sorted(p.name for p in folder.path.glob("part-*")) == [good.name]
    assert (folder.path / "damaged" / bad.name).exists()


def test_files_that_others_left_are_no_shards(folder):
    folder.add([make_row(0)], meta())
    (folder.path / ".tmp-abc").write_bytes(b"half a shard of a killed writer")
    assert folder.index().keys() == {"key0"} and not folder.damaged


def test_a_torn_last_line_of_the_skipped_rows_is_ignored(folder):
    folder.skip([{"key": "a", "prompt_id": "p", "reason": "too long"}])
    with (folder.path / "skipped.jsonl").open("a") as file:
        file.write('{"key": "b", "rea')
    assert folder.skipped() == {"a": {"key": "a", "prompt_id": "p", "reason": "too long"}}
    folder.skip([{"key": "c", "prompt_id": "p", "reason": "x"}])
    assert folder.skipped().keys() == {"a", "c"}


def test_the_store_is_where_the_option_or_the_environment_says(tmp_path, own_store, monkeypatch):
    assert open_store(tmp_path).path == tmp_path
    assert open_store().path == own_store
    monkeypatch.delenv("XKD_STORE")
    assert open_store().path.parts[-2:] == ("xkd-pipeline", "store")
