"""What holds for the ray engine, with two actors in processes of their own: the same rows, none lost to a death."""

import importlib.util
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

from pipeline.engines import Ask, EngineDead, Failure, Loading, choose_engine, replica_engine
from pipeline.engines.hf import HfEngine
from pipeline.engines.ray import RayEngine, equal_share
from pipeline.engines.replica import Replica
from pipeline.engines.stub import StubEngine
from pipeline.errors import UserError
from pipeline.models import load_lm
from pipeline.params import Generate
from pipeline.store.schema import read_metadata
from pipeline.store.selection import Selection
from pipeline.teacher.teacher import Teacher
from stages.generate import Summary, generate
from tests.conftest import ROOT, at_once, make_params, make_prompts, run_cli
from tests.engines.test_engines import DRAWN, GREEDY, as_given, by_key, make_asks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for the module; that the engine starts and ends its own is a test of processes below.

    Ray is told of two GPUs, one for each copy of `hf`; copies of `stub` share the CPUs.
    """
    import ray

    ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def open_ray(request):
    """An engine on the cluster, closed after the test; `replica`: what its copies are in place of `Replica`."""

    def opened(folder: Path, engine: str = "hf", replica: type[Replica] = Replica, **loading) -> RayEngine:
        made = RayEngine(folder, Loading("float32", 40, **{"replicas": 2, "replica_engine": engine} | loading))
        made.replica = replica
        request.addfinalizer(made.close)
        return made

    return opened


def test_a_copy_is_given_at_most_as_many_rows_as_a_shard_holds(teacher):
    settings = make_params(teacher, "generate.rows_per_shard=7").generate
    assert Teacher.of(settings).loading.rows == 7


def killing(marks: Path, key: str | None = None, seconds: float = 0.0) -> type[Replica]:
    """Replicas that note their process and the rows they get, take their time, and kill it at `key`, or at any row."""

    class Killing(Replica):
        def answer(self, job, table):
            with (marks / str(os.getpid())).open("a") as mark:
                print(table.num_rows, file=mark)
            time.sleep(seconds)
            if key is None or key in table.column("key").to_pylist():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(job, table)

    return Killing


def assert_same_rows(ours, alone) -> None:
    assert ours.keys() == alone.keys()
    for key, answer in alone.items():
        np.testing.assert_array_equal(ours[key].response_ids, answer.response_ids)
        np.testing.assert_array_equal(ours[key].topk_ids, answer.topk_ids)
        assert ours[key].finish == answer.finish
        assert ours[key].dropped == pytest.approx(answer.dropped, abs=1e-4)
        for name in ("logprobs", "topk_logprobs", "lse", "tau", "tail"):
            if getattr(answer, name) is None:
                assert getattr(ours[key], name) is None
            else:
                np.testing.assert_allclose(getattr(ours[key], name), getattr(answer, name), atol=1e-4)
                assert getattr(ours[key], name).dtype == np.float32


def test_two_replicas_make_the_rows_that_the_engine_makes_alone_and_are_loaded_once(teacher, open_ray, tmp_path):
    class Counted(Replica):
        def load(self):
            (tmp_path / str(os.getpid())).touch()
            super().load()

    asks, alone, engine = make_asks(40), HfEngine(load_lm(teacher)), open_ray(teacher, replica=Counted)
    drawn = by_key(engine.sample(iter(asks), DRAWN, 5))
    assert_same_rows(drawn, by_key(alone.sample(asks, DRAWN, 5)))
    given = [Ask(ask.key, ask.prompt_ids, 0, drawn[ask.key].response_ids) for ask in asks]
    assert_same_rows(by_key(engine.score(given, 5, (2,))), by_key(alone.score(given, 5, (2,))))
    assert len(list(tmp_path.iterdir())) == 2


def test_closing_frees_what_the_copies_held(teacher, open_ray):
    import ray

    engine = open_ray(teacher, "stub")
    assert len(by_key(engine.sample(make_asks(8), DRAWN, 5))) == 8
    used = ray.available_resources().get("CPU", 0)
    engine.close()
    with at_once(30):
        while ray.available_resources().get("CPU", 0) <= used:
            time.sleep(0.1)


def test_who_stops_listening_leaves_the_copies_free_for_the_next(teacher, open_ray, tmp_path):
    engine = open_ray(teacher, "stub", killing(tmp_path, "none", seconds=0.5))
    answers = engine.sample(make_asks(24), DRAWN, 5)
    next(answers)
    answers.close()
    assert len(by_key(engine.sample(make_asks(6), DRAWN, 5))) == 6


def test_replicas_draw_supports_and_know_which_ids_are_padding(teacher, open_ray):
    engine = open_ray(teacher, "stub", vocabulary=30)
    alone, asks = StubEngine(44, vocabulary=30), make_asks(24)
    drawn = by_key(engine.sample(asks, DRAWN, 5, support="sampled"))
    assert_same_rows(drawn, by_key(alone.sample(asks, DRAWN, 5, support="sampled")))
    given = as_given(asks, drawn)
    scored = by_key(engine.score(given, 5, (2,), support="sampled"))
    assert_same_rows(scored, by_key(alone.score(given, 5, (2,), support="sampled")))
    assert min(answer.dropped for answer in scored.values()) > 0.01


def test_a_replica_that_cannot_serve_the_support_ends_the_job_with_its_reason_and_no_row(teacher, open_ray):
    class TopKAlone(Replica):
        def load(self):
            def refuse(asks, sampling, k, support):
                raise UserError("use generate.support=topk")
                yield

            super().load()
            self.engine.sample = refuse

    engine = open_ray(teacher, "stub", TopKAlone)
    with pytest.raises(RuntimeError, match=r"generate\.support=topk"):
        list(engine.sample(make_asks(4), DRAWN, 5, support="sampled"))


def test_a_copy_that_no_machine_can_hold_is_an_error(teacher, open_ray):
    """There are two GPUs."""
    with pytest.raises(UserError, match=r"needs 3 GPUs .* largest has 2 GPUs.*tensor_parallel"):
        list(open_ray(teacher, tensor_parallel=3).sample(make_asks(4), GREEDY, 5))


@pytest.mark.parametrize(
    "cpus, replicas, share",
    [([8], 2, 4), ([8, 2], 2, 4), ([4, 4], 3, 2), ([2, 3], 2, 2), ([2], 3, 2 / 3), ([1, 1], 3, 0.5), ([0, 0], 2, 0)],
)
def test_each_copy_gets_as_many_cpus_as_let_all_of_them_be_placed(cpus, replicas, share):
    found = equal_share(cpus, replicas)
    assert found == pytest.approx(share, abs=1e-3)
    assert not found or sum(int(each / found + 1e-9) for each in cpus) >= replicas


def test_auto_and_the_versions_are_those_of_the_machine_that_runs_a_copy(teacher, monkeypatch):
    """Not of the one that the command runs on, which here knows neither vLLM nor its own packages."""
    expected = choose_engine("auto")
    monkeypatch.setattr("pipeline.engines.ray.versions", lambda: {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = RayEngine(teacher, Loading("float32", 40, replica_engine="auto"))
    assert found.loading.replica_engine == found.description["replica"]["engine"] == expected
    assert found.description["replica"]["torch"] == torch.__version__
    assert RayEngine(teacher, Loading("float32", 40, replica_engine="hf")).loading.replica_engine == "hf"


def test_auto_is_left_to_the_copies_unless_only_one_engine_can_serve():
    assert replica_engine(Generate(), encoder_decoder=False) == "auto"
    assert replica_engine(Generate(), encoder_decoder=True) == "hf"
    assert replica_engine(Generate(tensor_parallel=2), encoder_decoder=False) == "vllm"


def test_a_row_that_cannot_be_made_fails_alone_and_of_three_copies_two_are_placed(teacher, open_ray, capsys):
    """A prompt that is too long, and one that makes the engine raise while it works on a whole table."""
    three = open_ray(teacher, replicas=3)
    too_long = Ask("a" * 32, np.full(60, 5, np.int32), 1)
    broken = Ask("b" * 32, np.array([5, -4000, 6], np.int32), 1)  # no token at all, which no engine looks for
    asks = make_asks(30)
    found = {answer.key: answer for answer in three.sample([too_long, broken, *asks], GREEDY, 5)}
    assert found.keys() == {too_long.key, broken.key, *(ask.key for ask in asks)}
    assert {key for key, answer in found.items() if isinstance(answer, Failure)} == {too_long.key, broken.key}
    assert "context of 64" in found[too_long.key].reason and "IndexError" in found[broken.key].reason
    assert "GPUs for 2 of generate.replicas: 3 copies" in capsys.readouterr().err
    made = by_key(answer for answer in found.values() if not isinstance(answer, Failure))
    assert_same_rows(made, by_key(HfEngine(load_lm(teacher)).sample(asks, GREEDY, 5)))


def test_a_killed_replica_loses_no_row(teacher, open_ray, tmp_path):
    """SIGKILL of one of the two processes, after the first answers have come; it had at most `rows` of them."""
    asks, engine = make_asks(64), open_ray(teacher, "stub", killing(tmp_path, "none", seconds=0.5), rows=6)
    answers, found = engine.sample(asks, DRAWN, 5), []
    found.append(next(answers))
    victim = int(next(tmp_path.iterdir()).name)
    os.kill(victim, signal.SIGKILL)
    found.extend(answers)
    assert_same_rows(by_key(found), by_key(StubEngine(44).sample(asks, DRAWN, 5)))
    assert len(found) == 64
    assert len(list(tmp_path.iterdir())) in (2, 3)  # the other one, and the one that came after, if it was in time
    assert max(int(rows) for mark in tmp_path.iterdir() for rows in mark.read_text().split()) == 6


def test_a_row_that_kills_every_replica_fails_alone_and_the_job_ends(teacher, open_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.engines.ray._TRIES", 2)
    monkeypatch.setattr("pipeline.engines.ray._TRIES_ALONE", 1)
    asks = make_asks(24)
    engine = open_ray(teacher, "stub", killing(tmp_path, asks[10].key))
    found = {answer.key: answer for answer in engine.sample(asks, DRAWN, 5)}
    failure = found.pop(asks[10].key)
    assert isinstance(failure, Failure) and "died" in failure.reason
    others = [ask for ask in asks if ask.key != failure.key]
    assert_same_rows(by_key(found.values()), by_key(StubEngine(44).sample(others, DRAWN, 5)))
    assert len(list(tmp_path.iterdir())) <= 2 + 3  # one after each death


def test_rows_that_a_broken_cluster_leaves_open_are_asked_again_by_the_next_run(teacher, tmp_path, own_store, capsys):
    """Every process dies from the start: nothing is recorded as skipped."""
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2)
    params = make_params(teacher, "generate.engine=ray", "generate.replica_engine=stub", "generate.samples=1")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.engines.ray._TRIES", 1)
        patched.setattr("pipeline.engines.ray._TRIES_ALONE", 1)
        patched.setattr(RayEngine, "replica", killing(tmp_path))
        with pytest.raises(UserError, match="nothing could be made"):
            generate(params, prompts, tmp_path / "a")
    assert "no answer for 2 rows" in capsys.readouterr().err and not list(own_store.rglob("skipped.jsonl"))
    assert generate(params, prompts, tmp_path / "a").made == 2


def test_an_engine_that_says_it_is_dead_is_replaced_and_the_row_tried_elsewhere(teacher, open_ray, tmp_path):
    class Dead(Replica):
        def load(self):
            super().load()
            if not (tmp_path / "dead").exists():
                (tmp_path / "dead").touch()
                self.engine.sample = self._die

        def _die(self, asks, sampling, k, support):
            raise EngineDead("the device failed")

    engine, asks = open_ray(teacher, "stub", Dead), make_asks(24)
    assert_same_rows(by_key(engine.sample(asks, DRAWN, 5)), by_key(StubEngine(44).sample(asks, DRAWN, 5)))


def test_a_copy_that_dies_while_it_loads_is_started_again_only_a_few_times(teacher, open_ray, tmp_path):
    class Dying(Replica):
        def load(self):
            (tmp_path / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert list(open_ray(teacher, "stub", Dying).sample(make_asks(4), GREEDY, 5)) == []
    assert len(list(tmp_path.iterdir())) <= 2 + 3


def test_a_replica_that_cannot_start_ends_the_job_with_its_reason(open_ray, tmp_path):
    with pytest.raises(RuntimeError, match=r"no .*at .*nowhere"):
        list(open_ray(tmp_path / "nowhere").sample(make_asks(2), GREEDY, 5))


def test_rows_made_through_ray_belong_to_the_model_and_name_their_engine(teacher, tmp_path, own_store):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=12)
    through = make_params(teacher, "generate.engine=ray", "generate.replica_engine=hf")
    assert generate(through, prompts, tmp_path / "a") == Summary(0, 24, 0)
    assert generate(make_params(teacher), prompts, tmp_path / "b") == Summary(24, 0, 0)
    generate(make_params(teacher), prompts, tmp_path / "c", tmp_path / "other")
    for ours, alone in zip(
        Selection(tmp_path / "a").rows("train"), Selection(tmp_path / "c").rows("train"), strict=True
    ):
        assert ours.key == alone.key and (ours.response_ids == alone.response_ids).all()
    engine = read_metadata(next(own_store.glob("*/*/part-*.parquet")))["engine"]
    assert engine["engine"] == "ray" and engine["replicas"] == 2 and engine["ray"]
    assert engine["replica"]["engine"] == "hf" and engine["replica"]["torch"]


@pytest.mark.parametrize("joins", [True, False], ids=["a running cluster", "its own"])
def test_the_command_uses_the_cluster_of_ray_address_or_one_of_its_own_and_stays_quiet(teacher, tmp_path, joins):
    import ray

    def actors() -> int:
        return len(ray._private.state.actors())

    prompts, before = make_prompts(tmp_path / "prompts.parquet", train=8), actors()
    environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if joins else {}
    done = run_cli(
        "generate", "--teacher", teacher, "--prompts", prompts, "--out", tmp_path / "out", "--engine", "ray",
        "--set", "generate.replica_engine=stub", "--template", "{prompt}", "--max-tokens", "4",
        "--params", ROOT / "params.yaml", env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "made now" in done.stdout and "made now" not in done.stderr
    assert not [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if re.search(r"ray\.|Ray|Dataset|pid=|WARNING|Traceback", line)
    ]
    assert (actors() > before) == joins
