"""What holds for the benchmarks: they measure what they say, at the size of a test."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.params import Generate
from pipeline.teacher.teacher import Teacher
from tests.benchmarks import bytes_per_token, capture, fidelity, growth, intervals, layouts, loader
from tests.benchmarks.texts import arguments, read_texts, start, to_draw
from tests.conftest import ROOT, WORDS

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"said": [f"{WORDS[number]} {WORDS[number + 1]}", WORDS[number + 2]]} for number in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{file}:said"


@pytest.fixture(scope="module")
def given(teacher, texts):
    return arguments("", prompts=10, tokens=6).parse_args([str(teacher), texts, "--engine", "hf"])


@pytest.fixture(scope="module")
def measured(given, tmp_path_factory):
    """The folder of a run on the tiny teacher, whose whole vocabulary is stored."""
    out = tmp_path_factory.mktemp("fidelity") / "out"
    return out, *fidelity.collect(out, given)


def test_texts_are_the_first_of_a_file_and_a_missing_column_is_named(texts):
    assert read_texts(texts, 2) == ["w0 w1 w2", "w1 w2 w3"]
    with pytest.raises(UserError, match="no column 'heard'; found said"):
        read_texts(texts.replace(":said", ":heard"), 2)


def test_capture_compares_runs_that_draw_the_same_tokens(given, texts):
    teacher = Teacher.of(Generate(teacher=given.model, engine="hf", k=8))
    order = to_draw(given, teacher)
    engine, asks, request = start(teacher, order), [item.ask() for item in order.items], order.request
    runs = {
        "sampled": lambda: capture.draw_answers(engine, asks, request.sampling, 8, "sampled"),
        "topk": lambda: capture.draw_answers(engine, asks, request.sampling, 8, "topk"),
        "shards": lambda: capture.write_shards(engine, teacher, order),
    }
    rates = capture.take_turns(runs, 2)
    assert {name: len(found) for name, found in rates.items()} == {"sampled": 2, "topk": 2, "shards": 2}
    with pytest.raises(ValueError, match="less drew other tokens than sampled for 1 of 10"):
        capture.take_turns(
            runs | {"less": lambda: capture.draw_answers(engine, asks[1:], request.sampling, 8, "topk")}, 1
        )


def test_capture_takes_ratios_within_a_repetition():
    found = capture.summary({"bare": [100.0, 50.0, 80.0], "answers": [90.0, 40.0, 72.0]}, "bare")
    assert found["ratio_to_bare"]["answers"] == {"median": 0.9, "least": 0.8, "most": 0.9}


@needs_vllm
@pytest.mark.slow
def test_capture_compares_bare_vllm_and_the_engine(teacher, texts):
    command = [sys.executable, "-m", "tests.benchmarks.capture", str(teacher), texts]
    sizes = ["--prompts", "4", "--tokens", "4", "--repetitions", "1", "--k", "8"]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["met"] == (done.returncode == 0) and found["tokens_per_second"]["bare"]["median"] > 0


def test_fidelity_is_that_of_the_whole_distribution(measured, given):
    _, rows, truth, _ = measured
    model = fidelity.load_lm(given.model, "float32")
    row, steps = rows[0], len(rows[0].response_ids)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0, -steps - 1 : -1]
    p = torch.softmax(logits.double(), -1).numpy()
    q = np.zeros_like(p)
    k = 4
    np.put_along_axis(q, row.topk_ids[:, :k], np.exp(row.topk_logprobs[:, :k].astype(float)), 1)
    rest = 1 - q.sum(-1, keepdims=True)
    expected = (p * np.log(p / np.where(q > 0, q, rest / (p.shape[1] - k)))).sum(-1).mean()
    first = fidelity.Truth(truth.logprobs[:steps], truth.negentropy[:steps], truth.vocabulary)
    found = fidelity.loss(first, row.topk_logprobs[:, :k])
    assert found["truncation_kl"] == pytest.approx(expected, rel=1e-6) and expected > 0.1
    assert found["tail_mass"] == pytest.approx(float(rest.mean()), abs=1e-5) and found["rounding_kl"] < 1e-8


def test_fidelity_grows_with_k_and_rounding_with_the_narrower_type(measured, tmp_path):
    _, rows, truth, metadata = measured
    points = fidelity.measure(tmp_path, rows, truth, metadata, (4, 16, 44))
    by_type = {name: [point for point in points if point["type"] == name] for name in fidelity.TYPES}
    for found in by_type.values():
        assert sorted(found, key=lambda point: -point["truncation_kl"]) == found
        assert sorted(found, key=lambda point: point["topk_bytes"]) == found
    for half, single in zip(by_type["float16"], by_type["float32"], strict=True):
        assert half["topk_bytes"] < single["topk_bytes"] < single["bytes"]
        assert single["largest_error"] < 1e-6 < half["largest_error"] < 5e-4
    assert by_type["float32"][-1]["truncation_kl"] < 1e-6  # the whole vocabulary is there
    svg = fidelity.plot(points, 16)
    assert b"<svg" in svg and b"default: float16, k = 16" in svg


def test_a_second_run_of_fidelity_asks_the_teacher_nothing(measured, given, monkeypatch):
    out, rows, truth, _ = measured
    monkeypatch.setattr(fidelity, "start", lambda *_: pytest.fail("the teacher was started"))
    again, same, _ = fidelity.collect(out, given)
    np.testing.assert_array_equal(same.logprobs, truth.logprobs)
    np.testing.assert_array_equal(again[3].topk_logprobs, rows[3].topk_logprobs)


def test_layouts_give_back_what_was_stored(measured, monkeypatch, capsys):
    out, *_ = measured
    monkeypatch.setattr(sys, "argv", ["layouts", str(out), "--k", "8"])
    layouts.main()  # compares what it reads back
    lines = {line.split(" | ")[0].strip("| "): line for line in capsys.readouterr().out.splitlines()}
    assert "exact" in lines["one column per rank, byte-split, zstd 9"] and "exact" in lines["int32, ranks together"]
    assert "lost" in lines["sorted by id, delta, zstd 9 (loses the ranks)"]
    assert "| no |" in lines["float16, byte-split"] and "| yes |" in lines["float16, as `write_shard` writes it"]


def test_the_grid_keeps_ranks_and_bounds_both_errors():
    logits = np.random.default_rng(0).normal(size=(2000, 60)) * np.linspace(0.1, 6, 2000)[:, None]
    values = -np.sort(-(logits - np.log(np.exp(logits).sum(-1, keepdims=True))), axis=1).astype(np.float32)
    grid = layouts.on_a_grid(values).astype(np.float16).astype(float)
    assert (np.diff(grid, axis=1) <= 0).all()
    assert np.abs(np.exp(grid) - np.exp(values)).max() < 1e-3
    assert np.abs(grid - values)[values > -16].max() <= 0.0625 + 1e-6


def test_growth_measures_whole_runs_and_the_reading_and_size_of_what_they_made(teacher, student, tmp_path, monkeypatch):
    points = [growth.generate(str(teacher), tmp_path, count) for count in (2, 20)]
    assert [(point["prompts"], point["rows"]) for point in points] == [(2, 4), (20, 40)]
    assert all(points[1][name] > points[0][name] for name in ("tokens", "bytes"))
    assert 0.5 < points[1]["peak_memory"] / points[0]["peak_memory"] < 1.5
    growth.plot(points, tmp_path / "growth.svg")
    assert "highest memory" in (tmp_path / "growth.svg").read_text()

    selection = tmp_path / "20" / "selection"
    found = bytes_per_token.main(selection)["own ids"]["bytes"]
    assert list(found) == [1, 8, 16] and list(found.values()) == sorted(found.values())
    monkeypatch.setattr(loader, "STEPS", 3)
    monkeypatch.setattr(loader, "BATCH", 8)
    measured = loader.main(selection, student)
    assert measured["rows"] == 40 and measured["steps"] == 5 and measured["share_of_step"] > 0


def test_intervals_near_the_ends_hold_what_percentiles_of_resamples_do_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["intervals", "--quick"])
    intervals.main()
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.count("|") == 6 and len(lines) == 2
    for line in lines:
        for before, now in (cell.split(" / ") for cell in line.strip("| ").split(" | ")[2:]):
            assert int(now) >= 91, line
            assert int(before) < 80 or line.startswith("| ROUGE"), line


def test_the_page_of_metrics_shows_the_coverage_of_every_case():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in intervals.CASES:
        for size in intervals.SIZES:
            assert f"| {name} | {size} |" in page
