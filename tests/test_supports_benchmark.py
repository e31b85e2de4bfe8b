"""What holds for the experiment on supports: at the size of a test, it is the experiment that its page tells of."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.objectives.divergences import DIVERGENCES
from pipeline.params import Model
from tests.benchmarks import supports, supports_report
from tests.benchmarks.supports_data import SMOLLM2, TEXT, Made, Taught

SMALL = {"train": 20, "held_out": 4, "prompt": 2, "response": 6, "steps": 2, "batch": 4, "seeds": 1}
PART = replace(TEXT, **SMALL)
SIZE = Model(width=32, layers=1, heads=1, intermediate=64)
MADE = Made(300, SIZE, SIZE, 2, 1, 2e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, field in (("scitldr", "source"), ("gsm8k", "question")):
        (folder / name).mkdir()
        for split in ("train", "test"):
            texts = [" ".join(f"word{number}" for number in rng.integers(0, 40, 12)) for _ in range(30)]
            rows = [{field: [text] if field == "source" else text} for text in texts]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """A folder with the part `text` and some of its cells."""
    folder = tmp_path_factory.mktemp("supports") / "out"
    supports.experiment(folder, data, [PART], ["dense"], MADE)
    supports.experiment(folder, data, [PART], ["drawn-16"], MADE)
    return folder


def test_cells_are_measured_and_run_once(out, data, monkeypatch):
    found = supports.read_cells(out)
    assert [(cell.objective, cell.support) for cell in found] == [
        ("fkl", "dense"), ("jsd", "dense"), ("fkl", "drawn"), ("jsd", "drawn"),
    ]  # fmt: skip
    assert all(0 < row["bound"] <= row["kl"] and row["reverse_kl"] > 0 for row in found.values())
    monkeypatch.setattr(supports, "run", lambda *_: pytest.fail("a finished cell was run again"))
    supports.experiment(out, data, [PART], ["dense"], MADE)
    with supports.claimed(out / "claims" / "text-fkl-start-0-none-seed0"):
        supports.experiment(out, data, [PART], ["start"], MADE)


@pytest.mark.slow
def test_rows_of_the_store_and_every_reward_train_a_student(out, data):
    for words in (["topk-16"], ["fkl", "sampled-16"]):
        supports.experiment(out, data, [PART], words, MADE)
    found = {(cell.support, cell.reward): row["kl"] for cell, row in supports.read_cells(out).items() if cell.k == 16}
    assert {reward for support, reward in found if support == "sampled"} == {"none", *supports.REWARDS}
    assert len({kl for (support, _), kl in found.items() if support == "sampled"}) == 1 + len(supports.REWARDS)
    taught, folder = Taught(out / "text" / "train"), out / "text"
    mu = {name: supports.x_term(supports.Cell("text", "fkl", "sampled", 16, 0, name), taught, folder)[2]["mu"]
          for name in ("oracle", "oracle-shuffled")}  # fmt: skip
    last = taught.starts[1:] - 1
    assert not mu["oracle"][last].any() and not np.array_equal(*mu.values())
    assert np.std(np.delete(mu["oracle"], last)) == pytest.approx(1, rel=1e-3)


def test_the_bound_and_both_kls_are_those_of_the_distributions(out):
    held_out, student = Taught(out / "text" / "held_out"), supports.load_lm(out / "text" / "student")
    batch, places = held_out.batch(range(PART.held_out))
    p = held_out.distribution(slice(None)).exp().double()
    assert places[batch["labels"].numpy() >= 0].tolist() == list(range(len(p)))
    q = supports.whole(student, batch).exp().detach().double()
    found = supports.measure(student, held_out)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-5)
    assert found["reverse_kl"] == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), abs=1e-5)


@pytest.mark.parametrize("objective", ["fkl", "jsd"])
def test_draws_with_replacement_are_an_unbiased_loss(objective):
    generator = torch.Generator().manual_seed(0)
    p, s = (torch.log_softmax(2 * torch.randn(1, 12, generator=generator, dtype=torch.float64), -1) for _ in range(2))
    ids = torch.multinomial(p.exp(), 200_000, True, generator=generator).view(-1, 4)
    found = supports.drawn_loss(objective, p[0][ids], s[0][ids])
    exact = float(DIVERGENCES[objective](p, s, supports.BETA))
    assert float(found.mean()) == pytest.approx(exact, abs=4 * float(found.std()) / len(found) ** 0.5)


def test_supports_keep_what_the_store_would(out):
    taught = Taught(out / "text" / "train")
    top, kept = (supports.draw(taught, support, 8, 0) for support in ("topk", "sampled"))
    p = np.exp(np.asarray(taught.logprobs, np.float32))
    assert np.abs(1 - np.exp(top.logprobs.astype(np.float32)).sum(-1) - top.tail).max() < 1e-2
    weights = np.maximum(np.exp(kept.logprobs.astype(np.float32)), kept.tau[:, None])
    assert np.abs(weights.sum(-1) - 1).max() < 1e-2 and (np.diff(np.sort(kept.ids)) > 0).all()
    assert np.array_equal(np.take_along_axis(p, kept.ids.astype(int), -1), np.exp(kept.logprobs.astype(np.float32)))
    assert not np.array_equal(kept.ids, supports.draw(taught, "sampled", 8, 1).ids)


def test_the_report_has_what_is_finished_and_what_a_row_takes(out, tmp_path):
    found = supports_report.report(out, tmp_path / "supports.svg")
    (dense,) = [line for line in found.splitlines() if "the whole distribution" in line and "| 1.00 |" in line][:1]
    sizes = {
        support: supports_report.bytes_per_token(out / "text", *support) for support in (("topk", 8), ("topk", 16))
    }
    assert 2 * 8 < sizes["topk", 16] - sizes["topk", 8] < 7 * 8 and dense.count("|") == 8
    assert "draws with replacement (RS-KD) | 16 |" in found and '"cells":' in found
    assert "whole distribution" in (tmp_path / "supports.svg").read_text()


def test_the_pretrained_teacher_teaches_its_own_blocks(data, teacher, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2").symlink_to(teacher)
    part = replace(SMOLLM2, **SMALL | {"train": 8, "held_out": 2})
    supports.prepare_smollm2(tmp_path, data, part, layers=1)
    supports.experiment(tmp_path, data, [part], ["dense"])
    (row,) = supports.read_cells(tmp_path).values()
    assert row["part"] == "smollm2" and row["kl"] > 0
