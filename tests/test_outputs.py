"""What holds for outputs: only what the pipeline made is replaced, and what cannot be written is known at once."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli.app import app
from pipeline.errors import UserError
from pipeline.files import write_json_atomically
from pipeline.layout import RESULTS, Layout
from pipeline.models import describe_model, link_model, load_lm, load_tokenizer, require_own_model, weights_digest
from pipeline.outputs import (
    MARK,
    begin_results,
    is_results,
    replacing,
    require_own_file,
    require_own_folder,
    require_own_results,
)
from pipeline.params.file import load_params
from pipeline.store.ownership import require_own_selection
from pipeline.store.selection import Selection
from pipeline.upkeep.export import export, splits_of_selection
from stages.distill import distill
from stages.evaluate import evaluate
from stages.generate import generate
from stages.prepare import prepare
from stages.report import report
from stages.reward import reward
from stages.score import score
from stages.teach import teach
from tests.conftest import ROOT, at_once, make_params
from tests.processes import run
from tests.teacher.test_faults import needs_mount, small_disk
from tests.test_interrupts import ENDING, python

HERE = Layout()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*arguments: object, cwd: Path) -> str:
    """The message of a command that must end with exit code 2 and one line."""
    code, said = run(*arguments, log=cwd / "log", cwd=cwd)
    assert code == 2 and "Traceback" not in said, said
    assert len(said.splitlines()) == 1, said
    return said


# What somebody else made. No input of these commands exists: what they say is about the output, so it came first.


def folder_with(name: str, content: bytes = b"mine"):
    def make(path: Path, teacher: Path) -> None:
        path.mkdir()
        (path / name).write_bytes(content)

    return make


def model_of_somebody(path: Path, teacher: Path) -> None:
    shutil.copytree(teacher, path)
    (path / MARK).unlink(missing_ok=True)


def table_of_somebody(path: Path, teacher: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"prompt": ["mine"], "key": ["a"]}), path)


def rows_of_somebody(path: Path, teacher: Path) -> None:
    table_of_somebody(path / "train-00000.parquet", teacher)


def file_of_somebody(path: Path, teacher: Path) -> None:
    path.write_text('{"mine": 1}')


def counts_of_somebody(path: Path, teacher: Path) -> None:
    (path.parent / f"{path.name}-counts.json").write_text('{"mine": 1}')


def made_for_something_else(path: Path, teacher: Path) -> None:
    begin_results(path, "another stage")


ABSENT = {
    "prepare": ("prepare", "--params", "/dev/null"),
    "teach": ("teach", "teacher", "--prompts", "absent", "--tokenizer", "absent"),
    "generate": ("generate", "--teacher", "absent", "--prompts", "absent"),
    "score": ("score", "--set", "generate.teacher=absent", "--prompts", "absent", "--student", "absent"),
    "reward": ("reward", "--selection", "absent", "--student", "absent"),
    "distill": ("distill", "--selection", "absent", "--student", "absent"),
    "evaluate": ("evaluate", "--prompts", "absent", "--model", "m=absent"),
    "report": ("report", "--data", "absent"),
    "fetch": ("fetch",),
    "export": ("cache", "export"),
}
FOLDERS = [("prepare", "--tokenizer"), ("teach", "--out"), ("generate", "--out"), ("score", "--out"),
           ("reward", "--out"), ("reward", "--audit"), ("distill", "--out"), ("distill", "--metrics"),
           ("evaluate", "--out"), ("fetch", "--out"), ("export", "")]  # fmt: skip
FILES = [("prepare", "--out"), ("generate", "--results"), ("report", "--out")]
OTHERS_OWN = [
    *((*output, folder_with("notes.txt")) for output in FOLDERS),
    *((*output, made_for_something_else) for output in FOLDERS),
    *((*output, model_of_somebody) for output in FOLDERS),
    *((*output, file_of_somebody) for output in [*FOLDERS, *FILES]),
    *((*output, folder_with("x")) for output in FILES),
    *((command, "--out", folder_with("manifest.json", b'{"name": "my app"}')) for command in ("generate", "score")),
    *((command, "--out", folder_with("manifest.json", b"\xff not JSON")) for command in ("generate", "score")),
    *((command, "--out", rows_of_somebody) for command in ("generate", "score")),
    *((*output, folder_with("results.json", b'{"provenance": {"versions": {"other": 1}}}'))
      for output in (("reward", "--audit"), ("distill", "--metrics"), ("evaluate", "--out"))),
    ("prepare", "--out", table_of_somebody),
    ("prepare", "--out", counts_of_somebody),
    ("reward", "--out", folder_with("reward.json")),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option", "make"), OTHERS_OWN)
def test_what_somebody_else_made_stays_and_is_named_before_any_work(teacher, tmp_path, command, option, make):
    path = tmp_path / "theirs"
    make(path, teacher)
    names = {counts_of_somebody: "theirs-counts.json", rows_of_somebody: "theirs/train-00000.parquet"}
    before = snapshot(tmp_path)
    said = refused(*ABSENT[command], *([option] if option else []), path, cwd=tmp_path)
    assert str(tmp_path / names.get(make, "theirs")) in said
    assert "choose another" in said or "export to a new folder" in said
    assert {name: content for name, content in snapshot(tmp_path).items() if name != "log"} == before


# What we made


@pytest.fixture
def made(cache, fitted, teacher, student, tmp_path):
    """Runs the stages with the outputs in one folder; a second time they replace what the first one made."""
    params = make_params(teacher, "distill.reward=none", "teach.student.optimisation.steps=2", "prepare.teach=30",
                         "prepare.train=10", "prepare.validation=5", "prepare.test=5")  # fmt: skip
    data, prompts, store = tmp_path / "data", cache / "prompts.parquet", cache / "store"
    models, own_prompts = {"teacher": teacher, "student": student}, data / "prompts" / "prompts.parquet"

    def reward_again() -> None:
        paths = data / "reward", data / "audit", tmp_path / "runs"
        reward(params, cache / "selection", student, *paths, scored_path=cache / "scored", prompts_path=prompts)

    stages = {
        "prepare": lambda: prepare(params, own_prompts, data / "tokenizer"),
        "teach": lambda: teach(
            params, "student", own_prompts, data / "tokenizer", data / "start", tmp_path / "runs"
        ),
        "generate": lambda: generate(
            params, prompts, data / "teacher", store, results=data / "generate" / "results.json"
        ),
        "score": lambda: score(
            params, prompts, student, data / "scored", store, results=data / "score" / "results.json"
        ),
        "reward": reward_again,
        "distill": lambda: distill(
            params, cache / "selection", student, None, data / "student", data / "distill", tmp_path / "runs"
        ),
        "evaluate": lambda: evaluate(params, prompts, models, cache / "selection", data / "evaluation"),
        "report": lambda: report(params.report, Layout(data=data), data / "report.html"),
    }  # fmt: skip

    def run_stages(*names: str) -> Path:
        for name in names or stages:
            stages[name]()
        return data

    return run_stages


@pytest.mark.slow
def test_what_an_earlier_run_made_is_replaced(made):
    data = made()
    files = set(snapshot(data))
    for own in (
        "distill/notes.txt",
        "evaluation/notes.txt",
        "audit/notes.txt",
        "teacher/notes.txt",
        "prompts/notes.txt",
    ):
        (data / own).write_text("mine")
    made()
    assert {name for name in snapshot(data) if not name.endswith("notes.txt")} == files
    assert (data / "teacher" / "notes.txt").read_text() == (data / "distill" / "notes.txt").read_text() == "mine"
    assert not [path for path in data.rglob("*") if path.name.startswith((".tmp-", ".student-", ".start-", ".reward-"))]

    for folder in ("distill", "evaluation", "audit"):  # files that came by `dvc pull`, and then those that DVC removed
        (data / folder / MARK).unlink()
        made({"audit": "reward", "evaluation": "evaluate"}.get(folder, folder))
        assert (data / folder / MARK).is_file()
        for path in (data / folder).glob("[!.n]*"):
            path.unlink()
        made({"audit": "reward", "evaluation": "evaluate"}.get(folder, folder))

    for name in ("student", "start", "reward", "tokenizer"):  # replaced as a whole, unless there is something more
        (data / name / "notes.txt").write_text("mine")
        before = snapshot(data / name)
        with pytest.raises(
            UserError, match=rf"{data / name} holds files that xkd-pipeline did not write \(notes.txt\)"
        ):
            made({"student": "distill", "start": "teach", "tokenizer": "prepare"}.get(name, name))
        assert snapshot(data / name) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train-00000.parquet", "train-00007.parquet", "validation-00000.parquet.aside"])
def test_rows_of_somebody_elses_in_a_selection_stay(made, name, tmp_path):
    data = made("generate")
    table_of_somebody(data / "teacher" / name, tmp_path)
    before = snapshot(data)
    with pytest.raises(UserError, match=rf"{data / 'teacher' / name} is not what xkd-pipeline writes"):
        made("generate")
    assert snapshot(data) == before


def test_an_exported_data_set_is_no_selection(cache, tmp_path):
    """Its rows have the same footers, and the names of an earlier version's selection."""
    export(*splits_of_selection(Selection(cache / "selection")), tmp_path / "exported")
    before = snapshot(tmp_path / "exported")
    assert "data/train-00000.parquet" in before
    with pytest.raises(UserError, match=r"/scored-00000.parquet is not what xkd-pipeline writes"):
        require_own_selection(tmp_path / "exported" / "data")
    assert snapshot(tmp_path / "exported") == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["both are torn", "both are emptied", "the manifest is gone", "the rows are torn"])
def test_a_selection_whose_files_are_damaged_can_be_replaced(made, damage):
    data = made("generate")
    undisturbed, folder = snapshot(data / "teacher"), data / "teacher"
    manifest, rows = folder / "manifest.json", next(folder.glob("train-*.parquet"))
    content = manifest.read_bytes()
    if damage == "the manifest is gone":
        manifest.unlink()
    elif damage == "both are emptied":
        manifest.write_bytes(b"")
        rows.write_bytes(b"")
    else:
        rows.write_bytes(rows.read_bytes()[:-50])
        manifest.write_bytes(content[:-50] if damage == "both are torn" else content)
    made("generate")
    assert snapshot(folder) == undisturbed


def test_a_mark_says_nothing_of_time_and_place_and_disturbs_no_loading(teacher, tmp_path):
    with_mark, without = tmp_path / "with", tmp_path / "without"
    model_of_somebody(without, teacher)
    shutil.copytree(teacher, with_mark)
    assert json.loads((with_mark / MARK).read_text()) == {
        "made_by": "xkd-pipeline", "holds": "a model", "files": sorted(path.name for path in without.iterdir())
    }  # fmt: skip
    assert describe_model(with_mark, "auto") == describe_model(without, "auto")
    assert load_lm(with_mark).num_parameters() and load_tokenizer(with_mark).get_vocab()


def test_a_folder_is_replaced_at_the_end_or_stays(tmp_path):
    folder, there = tmp_path / "link", tmp_path / "there"
    folder.symlink_to(there)
    for word in ("first", "second"):
        with replacing(folder, "a thing") as made:
            (made / word).write_text(word)
    with pytest.raises(ZeroDivisionError), replacing(folder, "a thing") as made:
        (made / "third").write_text(str(1 / 0))
    with pytest.raises(UserError, match="holds a thing, but a model would be written"), replacing(folder, "a model"):
        pass
    with pytest.raises(UserError, match="did not write"), replacing(folder, "a thing") as made:
        (there / "notes.txt").write_text("mine")
    assert folder.is_symlink() and sorted(snapshot(there)) == [MARK, "notes.txt", "second"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "store") == ["link", "there"]


REPLACE = """
import os, pathlib, signal
from pipeline.outputs import replacing
real, calls = pathlib.Path.rename, []
def rename(self, to):
    real(self, to)
    calls.append(to)
    after(len(calls))
pathlib.Path.rename = rename
with replacing(pathlib.Path("thing"), "a thing") as made:
    (made / "second").write_text("second")
    after(0)
"""


@pytest.fixture
def thing(tmp_path):
    """A folder that `replacing` made, in a folder of its own."""
    folder = tmp_path / "own" / "thing"
    with replacing(folder, "a thing") as made:
        (made / "first").write_text("first")
    return folder


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_a_signal_in_the_middle_of_a_replacement_does_not_take_the_folder_away(thing, number):
    done = python(f"def after(call):\n    if call == 1: send({int(number)})\n{REPLACE}", cwd=thing.parent)
    assert "Interrupted" in done.stderr and sorted(snapshot(thing.parent)) == [f"thing/{MARK}", "thing/second"]


def test_a_replacement_that_fails_brings_the_earlier_folder_back(thing, monkeypatch):
    rename = Path.rename

    def failing(path, to):
        if to == thing and not path.name.endswith("-earlier"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="Input/output error"), replacing(thing, "a thing") as made:
        (made / "second").write_text("second")
    assert sorted(snapshot(thing.parent)) == [f"thing/{MARK}", "thing/first"]


@pytest.mark.parametrize("call", [0, 1, 2])
def test_what_a_killed_replacement_has_left_is_tidied_by_the_next_one(thing, call):
    """While it is filled, between its two renames, and after them."""
    (thing.parent / ".thing-abcdefgh").mkdir()
    (thing.parent / ".thing-abcdefgh" / "notes.txt").write_text("mine")
    killed = python(
        f"def after(call):\n    if call == {call}: os.kill(os.getpid(), signal.SIGKILL)\n{REPLACE}", cwd=thing.parent
    )
    assert killed.returncode == -signal.SIGKILL and len(list(thing.parent.iterdir())) in (3, 4)
    assert thing.exists() == (call != 1)
    with pytest.raises(ZeroDivisionError), replacing(thing, "a thing"):
        print(1 / 0)
    others = {".thing-abcdefgh/notes.txt"}
    assert set(snapshot(thing.parent)) - others == {f"thing/{MARK}", "thing/second" if call == 2 else "thing/first"}


def test_a_replacement_leaves_another_one_that_is_at_work_alone(thing):
    with replacing(thing, "a thing") as made:
        (made / "second").write_text("second")
        with replacing(thing, "a thing") as other:
            (other / "third").write_text("third")
        assert (made / "second").exists()
    assert sorted(snapshot(thing.parent)) == [f"thing/{MARK}", "thing/second"]


def test_a_base_does_not_become_a_link_to_itself(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "model")
    before = snapshot(tmp_path / "model")
    with pytest.raises(UserError, match="is the base itself"):
        link_model(tmp_path / "model", tmp_path / "model", weights_digest(teacher))
    assert snapshot(tmp_path / "model") == before


# Default places


DEFAULTS = [
    (("prepare", "--set", "seed=3"), HERE.prompts, "--out"),
    (("prepare", "--params", "/dev/null"), HERE.tokenizer, "--tokenizer"),
    (("teach", "student", "--set", "teach.student.pairs=20"), HERE.start, "--out"),
    (("teach", "student", "--tokenizer", "absent"), HERE.start, "--out"),
    (("generate", "--responses", "answers.jsonl"), HERE.selection, "--out"),
    (("generate", "--k", "4"), HERE.selection, "--out"),
    (("generate", "--teacher", "absent"), Path("data/generate/results.json"), "--out"),
    (("score", "--student", "absent"), HERE.scored, "--out"),
    (("reward", "--selection", "absent"), HERE.reward, "--out"),
    (("reward", "--set", "reward.sigma_min=0.5"), HERE.audit, "--out"),
    (("distill", "--set", "distill.objective=jsd", "--set", "seed=3"), HERE.student, "--out"),
    (("distill", "--params", "/dev/null"), HERE.distillation, "--out"),
    (("evaluate", "--model", "m=absent"), HERE.evaluation, "--out"),
    (("report", "--data", "absent"), Path("data/report.html"), "--out"),
]


def at_default(path: Path) -> Path:
    """Something where an output goes by default."""
    place = path if path.suffix else path / "something"
    place.parent.mkdir(parents=True)
    place.write_text("an earlier result")
    return place


@pytest.mark.parametrize(("command", "path", "option"), DEFAULTS, ids=lambda value: str(value))
def test_a_command_with_other_inputs_does_not_write_over_a_default_output(tmp_path, command, path, option):
    place = at_default(tmp_path / path)
    said = refused(*command, cwd=tmp_path)
    assert f"{path} holds an earlier result" in said and f"add {option} F" in said, said
    given = shlex.join(command[2:] if command[0] == "teach" else command[1:]).replace(" --", ", --")
    assert f"other inputs ({given})" in said and place.read_text() == "an earlier result", said


def test_it_does_where_it_is_told_to_and_where_the_inputs_are_the_defaults(tmp_path):
    (tmp_path / "data" / "student").mkdir(parents=True)
    (tmp_path / "data" / "distill").mkdir()
    (tmp_path / "data" / "distill" / ".gitignore").write_text("/results.json\n")  # as DVC does
    with_input = ("distill", "--set", "distill.seed=3")
    assert "no cached teacher at" in refused(*with_input, cwd=tmp_path)  # there is nothing
    with replacing(tmp_path / "data" / "student", "a model") as made:
        (made / "config.json").write_text("{}")
    begin_results(tmp_path / "data" / "distill", "distill")
    assert "data/student holds an earlier result" in refused(*with_input, cwd=tmp_path)
    for command in (
        ("distill",),
        ("distill", "--store", "store", "--runs", "elsewhere", "--metrics", "curves"),
        (*with_input, "--out", "data/student"),
        (*with_input, "--out", "other"),
    ):
        assert "no cached teacher at" in refused(*command, cwd=tmp_path)


# What cannot be written


UNWRITABLE = [*FOLDERS, *FILES, *((command, "--runs") for command in ("teach", "reward", "distill"))]


def command_writing_to(path: Path, command: str, option: str) -> list[object]:
    """The command, whose inputs do not exist, with an output at `path`."""
    return [*ABSENT[command], *([option] if option else []), path]


@pytest.mark.parametrize("output", UNWRITABLE, ids=" ".join)
def test_a_file_in_a_folders_place_is_noticed_before_any_work(tmp_path, output):
    (tmp_path / "file").write_text("mine")
    said = refused(*command_writing_to(tmp_path / "file" / "inside", *output), cwd=tmp_path)
    assert str(tmp_path / "file") in said and ("Move what is at" in said or "expected a folder" in said)
    if output not in FILES:
        assert str(tmp_path / "file") in refused(*command_writing_to(tmp_path / "file", *output), cwd=tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_pipe_in_a_files_place_is_somebody_elses_and_hangs_nobody(tmp_path):
    for name in (MARK, RESULTS):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / name)
    checks = (
        lambda: require_own_folder(tmp_path / MARK, "a model"),
        lambda: require_own_results(tmp_path / MARK, "distill"),
        lambda: require_own_results(tmp_path / RESULTS, "distill"),
        lambda: require_own_file(tmp_path / RESULTS / RESULTS, lambda path: is_results(path, "generate")),
        lambda: require_own_file(tmp_path / RESULTS / RESULTS, Path.read_bytes),  # of a file of any kind
    )
    for check in checks:
        with at_once(), pytest.raises(UserError, match=r"nothing was changed"):
            check()


@needs_mount
def test_a_folder_that_can_only_be_read_is_noticed_before_any_work(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as remount:
        remount("ro")
        for output in UNWRITABLE:
            said = refused(*command_writing_to(tmp_path / "disk" / "new" / "inside", *output), cwd=tmp_path)
            assert f"cannot write to {tmp_path / 'disk'}: Read-only file system" in said, output


@needs_mount
def test_a_mounted_disk_is_not_replaced_by_a_model(tmp_path):
    with small_disk(tmp_path / "disk", "1m"):
        for output in (("teach", "--out"), ("distill", "--out"), ("reward", "--out"), ("prepare", "--tokenizer")):
            said = refused(*command_writing_to(tmp_path / "disk", *output), cwd=tmp_path)
            assert "the mount point of a disk" in said and f"give {output[1]} a folder in it" in said


# Outputs of one command


def test_another_prompt_file_in_the_same_folder_has_counts_of_its_own(tmp_path):
    sizes = [f"prepare.{split}=5" for split in ("teach", "train", "validation", "test")]
    prepare(load_params(None, sizes), tmp_path / "prompts.parquet", tmp_path / "tokenizer")
    before = snapshot(tmp_path)
    prepare(load_params(None, [*sizes, "prepare.train=7"]), tmp_path / "other.parquet", tmp_path / "other")
    after = snapshot(tmp_path)
    assert {"prompts.parquet", "counts.json"} <= before.keys() and before.items() <= after.items()
    assert json.loads(after["other-counts.json"])["train"] == {"kept": 7}


@pytest.mark.parametrize(
    ("command", "outputs"),
    [
        ("prepare", {"--tokenizer": "x", "--out": "x/prompts.parquet"}),
        ("prepare", {"--out": "x", "--tokenizer": "x"}),
        ("teach", {"--out": "x", "--runs": "x/runs"}),
        ("generate", {"--results": "x", "--out": "x"}),
        ("generate", {"--results": "x", "--out": "x/selection"}),
        ("reward", {"--out": "x", "--audit": "x"}),
        ("reward", {"--out": "x", "--audit": "link/audit"}),
        ("reward", {"--out": "runs/reward", "--runs": "runs"}),
        ("distill", {"--out": "x", "--metrics": "x"}),
        ("distill", {"--out": "x", "--metrics": "x/metrics"}),
        ("distill", {"--metrics": "x", "--runs": "x"}),
    ],
)
def test_outputs_that_would_replace_one_another_are_noticed_before_any_work(tmp_path, command, outputs):
    (tmp_path / "link").symlink_to("x")
    said = refused(*ABSENT[command], *(part for output in outputs.items() for part in output), cwd=tmp_path)
    assert all(option in said for option in outputs) and ("lies in" in said or "are both" in said), said
    assert {path.name for path in tmp_path.iterdir()} - {"store"} == {"link", "log"}


def test_outputs_that_do_not_replace_one_another_may_lie_in_one_folder(tmp_path):
    data_set = ("--set", "prepare.dataset.path=absent/", "--set", "prepare.tokenizer=absent/")
    for command, outputs in (
        ("prepare", ("--out", "x/prompts.parquet", "--tokenizer", "x/tokenizer", *data_set)),
        ("generate", ("--out", "x", "--results", "x/results.json")),
        ("distill", ("--out", "x/student", "--metrics", "x", "--runs", "x-runs")),
    ):
        said = refused(*ABSENT[command], *outputs, cwd=tmp_path)
        assert "absent" in said, said


# What an earlier version made


def test_results_of_an_earlier_version_are_replaced_and_what_it_did_not_mark_is_said(tmp_path, teacher):
    """It wrote no stage into most results, and no marks."""
    results = tmp_path / "evaluation" / "results.json"
    for versions in ({"xkd-pipeline": "0.1.0"}, {"other": "1"}):
        write_json_atomically(results, {"provenance": {"seed": 0, "versions": versions}})
        (results.parent / "metrics.json").write_text("{}")
        if "other" in versions:
            with pytest.raises(UserError, match="or an earlier version wrote it"):
                require_own_results(results.parent, "evaluate")
        else:
            begin_results(results.parent, "evaluate")
            assert (results.parent / MARK).is_file()
    model_of_somebody(tmp_path / "model", teacher)
    with pytest.raises(UserError, match="or by an earlier version, which left no mark"):
        require_own_model(tmp_path / "model")


# What is written about it


def shown_commands() -> list[str]:
    """Every command that the docs, the presets and the help show."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "presets").glob("*.yaml")]
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages)
    helps = "\n".join(command.epilog or "" for command in app.registered_commands)
    return re.findall(
        r"xkd-pipeline ((?:prepare|teach|generate|score|reward|distill|evaluate|report) [^`\n#\[]*)", text + helps
    )


def test_commands_that_are_shown_do_not_write_over_the_pipelines_own_results():
    commands = [shlex.split(command) for command in shown_commands()]
    with_inputs = [command for command in commands if {part for part in command if part.startswith("-")}]
    assert len(with_inputs) >= 12
    harmless = {"--out", "--dry-run", "--help", "STAGE"}
    assert [command for command in with_inputs if not harmless & set(command)] == []
