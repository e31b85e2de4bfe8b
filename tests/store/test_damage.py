"""What holds for stores and selections that are not what they should be, in ways that no accident does alone.

Shards get fitting names after they were changed, so that only a look inside can tell; descriptions are of the wrong
shape; folders and files take each other's place. Whatever it is: `verify` names it, `generate` ends with the selection
as it was, and `gc` removes nothing that may be of use.
"""

import json
import multiprocessing
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.files import sha256_file, write_json_atomically
from pipeline.store.checks import check_shard
from pipeline.store.manifest import sealed
from pipeline.store.schema import METADATA_KEY, from_table, read_metadata, write_row_groups, write_shard
from pipeline.store.selection import Selection
from pipeline.store.storage import Storage
from pipeline.store.training_rows import TeacherRows
from pipeline.store.users import named, users_of
from pipeline.upkeep import verify as verifying
from pipeline.upkeep.catalogue import catalogue
from pipeline.upkeep.collect import garbage, in_use
from pipeline.upkeep.export import export, splits_of_request, splits_of_selection
from pipeline.upkeep.verify import Problem, verify_selection, verify_store
from stages.generate import generate
from tests.conftest import at_once, make_prompts
from tests.stages.test_generate import Recorder, contents, stub_params


class Lab:
    """A complete store of the stub's answers, and a selection of it."""

    def __init__(self, folder: Path, teacher: Path, *overrides: str):
        self.store, self.out, self.folder, self.teacher = folder / "store", folder / "out", folder, teacher
        self.params = stub_params(teacher, *overrides)
        self.prompts = make_prompts(folder / "prompts.parquet", train=20, validation=5)
        self.generate()
        self.undisturbed = contents(self.out)

    def generate(self, engine=None) -> int:
        """How many rows were made."""
        return generate(self.params, self.prompts, self.out, self.store, engine=engine).made

    def verify(self, set_aside: bool = True) -> list[Problem]:
        found = list(verify_store(Storage(self.store), "", set_aside, lambda: None))
        return found + list(verify_selection(self.out, self.store, set_aside))

    def garbage(self, *forget: str) -> list[str]:
        storage = Storage(self.store)
        return [each.name for each in garbage(storage, in_use(storage, (), named(users_of(storage)[0], forget)))]

    @property
    def shards(self) -> list[Path]:
        return sorted(self.store.glob("*/*/part-*.parquet"))

    @property
    def sampled(self) -> Path:
        """A shard with drawn responses."""
        return next(shard for shard in self.shards if read_metadata(shard)["request"]["kind"] == "sample")

    def forge(self, change=None, **footer) -> str:
        """Change a shard's first row or its footer, and name it after its new content; returns that name."""
        shard = self.sampled
        rows, metadata = from_table(pq.read_table(shard)), read_metadata(shard)
        if change:
            write_shard(shard, [change(rows[0]), *rows[1:]], metadata)
        else:
            changed = {name: value for name, value in (metadata | footer).items() if value is not ...}
            table = pq.read_table(shard).replace_schema_metadata({METADATA_KEY: json.dumps(changed)})
            pq.write_table(table, shard)
        named = shard.with_name(f"part-{sha256_file(shard)[:16]}.parquet")
        shard.rename(named)
        return named.name

    def restored(self) -> bool:
        """After another `generate`: is everything as it was?"""
        self.generate()
        return contents(self.out) == self.undisturbed and not self.verify()


@pytest.fixture
def lab(teacher, tmp_path):
    return Lab(tmp_path, teacher)


@pytest.fixture
def thin(teacher, tmp_path):
    """Its selection leaves the rows in the store."""
    return Lab(tmp_path, teacher, "generate.materialize=false")


# Shards


@pytest.mark.parametrize(
    ("footer", "reason"),
    [
        ({"teacher": ...}, "no valid teacher"),
        ({"teacher": None}, "no valid teacher"),
        ({"teacher": [1]}, "no valid teacher"),
        ({"k": ...}, "no valid k"),
        ({"k": "8"}, "no valid k"),
        ({"k": 12}, "not have the 12 tokens per position"),
        ({"vocab_size": ...}, "no valid vocab_size"),
        ({"rows": ...}, "counts None rows"),
        ({"rows": 10**6}, "counts 1000000 rows"),
        ({"tokens": ...}, "counts None tokens"),
        ({"tokens": 10**6}, "counts 1000000 tokens"),
        ({"engine": "x"}, "no valid engine"),
        ({"request": {"kind": "score"}}, "another teacher or request"),
        ({"schema_version": 3}, "schema version 3"),
        ({"schema_version": 1}, "columns are not those of a shard"),
        ({"support": ...}, "no valid support"),
        ({"support": "nucleus"}, "no valid support"),
        ({"support": None}, "no valid support"),
        ({"support": "topk"}, "not have the tau and tail of its support, topk"),
    ],
    ids=str,
)
def test_a_footer_that_is_not_of_its_rows_is_damage(lab, footer, reason):
    name = lab.forge(**footer)
    (problem,) = lab.verify(set_aside=False)
    assert problem.file.endswith(name) and reason in problem.what and not problem.aside
    assert 0 < lab.generate() <= 8 and (lab.store / Path(problem.file).parent / "damaged" / name).exists()
    assert lab.restored()


ROWS = {
    "a token twice": lambda r: replace(r, topk_ids=np.repeat(r.topk_ids[:, :1], r.k, axis=1)),
    "of probability 8": lambda r: replace(r, topk_logprobs=np.zeros_like(r.topk_logprobs)),
    "of probability 0": lambda r: replace(r, topk_logprobs=np.full_like(r.topk_logprobs, -1000)),
    "log-probabilities above 0": lambda r: replace(r, logprobs=np.ones_like(r.logprobs)),
    "a top k with": lambda r: replace(r, topk_logprobs=np.full_like(r.topk_logprobs, np.nan)),
    "that are NaN or infinite": lambda r: replace(r, topk_logprobs=np.full_like(r.topk_logprobs, -np.inf)),
    "outside the vocabulary": lambda r: replace(r, response_ids=r.response_ids + 1000),
    "not those of its tokens": lambda r: replace(
        r, response_ids=r.topk_ids[:, 0], logprobs=r.topk_logprobs[:, 0].astype(np.float32) - 1
    ),
    "likelier than those in it": lambda r: replace(
        r, response_ids=np.full_like(r.response_ids, _unlisted(r)), logprobs=np.zeros_like(r.logprobs)
    ),
    "of its tokens that are not finite": lambda r: replace(r, logprobs=np.full_like(r.logprobs, -np.inf)),
    "unknown origin or finish: 'teacher', 'banana'": lambda r: replace(r, finish="banana"),
    "has no finish": lambda r: replace(r, finish=None),
    "has no prompt and no response": lambda r: replace(r, prompt=None, response=None),
    "unknown origin or finish: 'me'": lambda r: replace(r, origin="me"),
    "a key that does not fit its tokens": lambda r: replace(r, sample=9),
    "at most 6 were asked for": lambda r: replace(
        r, **{name: np.repeat(getattr(r, name), 9, axis=0) for name in _ALONG if getattr(r, name) is not None}
    ),
    "one log-probability and normaliser": lambda r: replace(r, lse=None),
}  # fmt: skip
_ALONG = ("response_ids", "logprobs", "topk_ids", "topk_logprobs", "lse", "tau", "tail")
SAMPLED = {
    "whose weights sum to": lambda r: replace(r, tau=r.tau * 1.2),
    "sum to 0.": lambda r: replace(r, tau=r.tau * 0),
    "a tau of 2": lambda r: replace(r, tau=np.full_like(r.tau, 2)),
    "values of tau that are negative": lambda r: replace(r, tau=-r.tau),
    "tau that are negative or not finite": lambda r: replace(r, tau=r.tau * np.nan),
    "not have the tau and tail of its support, sampled": lambda r: replace(r, tail=r.tau),
    "not kept and is likelier than its tau": lambda r: replace(
        r, response_ids=np.full_like(r.response_ids, _unlisted(r)), logprobs=np.zeros_like(r.logprobs)
    ),
    "its top k out of order": lambda r: replace(
        r, topk_ids=r.topk_ids[:, ::-1], topk_logprobs=r.topk_logprobs[:, ::-1]
    ),
}  # fmt: skip
PLAIN = {
    "a tail of 0.9": lambda r: replace(r, tail=np.full_like(r.tail, 0.9)),
    "values of tail that are negative": lambda r: replace(r, tail=-r.tail),
    "not have the tau and tail of its support, topk": lambda r: replace(r, tau=r.tail),
}


def _unlisted(row) -> int:
    return min(set(range(40)) - set(row.topk_ids.ravel().tolist()))


@pytest.mark.parametrize(("support", "reason"), [
    *(("topk", reason) for reason in ROWS | PLAIN),
    *(("sampled", reason) for reason in SAMPLED),
])  # fmt: skip
def test_rows_that_nobody_can_have_said_are_found_by_verify(teacher, tmp_path, support, reason):
    lab = Lab(tmp_path, teacher, f"generate.support={support}")
    name = lab.forge((ROWS | PLAIN if support == "topk" else SAMPLED)[reason])
    problems = lab.verify()
    assert [p.file.rpartition("/")[2] for p in problems] == [name] and problems[0].aside
    assert reason in problems[0].what, problems
    assert lab.restored()


@pytest.mark.parametrize("name", ["topk_ids", "topk_logprobs", "prompt_ids"])
def test_lists_of_the_wrong_length_are_repaired_or_named_never_served(lab, name):
    """Also where the counts of the whole shard still agree, so that only the rows tell."""
    shard = lab.sampled
    rows, metadata = from_table(pq.read_table(shard)), read_metadata(shard)
    first, second = (getattr(row, name).ravel() for row in rows[:2])
    changed = [replace(rows[0], **{name: first[:-1]}), replace(rows[1], **{name: np.append(second, second[-1:])})]
    write_row_groups(shard, [[*changed, *rows[2:]]], metadata)
    shard.rename(shard.with_name(f"part-{sha256_file(shard)[:16]}.parquet"))
    if name != "prompt_ids":
        with pytest.raises(UserError, match=r"cannot be read.*cache verify"):
            lab.generate()
    (problem,) = lab.verify()
    assert "row " in problem.what and problem.aside
    assert lab.restored()


def test_a_shard_that_cannot_be_read_now_is_left_alone(lab, monkeypatch):
    """A good shard is neither made again nor offered to gc because a disk or a permission fails."""

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pipeline.store.checks.sha256_file", fail)
    with pytest.raises(UserError, match=r"cannot read .*part-.*Permission denied"):
        lab.generate()
    assert all("Permission denied" in each.what and not each.aside for each in lab.verify()) and len(lab.verify()) == 8
    with pytest.raises(UserError, match="Permission denied"):
        lab.garbage()
    monkeypatch.undo()
    assert lab.restored() and len(lab.shards) == 8


def test_an_export_refuses_to_leave_rows_out_and_leaves_nothing_half_done(thin):
    name = "/".join(thin.sampled.parent.parts[-2:])
    os.truncate(thin.sampled, 100)
    with pytest.raises(UserError, match=r"damaged shards, whose rows would be missing.*cache verify"):
        splits_of_request(Storage(thin.store), name)
    with pytest.raises(UserError, match="no longer in the store"):
        export(*splits_of_selection(Selection(thin.out, thin.store)), thin.folder / "exported")
    assert not list((thin.folder / "exported").iterdir())


# Places


def in_place_of(path: Path) -> None:
    """A folder with something in it where a file was."""
    path.unlink(missing_ok=True)
    (path / "inside").mkdir(parents=True)
    (path / "inside" / "precious").write_text("mine")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's path must be short
        made.bind(path.name)
        os.chdir(before)


def device(path: Path) -> None:
    path.symlink_to("/dev/null")


def move_away(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


OF_THE_STORE = ["*/teacher.json", "*/*/request.json", "*/*/skipped.jsonl", "*/*/part-*.parquet", "references/*.json"]
in_the_way = pytest.mark.parametrize("put", [in_place_of, pipe, socket_file, device], ids=lambda put: put.__name__)


@in_the_way
@pytest.mark.parametrize("name", OF_THE_STORE)
def test_what_is_no_file_in_the_stores_is_named_and_refused_and_hangs_nobody(lab, name, put):
    path = lab.sampled.parent / "skipped.jsonl" if "skipped" in name else next(lab.store.glob(name))
    for shard in lab.shards:  # so that all is to be made
        shard.unlink()
    path.unlink(missing_ok=True)
    put(path)
    with at_once():
        for read in (lambda: list(catalogue(Storage(lab.store))), lab.garbage):
            with suppress(UserError):
                read()
        assert any(str(path) in problem.what and not problem.aside for problem in lab.verify())
        with pytest.raises(UserError, match=f"Move what is at {path} out of the way"):
            lab.generate()
    move_away(path)  # nobody else did
    assert lab.restored()


@in_the_way
@pytest.mark.parametrize("pattern", ["manifest.json", "train-*.parquet"])
def test_what_is_no_file_in_a_selections_is_named_and_refused_and_hangs_nobody(lab, pattern, put):
    (path,) = lab.out.glob(pattern)
    path.unlink()
    put(path)
    with at_once():
        with pytest.raises(UserError, match=f"Move what is at {path} out of the way"):
            Selection(lab.out)
        assert not lab.garbage()
        (problem,) = lab.verify()
        assert problem.file == str(path) and not problem.aside
        with pytest.raises(UserError, match=rf"{path} is not what xkd-pipeline writes.*Move it away"):
            lab.generate()
    move_away(path)  # nobody else did
    assert lab.restored()


def test_what_goes_while_verify_looks_is_no_problem(lab):
    """`gc`, in the middle of it: all the files that were listed go, in gc's order."""
    listed = [path for path in sorted(lab.store.rglob("*")) if path.is_file()]

    def remove() -> None:
        for path in sorted(listed, key=lambda path: path.name == "teacher.json"):
            path.unlink(missing_ok=True)

    assert list(verify_store(Storage(lab.store), "", True, remove)) == []


def test_a_shard_that_goes_between_two_looks_at_it_is_no_problem(lab, monkeypatch):
    def check_and_remove(path: Path, *identities: str):
        header = check_shard(path, *identities)
        path.unlink()
        return header

    monkeypatch.setattr(verifying, "check_shard", check_and_remove)
    assert lab.verify() == [] and not lab.shards


def test_what_generate_sets_aside_while_verify_looks_is_no_problem(lab):
    shard = lab.shards[-1]

    def damage_and_generate() -> None:
        if not list(lab.store.rglob("damaged")):
            os.truncate(shard, 100)
            assert lab.generate() > 0

    assert list(verify_store(Storage(lab.store), "", True, damage_and_generate)) == []
    assert not lab.verify()


def test_a_reference_or_shard_that_goes_while_the_store_is_listed_is_passed_over(lab, monkeypatch):
    find, gone = Storage.find, [*lab.shards[:1], *lab.store.glob("references/*.json")]

    def listed(storage, folder=""):
        found = find(storage, folder)
        for path in gone:
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Storage, "find", listed)
    assert users_of(Storage(lab.store)) == ([], [])
    assert not [name for info in catalogue(Storage(lab.store)) for name in info.unreadable]


def test_a_selection_that_is_replaced_while_verify_looks_is_no_problem(lab, monkeypatch):
    """In the moment in which its first file is read."""
    fault, calls = verifying.file_fault, []

    def replaced(folder, file):
        calls.append(file)
        if len(calls) == 1:
            generate(stub_params(lab.teacher, "generate.k=4"), lab.prompts, lab.out, lab.store)
        return fault(folder, file)

    monkeypatch.setattr(verifying, "file_fault", replaced)
    assert list(verify_selection(lab.out, lab.store, True)) == []
    assert Selection(lab.out).manifest["k"] == 4


@pytest.mark.parametrize("name", ["a::b", "s3::x", "memory:", "file::y"])
def test_a_folder_is_never_taken_for_a_url(teacher, tmp_path, name):
    lab = Lab(tmp_path / name, teacher)
    assert lab.store.is_dir() and not lab.verify() and not lab.garbage() and lab.generate() == 0
    assert [info.rows for info in catalogue(Storage(lab.store))]
    os.truncate(lab.sampled, 100)
    assert lab.verify()[0].aside and lab.restored()
    shutil.rmtree(lab.out)
    assert len(lab.garbage("all")) > 8


@pytest.mark.parametrize("depth", [1, 2])
def test_a_file_in_a_folders_place_is_named_and_refused(lab, depth):
    folder = lab.sampled.parent if depth == 2 else lab.sampled.parent.parent
    shutil.rmtree(folder)
    folder.write_text("mine")
    problem = lab.verify()[0]
    assert problem.what == "it is not a folder" and not problem.aside
    with pytest.raises(UserError, match=f"Move what is at {folder} out of the way"):
        lab.generate()
    assert folder.read_text() == "mine"
    folder.unlink()
    assert lab.restored()


def test_a_store_that_is_a_file_is_refused(lab):
    shutil.rmtree(lab.store)
    lab.store.write_text("mine")
    with pytest.raises(UserError, match="is a file: move it away"):
        lab.generate()


def test_a_request_that_moved_to_another_disk_is_looked_at_through_its_link(lab):
    request = lab.sampled.parent
    shutil.move(request, lab.folder / "elsewhere")
    request.symlink_to(lab.folder / "elsewhere")
    assert lab.generate() == 0 and not lab.verify() and not lab.garbage()
    os.truncate(lab.sampled, 50)
    assert len(lab.verify()) == 1 and lab.restored()


def test_a_temporary_file_that_goes_while_the_store_is_listed_is_passed_over(lab, monkeypatch):
    walk = os.walk

    def listed(*given, **more):
        return ((at, folders, [*names, ".tmp-gone"]) for at, folders, names in walk(*given, **more))

    monkeypatch.setattr("pipeline.store.storage.os.walk", listed)
    assert Storage(lab.store).find().keys() and not lab.verify() and not lab.garbage()


# Descriptions


@pytest.mark.parametrize(
    "line",
    ['{"key": ["a"], "prompt_id": "x", "reason": "y"}', '{"key": null}', "[" * 100_000, '{"key": "a", "reason": 5}'],
    ids=lambda line: line[:20],
)
def test_a_line_of_skipped_jsonl_that_is_no_entry_is_ignored_and_named(lab, line):
    (lab.sampled.parent / "skipped.jsonl").write_text(line + "\n")
    assert lab.generate() == 0 and contents(lab.out) == lab.undisturbed
    assert "1 of its lines are not entries" in lab.verify()[0].what


def deeper(manifest: dict) -> None:
    manifest["parts"]["train"]["keys"] = None


EDITS = {
    "a part is dropped": lambda m: m["parts"].pop("train"),
    "a part is another one": lambda m: m["parts"].update(train=m["parts"]["validation"]),
    "files are null": lambda m: m["parts"]["train"].update(files=None),
    "files are none": lambda m: m["parts"]["train"].update(files=[]),
    "a count": lambda m: m["parts"]["train"].update(rows=100),
    "no count": lambda m: m["parts"]["train"].pop("rows"),
    "another teacher": lambda m: m["teacher"].update(identity="0" * 16),
    "no request": lambda m: m["parts"]["train"].pop("request"),
    "k is a text": lambda m: m.update(k="8"),
    "more skipped": lambda m: m.update(skipped=9),
    "materialized is a text": lambda m: m.update(materialized="false"),
    "something new": lambda m: m.update(note="mine"),
    "no seal": lambda m: m.pop("sha256"),
    "keys are null": deeper,
}


@pytest.mark.parametrize("edit", EDITS)
def test_whatever_is_edited_in_a_manifest_is_seen_and_costs_no_row(lab, edit):
    manifest = json.loads((lab.out / "manifest.json").read_text())
    EDITS[edit](manifest)
    (lab.out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json is (stale|damaged).*generate"):
        Selection(lab.out)
    assert not lab.garbage()  # what the selection used is not known: all is kept
    (problem,) = lab.verify()
    assert problem.file.endswith("manifest.json") and problem.aside
    assert not lab.garbage()  # and so it is after the manifest was set aside
    assert lab.generate() == 0 and contents(lab.out) == lab.undisturbed


@pytest.mark.parametrize("other", ["generate.k=12", "seed=5", "generate.samples=1"])
def test_a_manifest_of_another_selection_is_stale_and_its_files_are_left(lab, other):
    manifest = (lab.out / "manifest.json").read_bytes()
    lab.params = stub_params(lab.teacher, other)
    lab.generate()
    made = contents(lab.out)
    (lab.out / "manifest.json").write_bytes(manifest)
    (problem,) = lab.verify()
    assert problem.file == str(lab.out / "manifest.json") and "it is stale" in problem.what and problem.aside
    assert lab.generate() == 0 and contents(lab.out) == made


def test_the_rows_of_a_selection_are_looked_at_too(lab):
    """Its own seal and digests fit, and yet no teacher can have said that."""
    shard, manifest = next(lab.out.glob("train-00000-*.parquet")), json.loads((lab.out / "manifest.json").read_text())
    rows, metadata = from_table(pq.read_table(shard)), read_metadata(shard)
    write_shard(shard, [ROWS["a token twice"](rows[0]), *rows[1:]], metadata)
    manifest["parts"]["train"]["files"][0]["sha256"] = sha256_file(shard)
    write_json_atomically(lab.out / "manifest.json", sealed(manifest))
    (problem,) = lab.verify()
    assert problem.file == str(shard) and "a token twice" in problem.what
    assert lab.restored()


def test_what_a_killed_run_left_is_set_aside_and_the_selection_is_whole_without_it(lab):
    left = lab.out / "train-00000-0123456789ab.parquet"
    shutil.copy(next(lab.out.glob("validation-*.parquet")), left)  # rows that were never these
    assert len(Selection(lab.out).part("train")["keys"]) == 20 and not lab.garbage()
    (problem,) = lab.verify()
    assert (problem.file, problem.what, problem.aside) == (str(left), "manifest.json does not list it", True)
    assert not lab.verify() and lab.restored()


def test_a_selection_that_leaves_its_rows_in_the_store_is_checked_when_it_is_read(thin):
    os.truncate(thin.sampled, 100)
    for read in (lambda: TeacherRows(Selection(thin.out, thin.store), "train"), lambda: thin.verify(set_aside=False)):
        try:
            said = [problem.what for problem in read()][-1]
        except UserError as error:
            said = str(error)
        assert "no longer in the store" in said and "does not match its name" in said
    assert not list(thin.store.rglob("damaged"))  # reading and looking move nothing
    assert thin.restored()
    thin.forge(lambda row: replace(row, lse=row.lse + 1))  # which only the selection's digest can tell
    with pytest.raises(UserError, match="holds other rows than"):
        TeacherRows(Selection(thin.out, thin.store), "train")


# Who uses what


@pytest.mark.parametrize(
    "damage",
    ["", "{", "null", "[1]", '{"selection": null}', "torn", "moved", "folder", "file"],
)
def test_gc_does_not_guess_which_selection_a_damaged_record_was_of(lab, damage):
    ((user,), _) = users_of(Storage(lab.store))
    path = lab.store / user.name
    if damage == "torn":
        os.truncate(path, 20)
    elif damage == "moved":  # it names another selection than its own name is of
        path.write_text(path.read_text().replace(str(lab.out), "/nowhere"))
    elif damage == "folder":
        in_place_of(path)
    elif damage == "file":
        shutil.rmtree(path.parent)
        path.parent.write_text("mine")
    else:
        path.write_text(damage)
    with pytest.raises(UserError, match=r"references"):
        lab.garbage()
    assert "references" in lab.verify()[0].file
    if damage in ("folder", "file"):
        in_the_way = path if damage == "folder" else path.parent
        with pytest.raises(UserError, match=f"Move what is at {in_the_way} out of the way"):
            lab.generate()
        move_away(in_the_way)
    else:
        assert "not a readable record" in lab.verify()[0].what
    lab.generate()  # records its use again
    assert contents(lab.out) == lab.undisturbed and not lab.verify() and not lab.garbage()


def test_gc_keeps_what_verify_has_not_set_aside(thin):
    """A damaged shard makes a selection unreadable; that is no reason to let its other rows go."""
    os.truncate(thin.sampled, 100)
    thin.verify()
    assert not [name for name in thin.garbage() if "damaged/" not in name]
    assert thin.restored()
    renamed = thin.sampled.rename(thin.sampled.with_name("part-0123456789abcdef.parquet"))
    assert not [name for name in thin.garbage() if renamed.name in name]


def test_a_failed_run_with_other_parameters_does_not_free_the_selection_that_is_still_there(thin):
    params = thin.params
    thin.params = stub_params(thin.teacher, "seed=7", "generate.materialize=false")
    with pytest.raises(UserError, match="the engine died"):
        thin.generate(Recorder(thin.teacher, die_after=20))
    assert not thin.garbage() and len(TeacherRows(Selection(thin.out, thin.store), "train")) == 40
    thin.params = params
    assert thin.generate() == 0


def test_gc_touches_nothing_that_is_not_the_stores(lab):
    foreign = ["src/app/main.py", ".git/objects/ab/cd", "notes.txt", f"{'a' * 16}/mine/x", f"{'a' * 16}/{'b' * 16}/x"]
    for name in foreign:
        (lab.store / name).parent.mkdir(parents=True, exist_ok=True)
        (lab.store / name).write_text("mine")
    shutil.rmtree(lab.out)
    assert not lab.garbage()
    found = lab.garbage("all")
    assert len([name for name in found if "part-" in name]) == 8 and not set(found) & set(foreign)


def _generate(lab: Lab, code) -> None:
    try:
        lab.generate()
        code.value = 0
    except BaseException:
        code.value = 1
        raise


def test_the_same_command_twice_at_once_leaves_a_whole_selection(lab):
    context = multiprocessing.get_context("fork")
    for _ in range(6):
        codes = [context.Value("i", -1) for _ in range(3)]
        processes = [context.Process(target=_generate, args=(lab, code)) for code in codes]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [code.value for code in codes] == [0, 0, 0]
        assert contents(lab.out) == lab.undisturbed
