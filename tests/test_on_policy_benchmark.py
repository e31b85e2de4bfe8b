"""What holds for the benchmark of on-policy learning: at the size of a test, it measures what it says."""

import json

import pytest

from pipeline.cli.app import app
from pipeline.params.file import load_params
from pipeline.prompts.records import load_records
from tests.benchmarks import on_policy, on_policy_report
from tests.benchmarks.on_policy import ARMS, SETTINGS, Experiment

SIZES = """
prepare: {teach: 40, train: 12, validation: 6, test: 6}
teach:
  teacher: {model: {width: 32, layers: 1, heads: 1, intermediate: 32}, optimisation: {steps: 2, batch_size: 4}}
  student: {model: {width: 32, layers: 1, heads: 1, intermediate: 32}, optimisation: {steps: 2, batch_size: 4}}
generate: {samples: 1, k: 4}
score: {samples: 1, corrupted: 1, validation_samples: 2}
reward: {phi_kl: [0.1], negatives: never, bootstrap: 5, optimisation: {steps: 1, batch_size: 4}}
distill: {log_every: 2, evaluate_every: 2, save_every: 2, optimisation: {batch_size: 4}}
evaluate: {samples: 2, sampled_prompts: 4, bootstrap: 5}
max_tokens: 8
"""


class _InProcess(Experiment):
    """Commands without a process of their own, which would take longer to start than they run."""

    def cli(self, *arguments, store=None):
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("XKD_STORE", str(store or self.store))
            app([*map(str, arguments), "--root", str(self.root)], standalone_mode=False)
        return {"seconds": 2.0, "cpu_seconds": 1.0, "peak_bytes": 1000}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    out = tmp_path_factory.mktemp("on-policy")
    (out / "sizes.yaml").write_text(SIZES)
    chosen = ["--arms", "fresh1-jsd", "r1-jsd", "--seeds", "1", "--steps", "2", "--params", str(out / "sizes.yaml")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(on_policy, "Experiment", _InProcess)
        on_policy.main([str(out / "out"), *chosen, "--temperatures", "0.5", "--figure", str(out / "sweep.svg")])
    return [str(out / "out"), *chosen]


def test_every_arm_is_a_distillation_of_as_many_steps():
    for name, arm in ARMS.items():
        assert not [each for each in arm.overrides if "steps" in each], name
        settings = load_params(None, [f"distill.{each}" for each in arm.overrides]).distill
        assert (settings.rounds is None) == name.startswith(("sft", "same", "fresh")), name
        assert settings.rounds is None or settings.rounds.split == "student", name


def test_arms_are_measured_from_one_student_and_made_once(arguments, monkeypatch, capsys):
    out = on_policy.Path(arguments[0])
    found = json.loads((out / "arithmetic.json").read_text())["arms"]
    assert list(found) == ["start", "same-jsd", "fresh1-jsd", "r1-jsd"]
    runs = {name: arm["runs"]["0"] for name, arm in found.items()}
    assert all(run["own_reverse_kl"] > 0 and run["kl"] > 0 for run in runs.values())
    assert len({run["kl"] for run in runs.values()}) == 4
    assert [name for name in runs if runs[name]["tokens_scored"]] == ["r1-jsd"]
    assert [name for name in runs if runs[name]["tokens_written"]] == ["fresh1-jsd"]
    assert runs["r1-jsd"]["tokens_scored"] <= 8 * 8  # no more samples than two steps learn from
    assert runs["r1-jsd"]["seconds"] == 2 < runs["fresh1-jsd"]["seconds"]
    assert b"distinct-2" in (out.parent / "sweep.svg").read_bytes()
    monkeypatch.setattr(Experiment, "cli", lambda *_, **__: pytest.fail("what is there was made again"))
    on_policy.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:7]] == [f"| {name}" for name in ("teacher", *found)]
    with pytest.raises(SystemExit, match="has other parameters"):
        on_policy.main([*arguments, "--steps", "3"])


def test_differences_are_of_students_of_the_same_seed():
    runs = {
        "same-jsd": {seed: {"greedy": 80.0 + seed, "seconds": 10.0} for seed in range(4)},
        "r4-jsd": {seed: {"greedy": 82.0 + 2 * seed, "seconds": 30.0} for seed in (0, 1, 2)},
    }
    found = on_policy_report.compared(runs, "r4-jsd", "same-jsd", "greedy")
    assert found == {"n": 3, "mean": 3.0, "spread": 1.0, "error": pytest.approx(3**-0.5)}
    assert on_policy_report.compared(runs, "opd", "same-jsd", "greedy") is None
    assert on_policy_report.summary([5.0]) == {"n": 1, "mean": 5.0, "spread": None, "error": None}


def test_a_metric_at_equal_diversity_is_between_two_temperatures():
    points = [(0.30, 60.0), (0.40, 50.0), (0.36, 56.0)]  # distinct-2, metric
    assert on_policy_report.at_diversity(points, 0.33) == pytest.approx(58.0)
    assert on_policy_report.at_diversity(points, 0.38) == pytest.approx(53.0)
    assert on_policy_report.at_diversity(points, 0.29) is None


def test_the_students_of_the_gaps_are_as_much_smaller_as_they_are_called():
    from pipeline.models import build_causal_lm, word_tokenizer
    from pipeline.tasks import get_task

    tokenizer = word_tokenizer(sorted({*get_task("arithmetic").generator.lexicon(), "=>"}))
    for name in ("gap2", "gap8", "gap32"):
        teach = load_params(None, SETTINGS[name].overrides).teach
        models = (build_causal_lm(size, tokenizer, 256, 0) for size in (teach.teacher.model, teach.student.model))
        teacher, student = (model.num_parameters() for model in models)
        assert teacher / student == pytest.approx(float(name.removeprefix("gap")), rel=0.03)


def test_longer_problems_have_so_many_times_the_steps(tmp_path):
    (tmp_path / "sizes.yaml").write_text(SIZES)
    for times in (2, 4):
        experiment = Experiment(tmp_path, f"length{times}", 2, tmp_path / "sizes.yaml")
        params = load_params(experiment.layout.params)
        assert params.max_tokens == 24 + 24 * times and params.prepare.student == 12
        rows = {split: list(records) for split, records in load_records(params.prepare.dataset.path, "").items()}
        assert {split: len(records) for split, records in rows.items()} == {
            "train": 40 + 12 + 12,
            "validation": 6,
            "test": 6,
        }
        steps = {row["references"][0].count("=") for records in rows.values() for row in records}
        assert steps == {2 * times, 3 * times}


def test_settings_are_compared_by_students_of_the_same_seed(tmp_path):
    def arm(greedy: float, **more: float) -> dict:
        run = {"greedy": greedy, "sampled": 50.0, "own_reverse_kl": 0.1}
        by_seed = {str(seed): {measure: value + seed for measure, value in run.items()} for seed in (0, 1)}
        means = {name: on_policy_report.summary([value]) for name, value in (run | more).items()}
        return {"runs": by_seed, "means": means}

    arms = {"start": arm(10.0), "same-jsd": arm(20.0), "fresh1-jsd": arm(21.5, tokens_written=5000.0)}
    numbers = {"tokens_per_response": 17.0, "gap": 8.2, "teacher": {"greedy": 97.0}, "arms": arms}
    (tmp_path / "length2.json").write_text(json.dumps(numbers))
    assert len(on_policy_report.across(tmp_path, list(SETTINGS)).splitlines()) == 2  # nothing to compare yet
    arms["r4-jsd"] = arm(23.0, tokens_scored=9000.0)
    (tmp_path / "gap8.json").write_text(json.dumps(numbers))
    (row,) = on_policy_report.across(tmp_path, list(SETTINGS)).splitlines()[2:]
    about, differences, tokens = "17.0 | 8.2 | 97.0", "+1.5 ± 0.0 | +0.0 ± 0.0 | +0.0000 ± 0.0000", "5,000 | 9,000"
    assert row == f"| gap8 | 2 | {about} | 10.0 | 20.0 | 21.5 | {differences} | {tokens} |"
