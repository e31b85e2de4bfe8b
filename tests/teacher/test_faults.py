"""What holds when things go wrong: real processes killed, disks full, files damaged; the table in docs/faults.md.

Every fault is done to a real store by `xkd-pipeline generate` with a small real model, and followed by the same command
again, whose selection must be that of an undisturbed run, byte for byte. What is lost is measured: rows that were in
the store before and are not after the repair, and rows that had to be made again.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.files import sha256_file
from pipeline.store.schema import from_table, read_metadata, write_shard
from pipeline.store.selection import Selection
from tests.conftest import ROOT, make_prompts
from tests.processes import Run, run, start

ROWS_PER_SHARD, PROMPTS, SAMPLES = 16, 100, 8
ALL = PROMPTS * SAMPLES + 5 + 5 + 10  # responses, held-out ones, references, corruptions
pytestmark = [pytest.mark.slow]

needs_mount = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None, reason="needs to mount a small disk"
)


def shards(store: Path) -> list[Path]:
    return sorted(store.glob("*/*/part-*.parquet"))


def rows_in(store: Path) -> list[str]:
    """The key of every row in the store, duplicates too, read without our code."""
    return [key for shard in shards(store) for key in pq.read_table(shard, columns=["key"]).column(0).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass
class Lab:
    """A store of its own, and the command that fills it."""

    folder: Path
    teacher: Path
    prompts: Path
    undisturbed: dict[str, bytes]  # files of the selection that an undisturbed run wrote

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def command(
        self, out: Path | None = None, store: Path | None = None, rows_per_shard: int = ROWS_PER_SHARD, k: int = 16
    ) -> tuple:
        return (
            "generate", "--teacher", self.teacher, "--prompts", self.prompts, "--out", out or self.out,
            "--store", store or self.store, "--engine", "hf", "--max-tokens", 40, "--template", "{prompt}", "--samples",
            SAMPLES, "-k", k, "--set", f"generate.rows_per_shard={rows_per_shard}", "--params", ROOT / "params.yaml",
        )  # fmt: skip

    def start(self, **places) -> Run:
        return start(*self.command(**places), log=self.folder / "log")

    def generate(self, **places) -> tuple[int, str]:
        return run(*self.command(**places), log=self.folder / "log")

    def verify(self, *options: object) -> tuple[int, str]:
        return run("cache", "verify", "--store", self.store, *options, log=self.folder / "log", cwd=self.folder)

    def fill(self) -> None:
        code, said = self.generate()
        assert code == 0, said

    def finish(self, **places) -> int:
        """The same command again: it must end well, with the undisturbed selection; how many rows it made."""
        code, said = self.generate(**places)
        assert code == 0, said
        assert contents(places.get("out", self.out)) == self.undisturbed
        return made(said)


def made(said: str) -> int:
    (line,) = [line for line in said.splitlines() if "made now" in line]
    return int(line.split()[2].replace(",", ""))


@dataclass(frozen=True)
class Outcome:
    """A line of the table in the docs."""

    fault: str
    happened: str
    lost: str

    def __str__(self) -> str:
        return f"| {self.fault} | {self.happened} | {self.lost} |"


OUTCOMES: dict[str, Outcome] = {}


@pytest.fixture(scope="module")
def undisturbed(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts = make_prompts(folder / "prompts.parquet", train=PROMPTS, validation=5)
    lab = Lab(folder, teacher, prompts, {})
    lab.fill()
    assert len(rows_in(lab.store)) == ALL
    return lab


@pytest.fixture
def lab(undisturbed, tmp_path):
    return Lab(tmp_path, undisturbed.teacher, undisturbed.prompts, contents(undisturbed.out))


@pytest.fixture
def filled(lab, undisturbed):
    """A lab whose store and selection are complete."""
    shutil.copytree(undisturbed.store, lab.store)
    shutil.copytree(undisturbed.out, lab.out)
    return lab


@pytest.fixture
def note(request):
    """Enters an outcome into the table."""

    def enter(fault: str, happened: str, lost: str) -> None:
        OUTCOMES[request.node.name] = Outcome(fault, happened, lost)

    return enter


def written(rows: int) -> str:
    return "nothing that was written" if rows == 0 else f"{rows} written rows"


# Processes that end before their time


def test_kill_9_at_any_moment(lab, note):
    """A dozen kills in one job, from the first shard on to the selection; then the rest, undisturbed."""
    lost, kept = 0, 0
    for moment in range(12):
        before = set(rows_in(lab.store))
        process = lab.start()
        if moment % 3 == 2:  # while the teacher is still being loaded
            process.wait_for(lambda process=process: process.output.count("loading the teacher") > 0)
        else:  # after so many more shards
            wanted = len(shards(lab.store)) + moment % 3 * 3 + 1
            process.wait_for(lambda wanted=wanted: len(shards(lab.store)) >= wanted)
        process.send(signal.SIGKILL)
        assert process.wait() == 128 + signal.SIGKILL
        assert not (lab.out / "manifest.json").exists()
        after = rows_in(lab.store)
        lost += len(before - set(after))
        kept = len(after)
    assert 0 < kept < ALL
    assert lab.finish() == ALL - kept
    assert len(rows_in(lab.store)) == len(set(rows_in(lab.store))) == ALL
    note("`kill -9`, 12 times in one job", "the same command went on each time", written(lost))


def test_kill_9_while_the_selection_is_written(filled, note):
    """An earlier selection stays until the new one is whole, or it is seen to be no selection."""
    seen = []
    for _ in range(40):
        process = filled.start()
        while process.process.is_alive() and not any(path.name.startswith(".tmp-") for path in filled.out.iterdir()):
            pass
        process.send(signal.SIGKILL)
        if process.wait() == 128 + signal.SIGKILL:  # else it was over before it was seen to write
            files = contents_of_files(filled.out)
            seen.append({name: files[name] for name in files if not name.startswith(".tmp-")} == filled.undisturbed)
        if len(seen) == 6:
            break
    assert seen == [True] * 6
    assert filled.finish() == 0
    note("`kill -9` while a selection is rewritten", "the earlier selection stayed whole", written(0))


def test_kill_9_while_another_selection_takes_its_place(filled, note):
    """With another k, so that not one file stays what it was; killed a little later each time."""
    seen = []
    for moment in range(60):
        process = filled.start(k=12 if moment % 2 else 8)
        process.wait_for(lambda: any(path.name.startswith(".tmp-") for path in filled.out.iterdir()))
        time.sleep(moment % 12 * 0.01)
        process.send(signal.SIGKILL)
        if process.wait() == 128 + signal.SIGKILL:
            selection = Selection(filled.out)  # every file is what the manifest says
            seen.append(selection.manifest["k"])
            assert {row.k for part in selection.parts for row in selection.rows(part)} == {seen[-1]}
        if len(seen) == 12:
            break
    assert len(seen) == 12 and set(seen) <= {8, 12, 16}
    assert filled.finish() == 0
    note("`kill -9` while another selection takes its place", "one of the two was whole each time", written(0))


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_an_interrupt_keeps_also_what_was_not_yet_written(lab, note, number, name):
    """No shard is full yet when it comes, so that what is kept was written because of it."""
    for delay in (0.2, 0.5, 1, 2, 4):  # until it comes after the first answers
        process = lab.start(rows_per_shard=10 * ALL)
        process.wait_for(lambda process=process: "loading the teacher" in process.output)
        time.sleep(delay)
        process.send(number)
        assert process.wait() == 128 + number, process.output
        if kept := len(rows_in(lab.store)):
            break
    assert 0 < kept < ALL
    assert "interrupted. What was made so far is kept; run the same command to go on" in process.output
    assert "Traceback" not in process.output and not list(lab.store.rglob(".tmp-*"))
    assert lab.finish() == ALL - kept
    note(f"{name} (exit {128 + number})", "unwritten rows were written, the message says what to do", written(0))


SIGNALS_AT_ONCE = {
    "Ctrl-C again and again until it ends (exit 130)": (signal.SIGINT,),
    "SIGTERM together with Ctrl-C (exit 143 or 130)": (signal.SIGTERM, signal.SIGINT),
}


@pytest.mark.parametrize("fault", SIGNALS_AT_ONCE)
def test_signals_that_follow_an_interrupt_cut_nothing_off(lab, note, fault):
    """Answers come in batches of 64, so that some always wait to be written when a shard of 100 is full."""
    numbers = SIGNALS_AT_ONCE[fault]
    process = lab.start(rows_per_shard=100)
    process.wait_for(lambda: shards(lab.store))
    process.storm(*numbers)
    assert process.wait() - 128 in numbers, process.output
    assert "interrupted. What was made so far is kept; run the same command to go on" in process.output
    assert "Traceback" not in process.output and not list(lab.store.rglob(".tmp-*"))
    kept = rows_in(lab.store)
    answered = int(re.findall(r"sampling: (\d+)/\d+", process.output)[-1])
    assert 100 < answered == len(set(kept)) == len(kept) < ALL
    assert lab.finish() == ALL - len(kept)
    note(fault, "unwritten rows were written, the message says what to do", written(answered - len(kept)))


def test_two_processes_on_one_store(lab, note):
    processes = [lab.start(out=lab.folder / name) for name in ("a", "b")]
    assert [process.wait() for process in processes] == [0, 0]
    for name in ("a", "b"):
        assert contents(lab.folder / name) == lab.undisturbed
    keys = rows_in(lab.store)
    assert len(set(keys)) == ALL
    assert lab.finish() == 0
    note("two processes fill one store", "both ended with the same selection, no row twice in it", written(0))


def test_the_same_command_twice_at_once(lab, note):
    processes = [lab.start() for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(lab.out) == lab.undisturbed and set(rows_in(lab.store)) and lab.finish() == 0
    note(
        "the same command runs twice at once",
        "both ended with the same selection, written once after the other",
        written(0),
    )


def test_two_processes_one_of_them_killed(lab, note):
    killed, other = lab.start(out=lab.folder / "a"), lab.start(out=lab.folder / "b")
    killed.wait_for(lambda: len(shards(lab.store)) >= 4)
    killed.send(signal.SIGKILL)
    assert (killed.wait(), other.wait()) == (128 + signal.SIGKILL, 0)
    assert contents(lab.folder / "b") == lab.undisturbed
    assert lab.finish(out=lab.folder / "a") == 0
    note("two processes fill one store, one is killed", "the other ended as if it were alone", written(0))


# Disks


@contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@needs_mount
def test_a_full_disk_under_the_store(lab, note):
    with small_disk(lab.store, "400k") as remount:
        code, said = lab.generate()
        assert code == 2 and "No space left on device" in said and "Free space or make it writable" in said, said
        assert "Traceback" not in said and not list(lab.store.rglob(".tmp-*"))
        before = set(rows_in(lab.store))
        assert 0 < len(before) < ALL
        remount("size=50m")
        again = lab.finish()
        lost = before - set(rows_in(lab.store))
    assert again == ALL - len(before)
    note("the store's disk is full (exit 2)", "the message names the folder and the cause", written(len(lost)))


@needs_mount
def test_a_full_disk_under_the_selection(filled, note):
    out = filled.folder / "small"
    size = sum(map(len, filled.undisturbed.values()))
    with small_disk(out, f"{int(1.5 * size) // 1024}k"):
        filled.finish(out=out)
        for k in (16, 12):  # the same again, and another one
            code, said = filled.generate(out=out, k=k)
            assert code == 2 and "No space left on device" in said, said
            assert contents(out) == filled.undisturbed
    assert filled.finish(out=out) == 0
    note("the selection's disk is full (exit 2)", "the earlier selection stayed whole", written(0))


@needs_mount
def test_a_store_that_can_only_be_read(lab, undisturbed, note):
    with small_disk(lab.store, "50m") as remount:
        remount("ro")
        code, said = lab.generate()
        assert code == 2 and "Read-only file system" in said and "loading the teacher" not in said, said
        remount("rw")
        shutil.copytree(undisturbed.store, lab.store, dirs_exist_ok=True)
        remount("ro")
        assert lab.finish() == 0
    note(
        "the store is read-only", "cached rows were served; exit 2 before the teacher is loaded if any lack", written(0)
    )


@needs_mount
def test_a_selection_folder_that_can_only_be_written_to_by_others(lab, note):
    with small_disk(lab.out, "10m") as remount:
        remount("ro")
        code, said = lab.generate()
        assert code == 2 and f"cannot write to {lab.out}" in said and "loading the teacher" not in said, said
    assert lab.finish() == ALL
    note("the output folder is read-only (exit 2)", "said before the teacher is loaded", written(0))


# Damage


def flip(shard: Path, store: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)


def truncate(shard: Path, store: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 100)


def empty(shard: Path, store: Path) -> None:
    os.truncate(shard, 0)


def overwrite(shard: Path, store: Path) -> None:
    shutil.copyfile(next(other for other in shards(store) if other != shard), shard)


def foreign(shard: Path, store: Path) -> None:
    """A whole, rightly named shard of another request takes its place."""
    other = next(other for other in shards(store) if other.parent != shard.parent)
    shutil.move(other, shard.parent / other.name)
    shard.unlink()


def remove(shard: Path, store: Path) -> None:
    shard.unlink()


def renamed(shard: Path, store: Path) -> None:
    shard.rename(shard.with_name("part-0123456789abcdef.parquet"))


def rewritten(shard: Path, change: Callable) -> None:
    """Other rows under a name that fits them: only a look at the rows can tell."""
    rows, metadata = from_table(pq.read_table(shard)), read_metadata(shard)
    write_shard(shard, [change(rows[0]), *rows[1:]], metadata)
    shard.rename(shard.with_name(f"part-{sha256_file(shard)[:16]}.parquet"))


def forged(shard: Path, store: Path) -> None:
    """The columns of something else under a name that fits them."""
    pq.write_table(pa.table({"key": ["a"], "x": [1]}), shard)
    shard.rename(shard.with_name(f"part-{sha256_file(shard)[:16]}.parquet"))


DAMAGES = {
    flip: ("a bit flips in a shard", "its content does not match its name"),
    truncate: ("a shard is cut short", "its content does not match its name"),
    empty: ("a shard is emptied", "its content does not match its name"),
    overwrite: ("a shard is overwritten by another one", "its content does not match its name"),
    renamed: ("a shard is renamed", "its content does not match its name"),
    foreign: ("a shard is replaced by one of another request", "it answers another teacher or request"),
    forged: ("a shard is replaced by some other Parquet file", "the footer has no xkd metadata"),
    remove: ("a shard is deleted", None),
}


def biggest(lab: Lab) -> Path:
    """A shard of the request that was sampled."""
    return max(shards(lab.store), key=lambda path: pq.read_metadata(path).num_rows * 10**6 + len(path.name))


@pytest.mark.parametrize("verified", [False, True], ids=["met", "verified"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_set_aside_and_repaired_exactly(filled, note, damage, verified):
    fault, reason = DAMAGES[damage]
    complete = set(rows_in(filled.store))
    damage(biggest(filled), filled.store)
    intact = set(rows_in_readable(filled.store))
    if verified and reason:
        code, said = filled.verify()
        assert code == 1 and reason in said and "(set aside)" in said, said
        assert filled.verify()[0] == 0 and list(filled.store.rglob("damaged/*"))
    if not verified or reason is None:
        code, said = filled.generate()
        assert code == 0 and (reason is None or reason in said), said
        assert contents(filled.out) == filled.undisturbed
        again = made(said)
    else:
        again = filled.finish()
    assert again == len(complete - intact) and set(rows_in(filled.store)) == complete
    assert filled.verify()[0] == 0
    how = "named, set aside" if reason else "seen"
    note(fault, f"{how}; exactly its rows made again, the selection as before", "the shard's rows, made again")


def test_a_folder_in_a_shards_place_is_refused(filled, note):
    complete, shard = set(rows_in(filled.store)), biggest(filled)
    shard.unlink()
    shard.mkdir()
    for command, expected in ((filled.verify, 1), (filled.generate, 2)):
        code, said = command()
        assert code == expected and f"Move what is at {shard} out of the way" in said, said
    shard.rmdir()
    assert filled.finish() <= ROWS_PER_SHARD and set(rows_in(filled.store)) == complete
    note(
        "a folder is in a shard's place (exit 2)",
        "named, and stayed; once it was moved away the shard's rows were made again",
        "the shard's rows, made again",
    )


def rows_in_readable(store: Path) -> list[str]:
    """Keys of the shards that are what their name says, in the folder of their request."""
    found = []
    for shard in shards(store):
        if shard.is_file() and sha256_file(shard).startswith(shard.stem.removeprefix("part-")):
            schema = pq.read_schema(shard)
            request = json.loads((shard.parent / "request.json").read_text())
            if json.loads((schema.metadata or {}).get(b"xkd", b"{}")).get("request") == request:
                found += pq.read_table(shard, columns=["key"]).column(0).to_pylist()
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: replace(row, key="0" * 32), "has a key that does not fit its tokens"),
        (lambda row: replace(row, topk_ids=row.topk_ids[:, ::-1], topk_logprobs=row.topk_logprobs[:, ::-1]), "order"),
        (lambda row: replace(row, topk_ids=row.topk_ids + 10**6), "outside the vocabulary"),
        (lambda row: replace(row, lse=row.lse * float("nan")), "normalisers that are not finite"),
        # Seen by the counts of the file, or where the row has one token, whose absence counts as a value, by its own.
        (lambda row: replace(row, logprobs=row.logprobs[:-1]), "does not have"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_are_found_by_verify(filled, note, change, reason):
    complete = set(rows_in(filled.store))
    rewritten(biggest(filled), change)
    code, said = filled.verify("--dry-run")
    assert code == 1 and reason in said and "(set aside)" not in said, said
    assert filled.verify()[0] == 1
    assert 0 < filled.finish() <= ROWS_PER_SHARD and set(rows_in(filled.store)) == complete
    note(
        "a forged shard with a fitting name",
        "`cache verify` named the row and set the shard aside",
        "the shard's rows, made again",
    )


# What describes


def stale_number(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"]["train"]["tokens"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "it is stale"


def stale_keys(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    keys = manifest["parts"]["train"]["keys"]
    first, second = list(keys)[:2]
    keys[first], keys[second] = keys[second], keys[first]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "it is stale"


def torn_manifest(folder: Path) -> str:
    os.truncate(folder / "manifest.json", 1000)
    return "is damaged"


def rows_file(folder: Path) -> Path:
    (path,) = folder.glob("train-*.parquet")
    return path


def changed_rows(folder: Path) -> str:
    flip(rows_file(folder), folder)
    return "its content is not what manifest.json says"


def missing_rows(folder: Path) -> str:
    rows_file(folder).unlink()
    return "it is missing"


def unlisted_rows(folder: Path) -> str:
    shutil.copyfile(rows_file(folder), folder / "train-00001-0123456789ab.parquet")
    return "manifest.json does not list it"


STALE = {
    stale_number: "a manifest counts other tokens than its rows have",
    stale_keys: "a manifest lists other keys than its rows have",
    torn_manifest: "a manifest is cut short",
    changed_rows: "a bit flips in a selection's file",
    missing_rows: "a selection's file is deleted",
    unlisted_rows: "a selection has a file more than its manifest",
}


@pytest.mark.parametrize("damage", STALE, ids=lambda damage: damage.__name__)
def test_a_selection_that_is_not_what_its_manifest_says(filled, note, damage):
    reason = damage(filled.out)
    code, said = filled.verify("--selection", filled.out)
    assert code == 1 and reason in said, said
    assert filled.finish() == 0
    assert filled.verify("--selection", filled.out)[0] == 0
    note(STALE[damage], "named, set aside; the selection was written again without the teacher", written(0))


def test_descriptions_that_are_not_of_their_folder(filled, note):
    teacher, request = next(filled.store.glob("*/teacher.json")), next(filled.store.glob("*/*/request.json"))
    teacher.write_text("{torn")
    request.write_text(json.dumps(json.loads(request.read_text()) | {"template": "other"}))
    (request.parent / "skipped.jsonl").write_bytes(b'{"key": "a", "reas\xff\n[1]\nnull\n')
    code, said = filled.verify()
    assert code == 1 and said.count("it does not describe its folder") == 2, said
    assert "3 of its lines are not entries and are ignored" in said
    shards(filled.store)[0].unlink()
    assert filled.finish() > 0
    code, said = filled.verify()
    assert said.count("Then: ") == 1 and "1 problems" in said and "not entries" in said, said
    note(
        "teacher.json, request.json or skipped.jsonl is damaged",
        "named, set aside or ignored, written anew",
        written(0),
    )


def test_the_docs_have_the_table_that_these_tests_fill():
    ours = [name for name in globals() if name.startswith("test_")]
    if len({name.split("[")[0] for name in OUTCOMES}) < len(ours) - 1:
        pytest.skip("not all faults were tried")
    table = list(dict.fromkeys(map(str, OUTCOMES.values())))
    docs = (ROOT / "docs" / "faults.md").read_text()
    missing = [line for line in table if line not in docs]
    assert not missing, "docs/faults.md lacks:\n" + "\n".join(missing)
    listed = [line for line in docs.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert set(listed) == set(table), f"nothing was tried of: {set(listed) - set(table)}"
