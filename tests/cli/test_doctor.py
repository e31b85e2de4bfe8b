"""What holds for `doctor`: it names what is wrong, says what to do, and fails only for what is broken."""

import csv
import json

import pytest

from pipeline.cli import doctor
from tests.conftest import run_cli


def findings(monkeypatch, **environment) -> dict[str, doctor.Finding]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {finding.what: finding for finding in doctor.examine()}


@pytest.fixture
def quick_vllm(monkeypatch, tmp_path):
    """One that is imported at once, where it is not vLLM that is looked at."""
    (tmp_path / "packages" / "vllm").mkdir(parents=True)
    (tmp_path / "packages" / "vllm" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


def test_a_fit_machine_is_told_so(own_store):
    done = run_cli("doctor", env={"XKD_STORE": str(own_store)})
    assert done.returncode == 0, done.stderr
    for what in ("engine", "accelerator", "threads", "memory", "store", "disk of the store", "versioning"):
        assert f" {what}: " in done.stdout
    assert str(own_store) in done.stdout and done.stderr == ""


def test_a_store_that_cannot_be_written_is_bad_and_sets_the_exit_code(quick_vllm, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_cli("doctor", "--store", tmp_path / "file" / "store")
    assert done.returncode == 1
    assert "bad  store" in done.stdout and "choose another with --store or XKD_STORE" in done.stdout


def test_programs_get_the_findings_and_the_exit_code(quick_vllm, tmp_path):
    (tmp_path / "file").write_text("")
    store = "--store", tmp_path / "file" / "store"
    done = run_cli("doctor", *store, "--json")
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1 and found["store"]["state"] == "bad" and found["memory"].keys() == {
        "what", "state", "found", "advice"
    }  # fmt: skip
    done = run_cli("doctor", *store, "--csv")
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert done.returncode == 1 and [row["what"] for row in rows] == list(found)
    assert run_cli("doctor", "--csv", "--json").returncode == 2


def test_a_finding_folds_below_its_beginning_in_a_narrow_terminal(quick_vllm, own_store):
    done = run_cli("doctor", env={"XKD_STORE": str(own_store), "COLUMNS": "60"})
    for line in done.stdout.splitlines():
        assert len(line) <= 60 or " " not in line[7:].strip() or str(own_store) in line, line
        assert line[:5] in ("ok   ", "look ", "bad  ", "     "), line


def test_more_threads_than_cores_and_little_memory_or_disk_are_pointed_out(quick_vllm, monkeypatch):
    monkeypatch.setattr(doctor, "_MIN_DISK", 2**80)
    monkeypatch.setattr(doctor, "_MIN_MEMORY", 2**80)
    found = findings(monkeypatch, OMP_NUM_THREADS="999")
    for what, advice in (("threads", "OMP_NUM_THREADS to"), ("memory", "smaller teacher"), ("disk of this folder", "")):
        assert found[what].state == doctor.LOOK and advice in found[what].advice and found[what].advice
    assert found["store"].state == doctor.OK


def test_an_engine_that_is_missing_or_broken_and_a_folder_outside_git_are_pointed_out(monkeypatch, tmp_path):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = findings(monkeypatch, PYTHONPATH=str(tmp_path))
    assert found["engine"].state == doctor.BAD and "torchvision::nms" in found["engine"].found
    assert found["versioning"].state == doctor.LOOK and "git init" in found["versioning"].advice
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "vLLM is not installed" in findings(monkeypatch)["engine"].found
