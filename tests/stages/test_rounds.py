"""What holds for rounds of the student's own samples: they learn, are kept, and nothing is asked twice."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.engines.hf import HfEngine
from pipeline.learning.rewards import read_rewards
from pipeline.models import load_lm
from pipeline.params.file import to_yaml
from pipeline.store.selection import Selection
from pipeline.store.storage import Storage
from pipeline.store.users import users_of
from pipeline.upkeep.collect import garbage, in_use
from pipeline.upkeep.verify import verify_selection, verify_store
from stages.distill import distill
from stages.distill import rounds as rounds_module
from stages.generate import generate
from tests.conftest import make_params, make_prompts, make_seq2seq_model
from tests.processes import start

SPARSE = ("fkl", "rkl", "jsd", "skew_fkl", "skew_rkl", "tvd")
STEPS, ROUNDS = 12, 3


def settings_of(teacher: Path, *overrides: str) -> list[str]:
    common = ["distill.reward=none", f"distill.optimisation.steps={STEPS}", "distill.optimisation.batch_size=8"]
    return [*common, f"distill.on_policy.refreshes={ROUNDS}", "distill.on_policy.validation=4", *overrides]


def run(cache, teacher, student, out, *overrides, store=None, reward=None):
    """Distil with rounds, on a store of its own that has the cache's rows."""
    store = store or out / "store"
    if not store.exists():
        shutil.copytree(cache / "store", store)
    params = make_params(teacher, *settings_of(teacher, *overrides))
    paths = cache / "selection", student, reward, out / "student", out / "metrics", out / "runs"
    return distill(params, *paths, store, None, cache / "prompts.parquet")


def measures(out: Path) -> list[dict]:
    return json.loads((out / "metrics" / "results.json").read_text())["rounds"]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def stored_keys(store: Path, cache: Path) -> list[tuple[str, str, str]]:
    """Request and key of every row that is stored beside those of the cache."""
    before = {path.relative_to(cache / "store") for path in (cache / "store").rglob("part-*.parquet")}
    return [
        (file.parent.name, file.parent.parent.name, key)
        for file in sorted(store.rglob("part-*.parquet"))
        if file.relative_to(store) not in before
        for key in pq.read_table(file, columns=["key"]).column("key").to_pylist()
    ]


@pytest.mark.parametrize(
    ("objective", "kind"), [*((name, "none") for name in SPARSE), ("fkl", "frozen"), ("rkl", "frozen")]
)
def test_every_divergence_learns_from_the_students_samples(cache, fitted, teacher, student, tmp_path, objective, kind):
    settings = [f"distill.objective={objective}", f"distill.reward={kind}"]
    metrics = run(cache, teacher, student, tmp_path, *settings, reward=fitted)
    held_out = pl.read_csv(tmp_path / "metrics" / "heldout.csv")["kd"]
    assert held_out[-1] < held_out[0]
    assert metrics["objective"].endswith(", 3 refreshes")
    assert metrics["objective"].startswith("x-" if kind == "frozen" else objective)
    rounds = measures(tmp_path)
    assert [each["step"] for each in rounds] == [0, 4, 8, 12]
    assert all(each["tokens_scored"] > 0 for each in rounds)
    assert rounds[-1]["kl"] < rounds[0]["kl"]


def test_opd_draws_the_student_to_what_the_teacher_finds_likelier(teacher, student, tmp_path):
    """It needs no kept tokens: a cache with k = 0 gives the same student."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=120, validation=40)
    overrides = ["distill.objective=opd", "distill.on_policy.refreshes=6", "distill.optimisation.steps=240"]
    for k, support in ((8, "sampled"), (0, "topk")):
        of_cache = [f"generate.k={k}", f"generate.support={support}", "distill.on_policy.validation=40"]
        params, out = make_params(teacher, *settings_of(teacher, *overrides, *of_cache)), tmp_path / str(k)
        generate(params, prompts, out / "selection", out / "store")
        paths = out / "selection", student, None, out / "student", out / "metrics", out / "runs"
        metrics = distill(params, *paths, out / "store", None, prompts)
        assert metrics["heldout_pg"] == 0 < metrics["heldout_nll"]
        assert Selection(out / "student-rounds").k == k
    assert weights(tmp_path / "0" / "student") == weights(tmp_path / "8" / "student")
    before, *_, after = measures(tmp_path / "8")
    assert after["kl"] < 0.8 * before["kl"] and after["own_reverse_kl"] < before["own_reverse_kl"]
    assert "kl" not in measures(tmp_path / "0")[0]


def test_an_encoder_decoder_learns_from_rounds_as_well(tmp_path):
    teacher, student = make_seq2seq_model(tmp_path / "teacher", 0), make_seq2seq_model(tmp_path / "start", 1)
    prompts = make_prompts(tmp_path / "prompts.parquet", train=40, validation=8)
    params = make_params(teacher, *settings_of(teacher, "distill.objective=jsd"))
    generate(params, prompts, tmp_path / "selection", tmp_path / "store")
    paths = tmp_path / "selection", student, None, tmp_path / "student", tmp_path / "metrics", tmp_path / "runs"
    distill(params, *paths, tmp_path / "store", None, prompts)
    assert measures(tmp_path)[-1]["kl"] < measures(tmp_path)[0]["kl"]
    assert Selection(tmp_path / "student-rounds").part("round0002")["rows"] > 0


def test_a_second_run_asks_the_teacher_nothing_and_gives_the_same_student(
    cache, teacher, student, tmp_path, monkeypatch
):
    run(cache, teacher, student, tmp_path / "first", "distill.objective=jsd", store=tmp_path / "store")
    drawn, scored = HfEngine.sample, HfEngine.score
    asked = []
    monkeypatch.setattr(HfEngine, "sample", lambda self, *a, **o: asked.append("sample") or drawn(self, *a, **o))
    monkeypatch.setattr(HfEngine, "score", lambda self, *a, **o: asked.append("score") or scored(self, *a, **o))
    run(cache, teacher, student, tmp_path / "second", "distill.objective=jsd", store=tmp_path / "store")
    assert not asked
    assert weights(tmp_path / "first" / "student") == weights(tmp_path / "second" / "student")
    assert all(each["tokens_scored"] == each["samples_drawn"] == 0 for each in measures(tmp_path / "second"))
    assert all(each["rows_found"] and each["samples_found"] for each in measures(tmp_path / "second"))


def test_another_objective_on_the_same_rounds_finds_the_first_of_them(cache, teacher, student, tmp_path):
    """The student is the same one there; from the second round on it is another."""
    run(cache, teacher, student, tmp_path / "jsd", "distill.objective=jsd", store=tmp_path / "store")
    run(cache, teacher, student, tmp_path / "rkl", "distill.objective=rkl", store=tmp_path / "store")
    first, second, *_ = measures(tmp_path / "rkl")
    assert first["rows_scored"] == 0 and first["samples_drawn"] == 0
    assert second["rows_scored"] > 0


@pytest.mark.parametrize("share", ["1.0", "0.5"])
def test_gkd_with_a_live_teacher_is_rounds_of_one_step_through_the_store(cache, teacher, student, tmp_path, share):
    """The same rows, the same loss, the same weights."""
    common = ["distill.objective=gkd", f"distill.on_policy.share={share}", "distill.optimisation.steps=5"]
    common += ["distill.on_policy.refreshes=0", "distill.log_every=1", "distill.on_policy.validation=0"]
    live = run(cache, teacher, student, tmp_path / "live", *common)
    stored = ["distill.on_policy.every=1", "distill.on_policy.scores=store"]
    other = run(cache, teacher, student, tmp_path / "store", *common, *stored)
    assert live["objective"] == "gkd(0.5)" and other["objective"] == "gkd(0.5), a refresh every step"
    curves = [(tmp_path / name / "metrics" / "training.csv").read_text() for name in ("live", "store")]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 6
    assert weights(tmp_path / "live" / "student") == weights(tmp_path / "store" / "student")
    assert len(Selection(tmp_path / "store" / "student-rounds").parts) == 5
    assert not Selection(tmp_path / "live" / "student-rounds").parts


@pytest.mark.parametrize("samples", [1, 3])
def test_live_rounds_of_several_steps_are_those_of_the_store(cache, teacher, student, tmp_path, monkeypatch, samples):
    """Also where a prompt is answered several times, and where a round has many row groups."""
    monkeypatch.setattr("pipeline.store.schema.ROW_GROUP_VALUES", 200)
    for scores in ("live", "store"):
        settings = [f"distill.on_policy.scores={scores}", f"distill.on_policy.samples={samples}"]
        run(cache, teacher, student, tmp_path / scores, "distill.objective=jsd", *settings)
    assert weights(tmp_path / "live" / "student") == weights(tmp_path / "store" / "student")
    (rounds,) = Selection(tmp_path / "store" / "student-rounds").part("round0000")["files"]
    assert pq.ParquetFile(tmp_path / "store" / "student-rounds" / rounds["name"]).num_row_groups > 3
    names = ("kl", "reverse_kl", "own_kl", "own_reverse_kl", "distinct_2")
    stored = {each["step"]: each for each in measures(tmp_path / "store")}
    live = {each["step"]: each for each in measures(tmp_path / "live")}
    assert list(stored) == [0, 4, 8, 12] and list(live) == [0, 8, 12]  # no more often than every 5 steps
    for step, each in live.items():
        assert [each[name] for name in names] == pytest.approx([stored[step][name] for name in names], rel=1e-5)
    totals = [sum(each[name] for each in of.values()) for name in ("samples_drawn", "tokens_scored")
              for of in (live, stored)]  # fmt: skip
    assert totals[0] < totals[1] and totals[2] < totals[3]  # by what was not measured in between


@pytest.mark.parametrize("scores", ["live", "dense"])
def test_an_encoder_decoder_has_a_live_teacher_as_well(tmp_path, scores):
    teacher, student = make_seq2seq_model(tmp_path / "teacher", 0), make_seq2seq_model(tmp_path / "start", 1)
    prompts = make_prompts(tmp_path / "prompts.parquet", train=40, validation=8)
    chosen = ["distill.objective=gkd", "distill.on_policy.refreshes=0", f"distill.on_policy.scores={scores}"]
    params = make_params(teacher, *settings_of(teacher, *chosen))
    generate(params, prompts, tmp_path / "selection", tmp_path / "store")
    paths = tmp_path / "selection", student, None, tmp_path / "student", tmp_path / "metrics", tmp_path / "runs"
    distill(params, *paths, tmp_path / "store", None, prompts)
    assert measures(tmp_path)[-1]["kl"] < measures(tmp_path)[0]["kl"]


@pytest.mark.parametrize("objective", ["gkd", "rkl"])
def test_a_dense_teacher_teaches_on_all_its_tokens(cache, teacher, student, tmp_path, objective):
    settings = [f"distill.objective={objective}", "distill.on_policy.scores=dense"]
    run(cache, teacher, student, tmp_path, *settings)
    held_out = pl.read_csv(tmp_path / "metrics" / "heldout.csv")["kd"]
    assert held_out[-1] < held_out[0]
    assert measures(tmp_path)[-1]["kl"] < measures(tmp_path)[0]["kl"]


@pytest.mark.parametrize("kind", ["frozen", "shuffled", "zero"])
def test_the_reward_is_read_on_the_students_states(cache, fitted, teacher, student, tmp_path, kind):
    """phi is run once over a round, and written beside it; the controls work there too."""
    settings = ["distill.objective=jsd", f"distill.reward={kind}"]
    metrics = run(cache, teacher, student, tmp_path, *settings, reward=fitted)
    assert metrics["objective"] == f"x-jsd(0.5) ({kind}), 3 refreshes" and metrics["heldout_lam_eff"] > 0
    rounds = Selection(tmp_path / "student-rounds")
    if kind == "zero":
        assert not (rounds.folder / "rewards.parquet").exists()
        return
    rewards = read_rewards(rounds.folder)
    for number in range(ROUNDS):
        for row in rounds.rows(f"round{number:04d}", topk=False):
            assert len(rewards["mu"][row.key]) == len(row.response_ids)
    other = run(cache, teacher, student, tmp_path / "none", "distill.objective=jsd")
    assert metrics["heldout_kd"] != other["heldout_kd"]


def test_lora_students_are_asked_with_their_adapters(cache, teacher, student, tmp_path):
    metrics = run(cache, teacher, student, tmp_path, "distill.objective=jsd", "distill.lora.rank=4")
    kls = [each["kl"] for each in measures(tmp_path)]
    assert len(set(kls)) == ROUNDS + 1 and kls[-1] < kls[0]
    samples = pl.read_parquet(tmp_path / "student-rounds" / "samples.parquet")
    last = samples.filter(pl.col("part") == "heldout0003")
    model, rows = load_lm(tmp_path / "student"), Selection(tmp_path / "student-rounds").rows("heldout0003")
    for row in rows:  # the student that was saved is the one that spoke last
        ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids]))[None].long()
        logprobs = torch.log_softmax(model(ids).logits[0, len(row.prompt_ids) - 1 : -1], -1)
        expected = logprobs.gather(-1, ids[0, len(row.prompt_ids) :, None])[:, 0].tolist()
        (old,) = last.filter(pl.col("key") == row.key)["logprobs"].to_list()
        assert old == pytest.approx(expected, abs=1e-4)
    assert metrics["parameters"] == load_lm(student).num_parameters()


def test_what_rounds_wrote_is_kept_by_gc_and_verified(cache, teacher, student, tmp_path):
    """Everything that the teacher said of samples is in use; what the student drew was only on its way there."""
    store = tmp_path / "store"
    run(cache, teacher, student, tmp_path, "distill.objective=jsd", store=store)
    storage, out = Storage(store), tmp_path / "student-rounds"
    rounds = Selection(out)
    keys = {row.key for name in rounds.parts for row in rounds.rows(name)}
    assert not list(verify_store(storage, "", True, lambda: None)) and not list(verify_selection(out, store, False))
    (request,) = {part["request_identity"] for part in rounds.parts.values()}
    teachers = f"{rounds.teacher['identity']}/{request}"
    gone = {each.name for each in garbage(storage, in_use(storage, [cache / "selection", cache / "scored"]))}
    assert not [name for name in gone if name.startswith(teachers)]
    assert any("part-" in name for name in gone)
    (user,) = (user for user in users_of(storage)[0] if user.selection != str(cache / "selection") and user.complete
               and user.selection.startswith(str(tmp_path)))  # fmt: skip
    assert user.selection == str(out) and all(user.complete for user in users_of(storage)[0])
    samples = pl.read_parquet(out / "samples.parquet")
    assert set(samples["key"]) == keys
    assert samples.filter(pl.col("part") == "round0001")["round"].unique().to_list() == [1]


def test_gc_in_the_middle_of_a_round_removes_nothing_that_it_will_read(cache, teacher, student, tmp_path, monkeypatch):
    """What was drawn is kept until the round is made; then it may go."""
    store, write, garbage_at = tmp_path / "store", rounds_module.write_selection, []
    before = {path.relative_to(cache / "store").as_posix() for path in (cache / "store").rglob("part-*.parquet")}

    def shards() -> set[str]:
        used = in_use(Storage(store), [cache / "selection", cache / "scored"])
        return {each.name for each in garbage(Storage(store), used) if "part-" in each.name} - before

    def looking(*arguments, **options):
        garbage_at.append(shards())
        return write(*arguments, **options)

    monkeypatch.setattr(rounds_module, "write_selection", looking)
    run(cache, teacher, student, tmp_path, "distill.objective=jsd", "distill.on_policy.refreshes=1", store=store)
    in_round, after_it = garbage_at
    assert not in_round and after_it and after_it < shards()


# kill -9: each of these moments of each round, one after the other
PHASES = ("a shard is drawn", "all is drawn", "a shard is scored", "all is scored", "the round is written", "trained")


KILLED = (
    "distill.objective=jsd",
    "distill.save_every=1",
    "distill.on_policy.refreshes=2",
    "distill.optimisation.steps=8",
)


def _dying(log, cache, teacher, student, out, phase, number):
    """Distil in this process, and die at the given moment of a round; "" for none."""
    from pipeline.learning.trainer import TermTrainer
    from pipeline.store.requests import RequestFolder
    from pipeline.teacher.session import Session
    from stages.distill import rounds

    state = {"round": None, "role": None}

    def die(at: str) -> None:
        if (at, state["round"]) == (phase, number):
            Path(log).write_text(f"{at} {number}")
            os.kill(os.getpid(), signal.SIGKILL)

    def after(owner, name, at, before=lambda *a: None):
        original = getattr(owner, name)

        def wrapped(*arguments, **options):
            before(*arguments)
            result = original(*arguments, **options)
            die(at())
            return result

        setattr(owner, name, wrapped)

    verb = lambda: "drawn" if state["role"] == "student" else "scored"  # noqa: E731
    after(rounds.StoredRounds, "_make", lambda: "", lambda _, number, step: state.update(round=number))
    after(Session, "answer", lambda: f"all is {verb()}", lambda self, *_: state.update(role=self.teacher.role))
    after(RequestFolder, "add", lambda: f"a shard is {verb()}")
    after(rounds, "write_selection", lambda: "the round is written")
    steps = []
    after(TermTrainer, "compute_loss", lambda: "trained" if len(steps) % 4 == 3 else "", lambda *_: steps.append(1))
    run(Path(cache), Path(teacher), Path(student), Path(out), *KILLED)


@pytest.mark.slow
def test_kill_9_in_each_phase_of_each_round_costs_nothing_that_was_stored(cache, teacher, student, tmp_path):
    undisturbed, killed, log = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "moment"
    run(cache, teacher, student, undisturbed, *KILLED)
    moments = [(phase, number) for number in range(2) for phase in PHASES]
    moments += [(phase, 2) for phase in PHASES[:-1]]
    for phase, number in moments:
        arguments = log, cache, teacher, student, killed, phase, number
        process = start(*arguments, log=tmp_path / "log", function=_dying)
        assert process.wait() == 128 + signal.SIGKILL, (phase, number, process.output)
        assert log.read_text() == f"{phase} {number}"
    process = start(log, cache, teacher, student, killed, "", None, log=tmp_path / "log", function=_dying)
    assert process.wait() == 0, process.output
    assert weights(killed / "student") == weights(undisturbed / "student")
    keys = stored_keys(killed / "store", cache)
    assert len(keys) == len(set(keys)) and sorted(keys) == sorted(stored_keys(undisturbed / "store", cache))
    for file in (undisturbed / "student-rounds").iterdir():
        assert (killed / "student-rounds" / file.name).read_bytes() == file.read_bytes(), file.name
    curves = [(out / "metrics" / "heldout.csv").read_text() for out in (killed, undisturbed)]
    assert curves[0] == curves[1]


def test_a_signal_while_the_student_is_asked_ends_the_run_and_the_same_command_goes_on(
    cache, teacher, student, tmp_path
):
    run(cache, teacher, student, tmp_path / "undisturbed", "distill.objective=jsd")
    out = tmp_path / "stopped"
    shutil.copytree(cache / "store", out / "store")
    before = set((out / "store").rglob("part-*.parquet"))
    command = ["distill", "--selection", cache / "selection", "--student", student, "--out", out / "student"]
    command += ["--metrics", out / "metrics", "--runs", out / "runs", "--store", out / "store"]
    command += ["--prompts", cache / "prompts.parquet"]
    given = make_params(teacher, *settings_of(teacher, "distill.objective=jsd"))
    (tmp_path / "params.yaml").write_text(to_yaml(given))
    command += ["--params", tmp_path / "params.yaml"]
    process = start(*command, log=tmp_path / "log")
    process.wait_for(lambda: set((out / "store").rglob("part-*.parquet")) - before)
    process.send(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.output
    assert "run the same command to go on" in process.output and "Traceback" not in process.output
    again = start(*command, log=tmp_path / "again")
    assert again.wait() == 0, again.output
    assert weights(out / "student") == weights(tmp_path / "undisturbed" / "student")
    keys = stored_keys(out / "store", cache)
    assert len(keys) == len(set(keys)) and sorted(keys) == sorted(
        stored_keys(tmp_path / "undisturbed" / "store", cache)
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "vllm"])
def test_other_engines_draw_the_students_samples(cache, teacher, student, tmp_path, engine):
    """The student of vLLM differs in the last bits, so another sample may follow; those of ray are the same."""
    pytest.importorskip(engine)
    settings = ["distill.objective=jsd", "distill.on_policy.refreshes=1", "distill.on_policy.validation=0"]
    drawn = {}
    for name in ("hf", engine):
        run(cache, teacher, student, tmp_path / name, *settings, f"distill.on_policy.engine={name}")
        drawn[name] = {row.key for row in Selection(tmp_path / name / "student-rounds").rows("round0000")}
    if engine == "ray":
        assert drawn["hf"] == drawn["ray"]
        assert weights(tmp_path / "hf" / "student") == weights(tmp_path / "ray" / "student")
    else:
        assert len(drawn["vllm"]) > 0.9 * len(drawn["hf"])
