"""What holds for `xkd-pipeline cache`: it shows what is there, removes only what nobody uses, exports plain files."""

import csv
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime

import datasets
import numpy as np
import pytest
import yaml

from pipeline.store.schema import SCHEMA
from pipeline.store.selection import Selection
from pipeline.store.storage import Storage
from pipeline.store.users import User, users_of
from pipeline.upkeep.collect import garbage, in_use
from pipeline.upkeep.export import WeightedRow, export, splits_of_request, splits_of_selection
from stages.generate import generate
from tests.conftest import ROOT, make_prompts, run_cli
from tests.processes import run
from tests.stages.test_generate import Recorder, contents, stub_params
from tests.store.test_shards import readers

pytestmark = [pytest.mark.slow]


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path / "prompts.parquet", train=20, validation=5)


@pytest.fixture
def cli(tmp_path, own_store):
    """`xkd-pipeline cache ...` in an empty folder; exit code, and what it said."""
    (tmp_path / "cwd").mkdir()

    def call(*arguments: object) -> tuple[int, str]:
        return run("cache", *arguments, log=tmp_path / "log", cwd=tmp_path / "cwd")

    return call


def files(store) -> set[str]:
    return {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}


def parts(store) -> set[str]:
    return {path.name for path in store.glob("*/*/part-*.parquet")}


def test_ls_and_show_say_what_is_there_and_where_it_came_from(teacher, prompts, tmp_path, own_store, cli):
    assert "holds nothing" in cli("ls")[1]
    generate(stub_params(teacher), prompts, tmp_path / "a")
    generate(stub_params(teacher, "generate.k=12"), prompts, tmp_path / "b")
    code, said = cli("ls")
    lines = [line.split() for line in said.splitlines() if "/" in line and ("sample:" in line or "score" in line)]
    sampled, scored = sorted(lines, key=len, reverse=True)
    assert code == 0 and "2 requests, 120 rows" in said, said
    assert "90" in sampled and "30" in scored and " ".join(sampled).count("sampled 8, sampled 12") == 1, said
    name = sampled[0]
    code, said = cli("show", name.split("/")[1][:7])
    for expected in (name, '"max_tokens": 6', '"licence": "apache-2.0"', "engine stub", str(tmp_path / "a")):
        assert expected in said, said
    assert said.count("part-") == len(list((own_store / name).glob("part-*")))
    code, said = cli("show", "zzz")
    assert code == 2 and "'zzz' names 0 requests" in said and name in said, said


def test_the_names_that_ls_shows_are_whole_in_a_narrow_terminal_too(teacher, prompts, tmp_path, own_store):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    said = run_cli("cache", "ls", env={"COLUMNS": "40"}).stdout
    requests = {path.parent.relative_to(own_store).as_posix() for path in own_store.glob("*/*/request.json")}
    assert len(requests) == 2 and all(name in said for name in requests) and "…" not in said


def test_programs_get_requests_and_shards_as_numbers(teacher, prompts, tmp_path, own_store):
    assert run_cli("cache", "ls", "--json").stdout == "[]\n"
    generate(stub_params(teacher), prompts, tmp_path / "a")
    generate(stub_params(teacher, "generate.k=12"), prompts, tmp_path / "b")
    requests = {row["kind"]: row for row in json.loads(run_cli("cache", "ls", "--json").stdout)}
    sampled, scored = requests["sample"], requests["score"]
    assert (sampled["rows"], sampled["k"], sampled["max_tokens"], sampled["temperature"]) == (90, [8, 12], 6, 1.0)
    assert sampled["kept"] == ["sampled 8", "sampled 12"]
    assert scored["rows"] == 30 and scored["max_tokens"] is None and scored["damaged"] == 0
    shards = list((own_store / sampled["request"]).glob("part-*.parquet"))
    assert sampled["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert sampled["bytes_per_token"] == sampled["bytes"] / sampled["tokens"]
    assert datetime.fromisoformat(sampled["changed"]).timestamp() == int(max(s.stat().st_mtime for s in shards))
    lines = csv.DictReader(run_cli("cache", "ls", "--csv").stdout.splitlines())
    assert {(row["request"], row["k"], int(row["bytes"])) for row in lines} == {
        (row["request"], " ".join(map(str, row["k"])), row["bytes"]) for row in (sampled, scored)
    }
    identity = sampled["request"].split("/")[1]
    shown = json.loads(run_cli("cache", "show", identity, "--json").stdout)
    assert shown["request"] == sampled["request"] and shown["rows"] == 90 and shown["made_by"][0]["rows"] == 90
    assert {user["selection"] for user in shown["used_by"]} == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert shown["teacher"]["licence"] == "apache-2.0" and shown["asked"]["sampling"]["max_tokens"] == 6
    assert {shard["shard"]: shard["bytes"] for shard in shown["shards"]} == {
        shard.name: shard.stat().st_size for shard in shards
    }
    rows = list(csv.DictReader(run_cli("cache", "show", identity, "--csv").stdout.splitlines()))
    assert [row["shard"] for row in rows] == [shard["shard"] for shard in shown["shards"]]
    for command in (("ls",), ("show", identity)):
        assert run_cli("cache", *command, "--json", "--csv").returncode == 2


@pytest.mark.parametrize("width", [80, 120])
def test_tables_are_readable_in_a_terminal(teacher, prompts, tmp_path, own_store, width):
    """Every name, number and reason is whole, and no line is wider than the terminal."""
    generate(stub_params(teacher), prompts, tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    requests = json.loads(run_cli("cache", "ls", "--json").stdout)
    narrow = {"COLUMNS": str(width)}
    said = run_cli("cache", "ls", env=narrow).stdout
    for row in requests:
        assert row["request"] in said and f"{row['tokens']:,}" in said
    assert "sample: T 1, 6 tokens, seed 0" in said
    shown = run_cli("cache", "show", requests[0]["request"], env=narrow).stdout
    garbage = run_cli("cache", "gc", "--forget", "all", env=narrow, cwd=tmp_path).stdout
    for shard in own_store.glob(f"{requests[0]['request']}/part-*"):
        assert shard.name in shown and f"{requests[0]['request']}/{shard.name}" in garbage
    assert garbage.count("no selection refers to the request") >= len(list(own_store.glob("*/*/part-*")))
    for line in (said + shown.split("shards\n")[1] + garbage).splitlines():
        assert len(line) <= width or str(tmp_path) in line, line


def test_gc_asks_on_stderr_and_takes_no_for_an_answer_without_a_terminal(teacher, prompts, tmp_path, own_store):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    everything = files(own_store)
    ours, theirs = pty.openpty()
    for answer in (b"n", b"", b"y"):
        command = [sys.executable, "-m", "pipeline.cli", "cache", "gc", "--forget", "all"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs,
            env=os.environ | {"NO_COLOR": "1"},
        )  # fmt: skip
        said = process.communicate(answer + b"\n" if answer else b"", timeout=60)[0].decode()
        assert process.returncode == 0 and "Remove" not in said
        asked = os.read(ours, 65536).decode()
        assert re.fullmatch(r"Remove \d+ files, .*\? \[y/N\]: ", asked.replace("\r\n", "")), asked
        assert ("removed" in said and "nothing was removed" not in said) == (answer == b"y")
        assert (files(own_store) == everything) == (answer != b"y")


def test_gc_removes_only_what_nothing_refers_to_and_only_once_agreed(teacher, prompts, tmp_path, own_store, cli):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    first = files(own_store)
    generate(stub_params(teacher, "generate.samples=4", "seed=1"), prompts, tmp_path / "b")
    generate(stub_params(teacher, "generate.samples=4"), prompts, tmp_path / "c")
    everything = files(own_store)
    assert cli("gc")[1].count("nothing to remove") == 1
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "c")
    code, said = cli("gc", "--forget", "all")
    assert code == 0 and "nothing was removed; `--yes` removes" in said and files(own_store) == everything, said
    assert str(tmp_path / "a") in said and "no selection refers to the request" in said
    assert "no selection refers to its rows" in said
    code, said = cli("gc", "--forget", "all", "--yes")
    assert code == 0 and files(own_store) == first, said
    engine = Recorder(teacher)
    generate(stub_params(teacher), prompts, tmp_path / "again", engine=engine)
    assert not engine.sampled and contents(tmp_path / "again") == contents(tmp_path / "a")


def test_gc_keeps_what_a_selection_uses_that_is_not_at_its_place_until_it_is_forgotten(
    teacher, prompts, tmp_path, own_store, cli
):
    """Its disk may not be mounted, or its folder may have another name now."""
    generate(stub_params(teacher, "generate.materialize=false"), prompts, tmp_path / "disk" / "a")
    generate(stub_params(teacher, "seed=1"), prompts, tmp_path / "b")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    kept = files(own_store)
    month_ago = time.time() - 30 * 86400
    ((_, first), _) = users_of(Storage(own_store))
    os.utime(own_store / first.name, (month_ago,) * 2)
    code, said = cli("gc", "--yes")
    assert code == 0 and files(own_store) == kept and "nothing to remove" in said, said
    (line,) = [line for line in said.splitlines() if str(tmp_path / "disk" / "a") in line and "30 days" in line]
    assert socket.gethostname() in line and f"{datetime.fromtimestamp(month_ago):%Y-%m-%d}" in line
    assert "--forget SELECTION" in said
    request = next(own_store.glob("*/*/part-*.parquet")).parent.name
    assert f"{tmp_path / 'disk' / 'a'} on {socket.gethostname()} (not at its place)" in cli("show", request)[1]
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    assert "not at its place" not in cli("gc", "--forget", "all", "--yes")[1] and files(own_store) == kept
    assert len(list(Selection(tmp_path / "disk" / "a").rows("train"))) == 40
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    code, said = cli("gc", "--forget", tmp_path / "elsewhere", "--yes")
    assert code == 2 and "no selection of this name uses the store" in said and str(tmp_path / "disk" / "a") in said
    code, said = cli("gc", "--keep", tmp_path / "unmounted" / "a", "--forget", tmp_path / "disk" / "a", "--yes")
    assert code == 0 and kept - files(own_store) == {first.name}, said  # the rows have another user
    first.record(Storage(own_store))
    code, said = cli("gc", "--forget", tmp_path / "disk" / "a", "--yes")
    assert code == 0 and files(own_store) < kept and "is forgotten" in said, said
    generate(stub_params(teacher, "seed=1"), prompts, tmp_path / "again", engine=Recorder(teacher, die_after=0))


@pytest.mark.parametrize("happened", ["renamed", "not mounted", "not mounted, and the run is interrupted"])
def test_gc_keeps_what_an_absent_selection_uses_when_another_one_is_written_at_its_place(
    teacher, prompts, tmp_path, own_store, cli, happened
):
    out, elsewhere = tmp_path / "disk" / "a", tmp_path / "elsewhere"
    generate(stub_params(teacher, "generate.materialize=false"), prompts, out)
    month_ago = time.time() - 30 * 86400
    ((first,), _) = users_of(Storage(own_store))
    os.utime(own_store / first.name, (month_ago,) * 2)
    out.rename(elsewhere)
    other = stub_params(teacher, "generate.materialize=false", "generate.samples=1")  # of the same requests
    if "interrupted" in happened:
        other = stub_params(teacher, "generate.materialize=false", "generate.samples=1", "seed=1")
        with pytest.raises(Exception, match="the engine died"):
            generate(other, prompts, out, engine=Recorder(teacher, die_after=3))
        assert cli("gc", "--yes")[0] == 0 and len(list(Selection(elsewhere).rows("train"))) == 40
    generate(other, prompts, out)
    kept = files(own_store)
    code, said = cli("gc", "--yes")
    assert code == 0 and "nothing to remove" in said and files(own_store) == kept, said
    assert [line for line in said.splitlines() if str(out) in line and "30 days" in line], said
    assert len(list(Selection(elsewhere).rows("train"))) == 40
    if happened != "renamed":  # the disk is there again, and hides what was written meanwhile
        out.rename(tmp_path / "hidden")
        elsewhere.rename(out)
        assert cli("gc", "--yes")[0] == 0 and files(own_store) == kept
        assert len(list(Selection(out).rows("train"))) == 40 and len(list(Selection(tmp_path / "hidden").rows("train")))
        return
    code, said = cli("gc", "--forget", out, "--yes")  # the one that is not there, not the one that is
    assert code == 0 and len(files(own_store)) < len(kept), said
    assert len(list(Selection(out).rows("train"))) == 20
    assert len(users_of(Storage(own_store))[0]) == 1 and "not at its place" not in cli("gc")[1]


def test_a_selection_that_an_interrupted_run_was_to_replace_stays_in_use_when_it_is_moved(
    teacher, prompts, tmp_path, own_store, cli
):
    generate(stub_params(teacher, "generate.materialize=false"), prompts, tmp_path / "a")
    with pytest.raises(Exception, match="the engine died"):
        generate(stub_params(teacher, "seed=1"), prompts, tmp_path / "a", engine=Recorder(teacher, die_after=20))
    (tmp_path / "a").rename(tmp_path / "b")
    assert cli("gc", "--yes")[0] == 0
    assert len(list(Selection(tmp_path / "b").rows("train"))) == 40


def test_gc_releases_what_a_selection_used_that_was_replaced_in_its_place(teacher, prompts, tmp_path, own_store, cli):
    """Also after an interrupted run, and for selections that an earlier version recorded."""
    for number, seed in enumerate((0, 1, 2)):
        generate(stub_params(teacher, f"seed={seed}", "generate.corrupted=0"), prompts, tmp_path / "a")
        cli("gc", "--yes")
        ((user,), _) = users_of(Storage(own_store))
        assert len(list(own_store.glob("*/*/request.json"))) == 2 and user.complete, seed
        if number == 0:
            entries = json.loads((own_store / user.name).read_text())
            entries.pop("manifest")
            (own_store / user.name).write_text(json.dumps(entries))
        if number == 1:
            with pytest.raises(Exception, match="the engine died"):
                generate(
                    stub_params(teacher, "seed=7"), prompts, tmp_path / "a", engine=Recorder(teacher, die_after=20)
                )
            assert "nothing to remove" in cli("gc", "--yes")[1]


def test_gc_releases_what_dvc_removed_to_run_the_stage_again(teacher, prompts, tmp_path, own_store, cli, monkeypatch):
    """DVC removes the outputs of a stage before it runs it, and has their files itself."""
    generate(stub_params(teacher), prompts, tmp_path / "a")
    before = {path.parent for path in own_store.glob("*/*/request.json")}
    shutil.rmtree(tmp_path / "a")
    monkeypatch.setenv("DVC_STAGE", "generate")
    generate(stub_params(teacher, "seed=1", "generate.corrupted=0"), prompts, tmp_path / "a")
    cli("gc", "--yes")
    left = {path.parent for path in own_store.glob("*/*/request.json")}
    assert len(before) == len(left) == 2 and len(before & left) == 1  # the references are scored alike


def test_an_unfinished_run_that_an_earlier_version_recorded_is_known_and_can_be_forgotten(tmp_path, own_store, cli):
    """Under the name of a selection that was written."""
    entries = {"selection": str(tmp_path / "a"), "host": socket.gethostname(), "teacher": "0" * 16,
               "requests": ["1" * 16], "complete": False}  # fmt: skip
    name = User.of(tmp_path / "a", "", [], complete=True).name
    (own_store / "references").mkdir(parents=True)
    (own_store / name).write_text(json.dumps(entries))
    assert f"{tmp_path / 'a'} on {socket.gethostname()} (not finished)" in cli("gc")[1]
    cli("gc", "--forget", tmp_path / "a", "--yes")
    assert not files(own_store)


def test_a_user_on_another_machine_can_be_forgotten_and_one_that_was_recorded_anew_is_not(
    teacher, prompts, tmp_path, own_store, cli
):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    storage = Storage(own_store)
    ((here,), _) = users_of(storage)
    there = replace(here, host="elsewhere", selection="/x")
    there.record(storage)
    (own_store / here.name).unlink()
    kept = files(own_store)
    ((known,), _) = users_of(storage)
    assert not list(garbage(storage, in_use(storage)))
    os.utime(own_store / there.name, (0, 0))  # it was recorded at another time than when somebody agreed
    assert not list(garbage(storage, in_use(storage, (), [known])))
    assert "nothing to remove" in cli("gc", "--forget", "all", "--yes")[1] and files(own_store) == kept
    assert cli("gc", "--forget", "/x on elsewhere", "--yes")[0] == 0 and not files(own_store)


def test_gc_keeps_what_an_unfinished_run_a_named_selection_or_another_machine_uses(
    teacher, prompts, tmp_path, own_store, cli
):
    with pytest.raises(Exception, match="the engine died"):
        generate(stub_params(teacher), prompts, tmp_path / "a", engine=Recorder(teacher, die_after=20))
    kept = files(own_store)
    code, said = cli("gc", "--yes")
    assert code == 0 and files(own_store) == kept and "(not finished)" in said, said
    generate(stub_params(teacher), prompts, tmp_path / "a")
    kept = files(own_store)
    ((user,), _) = users_of(Storage(own_store))
    (own_store / user.name).unlink()  # a store that was copied from elsewhere
    assert "nothing is known to refer to this store" in cli("gc")[1]
    assert "nothing to remove" in cli("gc", "--keep", tmp_path / "a", "--yes")[1]
    elsewhere = replace(user, host="elsewhere", selection="/x")
    elsewhere.record(Storage(own_store))
    assert "nothing to remove" in cli("gc", "--yes")[1]
    assert files(own_store) == kept - {user.name} | {elsewhere.name}


def test_gc_removes_what_killed_writers_and_verify_left_but_nothing_that_is_being_written(
    teacher, prompts, tmp_path, own_store, cli
):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    kept = files(own_store)
    folder = next(own_store.glob("*/*/part-*.parquet")).parent
    old, young, aside = folder / ".tmp-old", folder / ".tmp-young", folder / "damaged" / "part-x.parquet"
    aside.parent.mkdir()
    for path in (old, young, aside):
        path.write_bytes(b"x" * 100)
    os.utime(old, (time.time() - 7200,) * 2)
    said = cli("gc", "--yes")[1]
    assert "left by a killed writer" in said and "damaged, and set aside" in said, said
    assert files(own_store) == kept | {str(young.relative_to(own_store))}


def test_gc_counts_a_copy_that_another_one_replaces_as_unused(teacher, prompts, tmp_path, own_store, cli):
    """After k was raised, and the selection with it, the narrow shards serve nobody."""
    generate(stub_params(teacher), prompts, tmp_path / "a")
    narrow = parts(own_store)
    generate(stub_params(teacher, "generate.k=12"), prompts, tmp_path / "a")
    before = contents(tmp_path / "a")
    cli("gc", "--yes")
    assert parts(own_store) and not parts(own_store) & narrow
    generate(stub_params(teacher, "generate.k=12"), prompts, tmp_path / "b", engine=Recorder(teacher, die_after=0))
    assert contents(tmp_path / "b") == before


@pytest.mark.parametrize("support", ["topk", "sampled"])
@pytest.mark.parametrize("materialize", ["true", "false"])
def test_an_export_is_a_plain_data_set_with_a_card(teacher, prompts, tmp_path, cli, materialize, support):
    params = stub_params(teacher, f"generate.materialize={materialize}", f"generate.support={support}")
    generate(params, prompts, tmp_path / "a")
    code, said = cli("export", tmp_path / "out", "--selection", tmp_path / "a")
    assert code == 0, said
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    selection = Selection(tmp_path / "a")
    assert {name: split.num_rows for name, split in loaded.items()} == {"train": 40, "validation": 5, "scored": 15}
    for row, found in zip(selection.rows("train"), loaded["train"], strict=True):
        assert found["key"] == row.key and found["topk_ids"] == row.topk_ids.ravel().tolist()
        np.testing.assert_array_equal(np.asarray(found["topk_logprobs"], np.float16), row.topk_logprobs.ravel())
        assert (found["tau"] is None, found["tail"] is None) == (support == "topk", support == "sampled")
        if support == "sampled":
            weights = np.array(found["weights"]).reshape(-1, 8)
            np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
            expected = np.maximum(np.exp(row.topk_logprobs.astype(float)), row.tau[:, None])
            np.testing.assert_allclose(weights, expected, atol=2e-3)
    assert ("weights" in loaded["train"].column_names) == (support == "sampled")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["configs"][0]["config_name"] == "default"
    assert all(f"| `{name}` |" in card for name in SCHEMA.names) and selection.teacher["identity"] in card
    assert ("Use `weights` as the target" in card) == ("| `weights` |" in card) == (support == "sampled")
    assert ("a sample of 8 tokens" if support == "sampled" else "the 8 likeliest tokens") in card
    code, said = cli("export", tmp_path / "out", "--selection", tmp_path / "a")
    assert code == 2 and "is not empty" in said


def test_the_weights_of_an_export_are_read_by_others(teacher, prompts, tmp_path):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    export(*splits_of_selection(Selection(tmp_path / "a")), tmp_path / "out")
    (path,) = (tmp_path / "out" / "data").glob("train-*.parquet")
    expected = [WeightedRow.of(row).weights.ravel() for row in Selection(tmp_path / "a").rows("train")]
    for read in readers(str(path), str(tmp_path / "hf")):
        for values, weights in zip(read(), expected, strict=True):
            np.testing.assert_allclose(np.asarray(values["weights"], float), weights, atol=1e-7)
            assert len(values["tau"]) == len(values["response_ids"]) and values["tail"] is None


def test_a_request_with_samples_and_top_ks_is_exported_with_one_set_of_columns(teacher, prompts, tmp_path, own_store):
    for support in ("topk", "sampled"):
        generate(stub_params(teacher, f"generate.support={support}"), prompts, tmp_path / "a")
    request = max(own_store.glob("*/*"), key=lambda path: len(list(path.glob("part-*"))))
    export(*splits_of_request(Storage(own_store), "/".join(request.parts[-2:])), tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert {name: split.num_rows for name, split in loaded.items()} == {"train_sampled_k8": 45, "train_topk_k8": 45}
    assert all(weights is None for weights in loaded["train_topk_k8"]["weights"])
    assert None not in loaded["train_sampled_k8"]["weights"]


def test_all_rows_of_a_request_can_be_exported_each_k_apart(teacher, prompts, tmp_path, own_store, cli):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    generate(stub_params(teacher, "generate.k=12", "generate.samples=1"), prompts, tmp_path / "b")
    request = max(own_store.glob("*/*"), key=lambda path: len(list(path.glob("part-*")))).name
    code, said = cli("export", tmp_path / "out", "--request", request)
    assert code == 0, said
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert {name: split.num_rows for name, split in loaded.items()} == {"train_k8": 20, "train_k12": 25}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of scored rows by the stop tokens" in card and "when they were scored where all rows of a request" in card


def test_nothing_in_a_name_can_leave_its_place_in_the_card(teacher, prompts, tmp_path):
    generate(stub_params(teacher), prompts, tmp_path / "a")
    _, splits = splits_of_selection(Selection(tmp_path / "a"))
    name = "x`|\n---\nlicense: mit\n<script>alert(1)</script>"
    described = Selection(tmp_path / "a").teacher | {"name": name, "licence": "a\nb: c"}
    export(described, splits, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("\n---\n")[0])["license"] == "a\nb: c"
    lines = [line for line in card.splitlines() if "<script>" in line]
    assert lines and all(line.count("`") % 2 == 0 and "`x'/ --- license: mit <script>" in line for line in lines)
