"""`doctor`: is this machine fit for the pipeline, and if not, what to do about it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from pipeline.errors import UserError
from pipeline.provenance import versions
from pipeline.store.requests import open_store
from pipeline.store.storage import Storage

OK, LOOK, BAD = "ok", "look", "bad"
_GIB = 2**30
_MIN_DISK, _MIN_MEMORY = 5 * _GIB, 2 * _GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; `advice` says what to do where it is not ok."""

    what: str
    state: str  # ok | look | bad
    found: str
    advice: str = ""


def examine(store: str | Path | None = None, folder: Path = Path()) -> Iterator[Finding]:
    """All findings; `bad` ones stop the pipeline, `look` ones cost time or quality. folder: the experiment's."""
    yield _engine()
    yield _accelerator()
    yield _threads()
    yield _memory()
    storage = open_store(store)
    if storage.remote:
        yield _reachable(storage)
    yield _writable("mirror of the store" if storage.remote else "store", storage.path)
    yield _disk("disk of the store", storage.path)
    yield _disk("disk of this folder", folder.absolute())
    yield _versioning()


def _engine() -> Finding:
    if importlib.util.find_spec("vllm") is None:
        advice = "transformers will run the teacher, slower on real models: ./xkd setup installs vLLM where it can"
        return Finding("engine", LOOK, "vLLM is not installed", advice)
    quiet = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    # Imported in a process of its own: it takes seconds, and a broken one can end the process.
    done = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, text=True, env=quiet)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
        advice = (
            "remove .venv/.xkd-setup and run ./xkd setup (a torchvision that does not fit is the usual cause); "
            "or use --engine hf"
        )
        return Finding("engine", BAD, f"vLLM cannot be imported: {reason}", advice)
    engines = {name: number for name, number in versions().items() if name.startswith(("vllm", "ray"))}
    return Finding("engine", OK, ", ".join(f"{name} {number}" for name, number in engines.items()))


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("accelerator", OK, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    if shutil.which("nvidia-smi"):
        advice = "install a CUDA build: remove .venv and run XKD_ENGINE=gpu ./xkd setup; check the driver"
        return Finding("accelerator", LOOK, f"an NVIDIA GPU, but torch {torch.__version__} does not see it", advice)
    return Finding("accelerator", OK, f"none: everything runs on the CPU (torch {torch.__version__})")


def _threads() -> Finding:
    process = psutil.Process()
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > cores:
        advice = f"threads wait for each other: set OMP_NUM_THREADS to {cores} or less"
        return Finding("threads", LOOK, f"OMP_NUM_THREADS is {threads} on {cores} cores", advice)
    return Finding("threads", OK, f"{cores} cores" + (f", OMP_NUM_THREADS is {threads}" if threads else ""))


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    if free < _MIN_MEMORY:
        advice = "close other programs, or choose a smaller teacher, distill.chunk and batch_size"
        return Finding("memory", LOOK, f"{free / _GIB:.1f} GiB free", advice)
    return Finding("memory", OK, f"{free / _GIB:.1f} GiB free")


def _reachable(storage: Storage) -> Finding:
    try:
        shards = sum("/part-" in name for name in storage.find())
    except UserError as error:
        advice = "check the URL, its credentials and the network, or choose another store"
        return Finding("store", BAD, str(error), advice)
    return Finding("store", OK, f"{storage.name}, {shards:,} shards")


def _writable(what: str, folder: Path) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-doctor-"):
            pass
    except OSError as error:
        advice = "choose another with --store or XKD_STORE, or make it writable"
        return Finding(what, BAD, f"{folder} cannot be written: {error.strerror}", advice)
    shards = sum(1 for _ in folder.glob("*/*/part-*.parquet"))
    return Finding(what, OK, f"{folder}, {shards:,} shards")


def _disk(what: str, folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < _MIN_DISK:
        advice = "free some space: models, checkpoints and shards need a few GiB"
        return Finding(what, LOOK, f"{free / _GIB:.1f} GiB free at {there}", advice)
    return Finding(what, OK, f"{free / _GIB:.1f} GiB free")


def _versioning() -> Finding:
    missing = [name for name in ("git", "dvc") if shutil.which(name) is None]
    if missing:
        advice = "run source .venv/bin/activate (dvc is installed there); git comes from your system's packages"
        return Finding("versioning", LOOK, f"not on the path: {', '.join(missing)}", advice)
    if subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], capture_output=True).returncode:
        advice = "dvc exp needs one: clone the project, or run git init"
        return Finding("versioning", LOOK, "not inside a git repository", advice)
    return Finding("versioning", OK, f"git and dvc {version('dvc')}")
