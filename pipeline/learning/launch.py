"""Train in this process, or in several that are started for it, each `python -m pipeline.learning.launch JOB`.

Each makes the job's learner anew and takes its part of every batch. What was trained comes back in a folder of the
run; checkpoints are those of one process, so that a killed run goes on with any number of processes.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import format_exc

from pipeline import console, interrupts

if __name__ == "__main__":  # before the imports below, which take seconds
    interrupts.install()
    console.quiet_libraries()

import safetensors.torch

from pipeline.errors import Interrupted, UserError
from pipeline.files import read_json, read_text, write_json_atomically
from pipeline.learning import processes
from pipeline.learning.checkpoints import keeps_up_to, step_of, whole_checkpoint
from pipeline.learning.job import Job, Trained, Training
from pipeline.learning.trainer import run
from pipeline.provenance import seconds_since_start

_ROOT = Path(__file__).parents[2]
_JOB = "job.json"  # in a run folder: what the processes are told
_WEIGHTS, _HISTORY = "trained.safetensors", "trained.json"  # and what they leave, the history last
_PARENT = "XKD_LAUNCHED_BY"  # the process that waits for them
_ERROR = "TORCHELASTIC_ERROR_FILE"  # where one of them says why it ends
_WAIT = 0.2  # seconds between two looks at them


def launch(job: Job, training: Training) -> Trained:
    """Train what `training` holds, which is what the job makes, in as many processes as it says.

    Raises UserError where a process ends before its work is done, and as `trainer.run` does; after a signal
    `Interrupted`, with a checkpoint of the step that was running.
    """
    if processes.launched() > 1:
        raise UserError(
            "this command starts the processes that train by itself: start it without torchrun or accelerate launch, "
            "and set train.processes"
        )
    if job.train.processes == 1:
        return run(job, training)
    if not (job.run / _HISTORY).is_file():
        _start(job)
    safetensors.torch.load_model(training.learner, str(job.run / _WEIGHTS))
    left = read_json(job.run / _HISTORY)
    waited = left["first_step"] and left["first_step"] - time.time() + seconds_since_start()
    return Trained(training.learner, left["history"], waited)


def _start(job: Job) -> None:
    """Run the processes to their end."""
    count = job.train.processes
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "none"  # it would take our handlers' place
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    job.run.mkdir(parents=True, exist_ok=True)
    (job.run / _JOB).write_text(job.model_dump_json(), encoding="utf-8")
    command = ("-P", "-m", "pipeline.learning.launch", str(job.run / _JOB))
    console.say(f"{job.what}: {count} processes")
    with TemporaryDirectory() as logs, interrupts.deferred():
        running = start_processes(
            "training", sys.executable, dict.fromkeys(range(count), command), _environments(count),
            DefaultLogsSpecs(logs, redirects={rank: Std.ALL for rank in range(1, count)}),
        )  # fmt: skip
        told = False
        try:
            while (ended := running.wait(timeout=_WAIT)) is None:
                if interrupts.noted() and not told:
                    told = True
                    for process in running.pids().values():
                        with suppress(ProcessLookupError):
                            os.kill(process, interrupts.noted())
        finally:
            running.close(signal.SIGKILL)
        checkpoint = whole_checkpoint(job.run)
        keeps_up_to(step_of(checkpoint) if checkpoint else 0, job.what)
        if not interrupts.noted() and not (job.run / _HISTORY).is_file():
            raise _failed(job, count, ended, checkpoint)


def _environments(count: int) -> dict[int, dict[str, str]]:
    """What each process needs to find the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads, "PYTHONPATH": path, _PARENT: os.getpid(),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }  # fmt: skip
    shared = {name: str(value) for name, value in shared.items()}
    return {rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}


def _failed(job: Job, count: int, ended, checkpoint: str | None) -> UserError:
    """Why: what a process found wrong, or else how the first one ended, which the others end of."""
    kept = f"up to step {step_of(checkpoint)} is kept" if checkpoint else "before its first checkpoint"
    kept = f"{kept}; run the same command to go on"
    if not ended.is_failed():
        return UserError(f"{job.what}: one of the {count} processes was ended by a signal, {kept}")
    failures, said = sorted(ended.failures.values(), key=lambda failure: failure.timestamp), {}
    for failure in failures:
        with suppress(OSError):
            said[failure.local_rank] = json.loads(read_text(Path(failure.error_file)))
    for each in said.values():
        if each["expected"]:
            return UserError(each["message"])
    killed = [failure for failure in failures if failure.local_rank not in said]
    first = [*killed, *failures][0]
    how = f"exit code {first.exitcode}" if first.exitcode >= 0 else signal.Signals(-first.exitcode).name
    if not killed:
        console.say(said[first.local_rank]["message"])
        how = said[first.local_rank]["message"].strip().splitlines()[-1][:300]
    return UserError(f"{job.what}: process {first.local_rank} of {count} ended with {how}, {kept}")


def main(path: Path) -> int:
    """One of the processes."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    job = Job.model_validate_json(read_text(path))
    try:
        trained = run(job)
    except Interrupted:
        return 0  # the one that waits got the signal too
    except Exception as error:
        expected = isinstance(error, UserError)
        told = {"message": str(error) if expected else format_exc(), "expected": expected}
        write_json_atomically(Path(os.environ[_ERROR]), told | {"timestamp": int(time.time())})
        os._exit(1)  # the others may be gone, for whom a process group waits in its end
    if processes.rank() == 0:
        safetensors.torch.save_model(trained.learner, str(job.run / _WEIGHTS))
        first = trained.seconds_to_first_step and time.time() - seconds_since_start() + trained.seconds_to_first_step
        write_json_atomically(job.run / _HISTORY, {"history": trained.history, "first_step": first})
    processes.leave()
    return 0


def _end_with_the_parent() -> None:
    """A process that was left alone would train on beside the run that goes on."""
    import psutil

    parent = psutil.Process(int(os.environ[_PARENT]))
    while parent.is_running():
        time.sleep(_WAIT)
    os._exit(1)


if __name__ == "__main__":
    interrupts.begin()
    sys.exit(main(Path(sys.argv[1])))
