"""Engines behind one interface (`base.Engine`), each in a module that is imported when it is opened.

To add one: a module beside this one with the class; its `EngineKind` in ENGINES and its import in `open_engine` here;
its name in `Generate.engine` (pipeline/params/teacher.py), and in `replica_engine` there if ray may run copies of it;
the help of `--engine` (pipeline/cli/app.py); a test of its own; and params.yaml and docs/parameters.md made anew.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.engines.base import Answer, Ask, Engine, EngineDead, Failure, Loading
from pipeline.errors import UserError
from pipeline.params import Generate

__all__ = [
    "ENGINES", "Answer", "Ask", "Engine", "EngineDead", "Failure", "Loading", "choose_engine", "open_engine",
    "replica_engine", "require_supported",
]  # fmt: skip

_VLLM_ONLY = ("quantization", "tensor_parallel", "pipeline_parallel", "engine_options")


@dataclass(frozen=True)
class EngineKind:
    """What is known of an engine before it is loaded."""

    package: str | None = None  # which must be installed
    install: str = ""  # how
    seq2seq: bool = True  # whether it runs encoder-decoder models
    options: tuple[str, ...] = ()  # parameters of generate that only some engines have


ENGINES = {
    "vllm": EngineKind("vllm", "Use --engine hf, or install it with ./xkd setup", False, _VLLM_ONLY),
    "hf": EngineKind(),
    "ray": EngineKind("ray", "Install this project's extra: pip install -e '.[ray]', or use --engine auto"),
    "text": EngineKind(),
    "stub": EngineKind(),
}


def choose_engine(name: str, encoder_decoder: bool = False) -> str:
    """Resolve `auto`: vllm where it is installed, but hf for encoder-decoder models, which vLLM does not run.

    Raises UserError where the engine asked for cannot serve.
    """
    if name == "auto":
        return "vllm" if _is_installed("vllm") and not encoder_decoder else "hf"
    kind = ENGINES[name]
    if not _is_installed(name):
        raise UserError(f"engine {name}: the package {kind.package} is not installed. {kind.install}")
    if encoder_decoder and not kind.seq2seq:
        raise UserError(f"engine {name}: it does not run encoder-decoder models; use --engine hf")
    return name


def _is_installed(name: str) -> bool:
    package = ENGINES[name].package
    return package is None or importlib.util.find_spec(package) is not None


def replica_engine(settings: Generate, encoder_decoder: bool) -> str:
    """What ray is to run copies of; `auto` is left to the machine that runs them, unless only one engine can serve."""
    if encoder_decoder:
        return choose_engine(settings.replica_engine, encoder_decoder)
    return "vllm" if settings.replica_engine == "auto" and _changed(settings, _VLLM_ONLY) else settings.replica_engine


def require_supported(engine: str, settings: Generate) -> None:
    """Raises UserError where something is asked of an engine that it does not have. engine: with ray, the replicas'."""
    options = ENGINES[engine].options if engine in ENGINES else ()
    if lacking := _changed(settings, [name for name in _VLLM_ONLY if name not in options]):
        raise UserError(f"engine {engine} has no {' and no '.join(lacking)}: leave the default, or use --engine vllm")


def _changed(settings: Generate, names: Sequence[str]) -> list[str]:
    """Which of these parameters are not at their default."""
    default = Generate()
    return [f"generate.{name}" for name in names if getattr(settings, name) != getattr(default, name)]


def open_engine(name: str, folder: Path, loading: Loading) -> Engine:
    """Load the model in `folder` (with ray: when it is first asked)."""
    if name == "vllm":
        from pipeline.engines.vllm import VllmEngine

        return VllmEngine(folder, loading)
    if name == "hf":
        from pipeline.engines.hf import HfEngine

        return HfEngine.load(folder, loading)
    if name == "ray":
        from pipeline.engines.ray import RayEngine

        return RayEngine(folder, loading)
    if name == "text":
        from pipeline.engines.given import TextEngine

        return TextEngine()
    from pipeline.engines.stub import StubEngine

    return StubEngine.load(folder, loading)
