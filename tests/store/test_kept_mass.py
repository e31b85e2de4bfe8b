"""What holds for the mass of the kept tokens: the plain mean, in bounded memory, wherever it is shown."""

import json

import numpy as np
import pytest

from pipeline.store.kept_mass import KeptMass, kept_mass_warning
from pipeline.store.selection import Selection
from stages.generate import generate
from tests.conftest import make_params, make_prompts, run_cli


@pytest.mark.parametrize("positions", [1, 7, 10, 999])
def test_mean_and_worst_tenth_are_those_of_all_positions(positions):
    rng = np.random.default_rng(positions)
    mass = rng.beta(4, 1, positions)
    split = rng.dirichlet(np.ones(5), positions) * mass[:, None]
    kept = KeptMass()
    for part in np.array_split(np.log(split).astype(np.float32), 3):
        kept.add(part)
    assert kept.positions == positions and kept.mean == pytest.approx(mass.mean(), abs=1e-5)
    count = positions / 10
    lowest = np.sort(mass)
    expected = lowest[0] if count <= 1 else (
        (lowest[: int(count)].sum() + (count - int(count)) * lowest[int(count)]) / count
    )  # fmt: skip
    assert kept.worst_tenth == pytest.approx(expected, abs=1e-4)


def test_rounding_above_one_and_impossible_tokens_do_no_harm():
    kept = KeptMass()
    kept.add(np.array([[0.0, -8.0], [0.0, -np.inf]], np.float16))
    assert kept.mean == 1.0 and KeptMass().describe(4, "topk") is None
    kept.add(np.empty((0, 2), np.float16))
    assert kept.positions == 2


def test_a_word_is_said_above_a_tenth_outside():
    found = {"k": 8, "support": "topk", "mean": 0.89, "worst_tenth": 0.2}
    assert kept_mass_warning(found | {"mean": 0.91}) is None
    assert "the top 8 tokens" in kept_mass_warning(found) and "generate.support=sampled" in kept_mass_warning(found)
    assert kept_mass_warning(found | {"support": "sampled"}) is None
    del found["support"]  # results of an earlier version
    assert "the top 8 tokens" in kept_mass_warning(found)


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_generate_and_cache_show_say_it(teacher, tmp_path, own_store, capsys, support):
    """And where the kept tokens are a sample there is nothing to warn of."""
    prompts = make_prompts(tmp_path / "p.parquet", train=6, validation=3)
    params = make_params(teacher, f"generate.support={support}")
    generate(params, prompts, tmp_path / "a", results=tmp_path / "results.json")
    rows = [row for part in ("train", "validation") for row in Selection(tmp_path / "a").rows(part)]
    mass = np.concatenate([np.exp(row.topk_logprobs.astype(np.float32)).sum(1) for row in rows])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["kept_mass"] == {
        "k": 8, "support": support, "mean": pytest.approx(mass.mean(), abs=1e-4), "worst_tenth": pytest.approx(
            np.sort(mass)[: len(mass) // 10].mean(), abs=0.01)}  # fmt: skip
    assert found["cut"] == pytest.approx(np.mean([row.finish == "length" for row in rows]))
    said = capsys.readouterr()
    assert "kept mass" in said.out and ("of the teacher's probability" in said.err) == (support == "topk")
    request = next(path.parent for path in own_store.glob("*/*/part-*.parquet"))
    shown = run_cli("cache", "show", request.name, "--json")
    assert shown.returncode == 0, shown.stderr
    (kept,) = json.loads(shown.stdout)["kept_mass"]
    assert (kept["k"], kept["support"]) == (8, support) and 0 < kept["worst_tenth"] < kept["mean"] < 0.9
    shown = run_cli("cache", "show", request.name)
    assert f"mass of {support} 8" in shown.stdout and ("no loss can teach" in shown.stderr) == (support == "topk")
