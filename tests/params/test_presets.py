"""What holds for the presets: each resolves, and its pipeline runs on tiny models and rows of its data set's shape."""

import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from pipeline.layout import Layout
from pipeline.models import load_tokenizer
from pipeline.params.file import load_params
from pipeline.prompts import read_prompts
from pipeline.store.selection import Selection
from stages.distill import distill
from stages.evaluate import evaluate
from stages.generate import generate
from stages.prepare import prepare
from stages.report import report
from stages.reward import reward
from stages.teach import teach
from tests.conftest import ROOT, make_chat_model, make_seq2seq_model
from tests.published import write_dialogsum, write_jsonl, write_multi30k

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
TINY = (
    "max_tokens=4", "prepare.train=6", "prepare.validation=3", "prepare.test=3", "generate.k=4", "generate.engine=hf",
    "reward.optimisation.steps=2", "reward.optimisation.batch_size=2", "reward.optimisation.accumulation=1",
    "reward.evaluate_every=1", "reward.bootstrap=5", "distill.optimisation.steps=2",
    "distill.optimisation.batch_size=2", "distill.optimisation.accumulation=1", "evaluate.samples=2",
    "evaluate.sampled_prompts=2", "evaluate.bootstrap=5",
)  # fmt: skip


ON_POLICY = ("distill.on_policy.refreshes=2", "distill.on_policy.validation=2")  # of two steps


def row(preset: str, i: int) -> dict:
    """One row as the hub's data set has it."""
    if "gsm8k" in preset:
        return {"question": f"w{i} w2 w3 ?", "answer": f"w{i} <<1+1=2>>w2 w3\n#### {i}"}
    if "wmt14" in preset:
        return {"translation": {"en": f"w{i} w2 w3", "de": f"w{i} w5 w6"}}
    if "xsum" in preset:
        return {"document": f"w{i} w2 w3 .", "summary": f"w{i} w5 w6", "id": str(i)}
    return {"source": [f"w{i} w2 .", "w3 ."], "target": [f"w{i} w5 w6", "w7 w8"]}


def write_set(preset: str, folder: Path) -> None:
    """The preset's data set as it is published, with made-up rows."""
    if "dialogsum" in preset or "multi30k" in preset:
        (write_dialogsum if "dialogsum" in preset else write_multi30k)(folder)
    else:
        for split, rows in (("train", range(20)), ("test", range(20, 24))):
            write_jsonl(folder / f"{split}.jsonl", [row(preset, i) for i in rows])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_how_to_run_it_and_resolves(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"xkd-pipeline params --params presets/{path.name}" in line for line in header)
    assert any("dvc repro" in line for line in header)
    params = load_params(path)
    given = yaml.safe_load(path.read_text())
    assert params.prepare.dataset.path == given["prepare"]["dataset"]["path"]
    assert params.chat != path.stem.startswith("t5")


@pytest.mark.parametrize("path", [path for path in PRESETS if "on-policy" in path.stem], ids=lambda path: path.stem)
def test_an_on_policy_preset_varies_distillation_alone(path):
    """So that it finds what the preset without rounds had the teacher say."""
    plain, varied = (load_params(each) for each in (path.with_stem(path.stem.removesuffix("-on-policy")), path))
    assert varied.model_dump(exclude={"distill"}) == plain.model_dump(exclude={"distill"})
    rounds, optimisation = varied.distill.rounds, varied.distill.optimisation
    assert (varied.distill.divergence, varied.distill.beta) == ("jsd", 0.5)
    assert (rounds.refreshes, rounds.share, rounds.temperature, rounds.scores) == (4, 1, 1, "store")
    assert optimisation.steps * optimisation.batch_size // rounds.refreshes >= varied.prepare.train  # all are answered
    assert optimisation.learning_rate == pytest.approx(plain.distill.optimisation.learning_rate / 4)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_starts_and_goes_to_its_end(path, tmp_path):
    t5, on_policy = path.stem.startswith("t5"), path.stem.endswith("on-policy")
    teacher, student = (
        make_seq2seq_model(tmp_path / role, seed) if t5 else make_chat_model(tmp_path / role, seed, layers=8)
        for seed, role in enumerate(("teacher", "student"))
    )
    data = tmp_path / "data"
    write_set(path.stem, tmp_path / "set")
    base = {"prepare.dataset.path": tmp_path / "set", "prepare.tokenizer": teacher, "teach.teacher.base": teacher}
    tiny = [
        *TINY,
        *(ON_POLICY if on_policy else ()),
        *(
            f"teach.{role}.optimisation={{steps: 2, batch_size: 2, learning_rate: 0.001}}"
            for role in ("teacher", "student")
            if t5
        ),
    ]
    base |= {"teach.student.base": student, "generate.teacher": data / "models" / "teacher"}
    params = load_params(path, [*tiny, *(f"{key}={json.dumps(str(value))}" for key, value in base.items())])

    prompts = data / "prompts" / "prompts.parquet"
    prepare(params, prompts, data / "tokenizer")
    assert "<<" not in read_prompts(prompts)[0].references[0]
    references = {"dialogsum": 3, "scitldr": 2}.get(path.stem.partition("-")[2], 1)
    assert {len(prompt.references) for prompt in read_prompts(prompts, ("test",))} == {references}
    for role in ("teacher", "student"):
        teach(params, role, prompts, data / "tokenizer", data / "models" / role, tmp_path / "runs")
    assert ((data / "models" / "teacher" / "link.json").is_file()) != t5  # taken as it is, or fine-tuned
    generate(params, prompts, data / "teacher")
    rows = pl.read_parquet(data / "teacher" / "train-*.parquet")
    assert len(rows) == 6 and rows["prompt"].str.starts_with("<user>").all() != t5
    assert load_tokenizer(teacher).decode(rows["prompt_ids"][0]).endswith("<assistant>") != t5
    start = data / "models" / "student"
    reward(params, data / "teacher", start, data / "reward", data / "audit", tmp_path / "runs")
    metrics = distill(
        params, data / "teacher", start, data / "reward", data / "student", data / "distill", tmp_path / "runs",
        prompts_path=prompts, rounds_out=data / "rounds",
    )  # fmt: skip
    assert metrics["samples"] == 6
    if on_policy:
        rounds = Selection(data / "rounds")
        assert [rounds.part(f"round{number:04d}")["rows"] for number in range(2)] == [2, 2]  # a step of two rows each
        assert {row.origin for row in rounds.rows("round0000")} == {"student"}
    assert any((data / "rounds").iterdir()) == on_policy
    models: dict[str, str | Path] = {"teacher": params.generate.teacher, "undistilled": start}
    evaluate(params, prompts, models | {"distilled": data / "student"}, data / "teacher", data / "evaluation")
    report(params.report, Layout(data=data), data / "report.html")
    assert "distilled" in (data / "report.html").read_text()
