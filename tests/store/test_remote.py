"""What holds for a store at a URL: the same as on a disk, against a real S3 server (moto) on this machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store.requests import RequestFolder
from pipeline.store.storage import Storage
from stages.generate import Summary, generate
from tests.conftest import ROOT, make_params, make_prompts
from tests.processes import run, start
from tests.stages.test_generate import Recorder, contents, stub_params
from tests.store.test_shards import REQUEST, TEACHER, assert_same, damage_flip, make_row, meta

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def server():
    """The address of an S3 server with the bucket `teachers`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(address).items():
            patch.setenv(name, value)
        import s3fs

        for _ in range(100):
            try:
                s3fs.S3FileSystem(endpoint_url=address).mkdir("teachers")
                break
            except Exception:
                time.sleep(0.2)
        yield process
    process.kill()


def credentials(address: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": address,
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip


@pytest.fixture
def url(server, request, tmp_path, monkeypatch):
    """A store of its own in the bucket, and a mirror of its own on this machine."""
    monkeypatch.setenv("XKD_MIRROR", str(tmp_path / "mirror"))
    return f"s3://teachers/{tmp_path.name}"


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path / "prompts.parquet", train=20, validation=5)


def forget(tmp_path, monkeypatch) -> None:
    """What another machine has: no mirror."""
    monkeypatch.setenv("XKD_MIRROR", str(tmp_path / f"mirror-{time.monotonic_ns()}"))


def test_a_folder_at_a_url_is_written_read_and_mirrored(url, tmp_path, monkeypatch):
    folder = RequestFolder(url, TEACHER["identity"], REQUEST.identity)
    folder.describe(TEACHER, REQUEST.describe())
    shard = folder.add([make_row(0), make_row(1)], meta())
    assert list(Storage(url).find()) == [
        f"{folder.name}/{shard.name}", f"{folder.name}/request.json", f"{folder.teacher}/teacher.json",
    ]  # fmt: skip
    forget(tmp_path, monkeypatch)
    other = RequestFolder(url, TEACHER["identity"], REQUEST.identity)
    (row,) = other.read([other.index()["key1"][0]])
    assert_same(row, make_row(1))
    other.skip([{"key": "a", "prompt_id": "p", "reason": "x"}])
    folder.skip([{"key": "b", "prompt_id": "p", "reason": "y"}])
    assert folder.skipped().keys() == {"a", "b"}


def test_another_machine_finds_everything_and_asks_for_nothing(url, teacher, prompts, tmp_path, monkeypatch):
    assert generate(stub_params(teacher), prompts, tmp_path / "a", url) == Summary(0, 60, 0)
    generate(stub_params(teacher), prompts, tmp_path / "local")
    forget(tmp_path, monkeypatch)
    engine = Recorder(teacher)
    assert generate(stub_params(teacher), prompts, tmp_path / "b", url, engine=engine) == Summary(60, 0, 0)
    assert not engine.sampled and contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "local")
    unmaterialised = stub_params(teacher, "generate.materialize=false")
    generate(unmaterialised, prompts, tmp_path / "c", url)
    from pipeline.store.selection import Selection

    assert [row.key for row in Selection(tmp_path / "c", url).rows("train")] == [
        row.key for row in Selection(tmp_path / "a").rows("train")
    ]


def test_damage_there_is_repaired_and_damage_here_is_fetched_again(url, teacher, prompts, tmp_path, capsys):
    generate(stub_params(teacher), prompts, tmp_path / "a", url)
    storage = Storage(url)
    mirrored = next(storage.path.glob("*/*/part-*.parquet"))
    damage_flip(mirrored)
    engine = Recorder(teacher)
    assert generate(stub_params(teacher), prompts, tmp_path / "b", url, engine=engine).made == 0
    name = str(mirrored.relative_to(storage.path))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(mirrored.read_bytes()[:-9])
    storage.put(damaged, name)
    code, said = run("cache", "verify", "--store", url, log=tmp_path / "log", cwd=tmp_path)
    assert code == 1 and name in said and "does not match its name (set aside)" in said, said
    assert 0 < generate(stub_params(teacher), prompts, tmp_path / "c", url, engine=engine).made <= 8
    assert contents(tmp_path / "c") == contents(tmp_path / "a")
    assert run("cache", "verify", "--store", url, log=tmp_path / "log", cwd=tmp_path)[0] == 0


def test_the_cache_commands_work_at_a_url(url, teacher, prompts, tmp_path):
    generate(stub_params(teacher), prompts, tmp_path / "a", url)
    said = run("cache", "ls", "--store", url, log=tmp_path / "log")[1]
    assert "45" in said and "15" in said and "sample: T 1" in said, said
    request = next(name for name in Storage(url).find() if name.endswith("request.json")).split("/")[1]
    said = run("cache", "show", request[:6], "--store", url, log=tmp_path / "log")[1]
    assert url in said and str(tmp_path / "a") in said, said
    said = run("cache", "gc", "--store", url, log=tmp_path / "log", cwd=tmp_path)[1]
    assert "nothing to remove" in said, said
    shutil.rmtree(tmp_path / "a")
    said = run("cache", "gc", "--store", url, "--yes", log=tmp_path / "log", cwd=tmp_path)[1]
    assert "nothing to remove" in said and "0 days" in said, said
    code, said = run("cache", "gc", "--store", url, "--forget", "all", "--yes", log=tmp_path / "log", cwd=tmp_path)
    assert code == 0 and "no selection refers to the request" in said and not Storage(url).find(), said


def arguments(teacher: Path, prompts: Path, out: Path, url: str) -> tuple:
    return (
        "generate", "--teacher", teacher, "--prompts", prompts, "--out", out, "--store", url, "--engine", "hf",
        "--max-tokens", 40, "--template", "{prompt}", "--samples", 8, "--set", "generate.rows_per_shard=16",
        "--params", ROOT / "params.yaml",
    )  # fmt: skip


def test_what_cannot_be_handed_over_waits_and_a_killed_run_goes_on(url, teacher, tmp_path):
    """A run is killed between writing and handing over; a bucket does not exist yet."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=100)
    process = start(*arguments(teacher, prompts, tmp_path / "a", url), log=tmp_path / "log")
    process.wait_for(lambda: len(list(Storage(url).path.glob("*/*/part-*.parquet"))) >= 3)
    process.send(signal.SIGKILL)
    process.wait()
    waiting = Storage("s3://nowhere/here")
    with pytest.raises(UserError, match=r"nowhere.*run the same command again|does not exist"):
        RequestFolder(waiting, TEACHER["identity"], REQUEST.identity).add([make_row(0)], meta())
    kept = list(waiting.path.rglob("outbox/part-*.parquet"))
    assert len(kept) == 1  # until there is such a bucket
    import s3fs

    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir("nowhere")
    assert RequestFolder(waiting, TEACHER["identity"], REQUEST.identity).index().keys() == {"key0"}
    assert not list(waiting.path.rglob("outbox/part-*")) and len(waiting.find()) == 1
    code, said = run(*arguments(teacher, prompts, tmp_path / "a", url), log=tmp_path / "log")
    assert code == 0, said
    run(*arguments(teacher, prompts, tmp_path / "b", str(tmp_path / "disk")), log=tmp_path / "log")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_unknown_kind_of_url_is_a_clear_error(teacher, tmp_path):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2)
    with pytest.raises(UserError, match="cannot use the store teleport://x"):
        generate(make_params(teacher), prompts, tmp_path / "a", "teleport://x")
