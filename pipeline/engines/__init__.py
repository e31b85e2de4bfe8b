"""Teacher engines behind one interface: vllm, hf (transformers), ray (replicas of one), text (none at all) and stub."""

import importlib.util
from pathlib import Path

from pipeline.engines.base import Answer, Ask, Engine, EngineDead, Failure, Loading
from pipeline.errors import UserError
from pipeline.params import Generate

__all__ = [
    "Answer", "Ask", "Engine", "EngineDead", "Failure", "Loading", "choose_engine", "open_engine",
    "replica_engine", "require_supported",
]  # fmt: skip


def choose_engine(name: str, encoder_decoder: bool = False) -> str:
    """Resolve `auto`: vllm where it is installed, but hf for encoder-decoder models, which vLLM does not run.

    Raises UserError where vLLM or Ray is asked for and cannot serve.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UserError(
            "engine vllm: the package vllm is not installed. Use --engine hf, or install it with ./xkd setup"
        )
    if name == "vllm" and encoder_decoder:
        raise UserError("engine vllm: vLLM does not run encoder-decoder models; use --engine hf")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError(
            "engine ray: the package ray is not installed. Install this project's extra: pip install -e '.[ray]', or "
            "use --engine auto"
        )
    return ("vllm" if installed and not encoder_decoder else "hf") if name == "auto" else name


def replica_engine(settings: Generate, encoder_decoder: bool) -> str:
    """What ray is to run copies of; `auto` is left to the machine that runs them, unless only one engine can serve."""
    if encoder_decoder:
        return choose_engine(settings.replica_engine, encoder_decoder)
    return "vllm" if settings.replica_engine == "auto" and _vllm_only(settings) else settings.replica_engine


def require_supported(engine: str, settings: Generate) -> None:
    """Raises UserError where only vLLM could do what is asked of another engine."""
    asked = _vllm_only(settings)
    if engine != "vllm" and asked:
        raise UserError(f"engine {engine} has no {' and no '.join(asked)}: leave the default, or use --engine vllm")


def _vllm_only(settings: Generate) -> list[str]:
    """Parameters that are given and that only vLLM has."""
    default = Generate()
    names = ("quantization", "tensor_parallel", "pipeline_parallel", "engine_options")
    return [f"generate.{name}" for name in names if getattr(settings, name) != getattr(default, name)]


def open_engine(name: str, folder: Path, loading: Loading) -> Engine:
    """Load the teacher in `folder` (with ray: when it is first asked)."""
    if name == "vllm":
        from pipeline.engines.vllm import VllmEngine

        return VllmEngine(folder, loading)
    if name == "hf":
        from pipeline.engines.hf import HfEngine

        return HfEngine.load(folder, loading.dtype, loading.vocabulary)
    if name == "ray":
        from pipeline.engines.ray import RayEngine

        return RayEngine(folder, loading)
    if name == "text":
        from pipeline.engines.given import TextEngine

        return TextEngine()
    from pipeline.engines.stub import StubEngine

    return StubEngine.load(folder, loading.vocabulary)
