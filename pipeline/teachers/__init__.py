"""Teacher engines behind one interface: vllm, hf (transformers), text (none at all) and stub."""

import importlib.util
from pathlib import Path

from pipeline.errors import UserError
from pipeline.teachers.base import Answer, Ask, Engine, Failure

__all__ = ["Answer", "Ask", "Engine", "Failure", "choose_engine", "open_engine"]


def choose_engine(name: str, encoder_decoder: bool = False) -> str:
    """Resolve `auto`: vllm where it is installed, but hf for encoder-decoder models, which vLLM does not run.

    Raises UserError where vLLM is asked for and cannot serve.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UserError(
            "engine vllm: the package vllm is not installed. Use --engine hf, or install it with ./xkd setup"
        )
    if name == "vllm" and encoder_decoder:
        raise UserError("engine vllm: vLLM does not run encoder-decoder models; use --engine hf")
    return ("vllm" if installed and not encoder_decoder else "hf") if name == "auto" else name


def open_engine(name: str, folder: Path, dtype: str, context: int) -> Engine:
    """Load the teacher in `folder`. `context` is the longest prompt plus response that will be asked for."""
    if name == "vllm":
        from pipeline.teachers.vllm import VllmEngine

        return VllmEngine(folder, dtype, context)
    if name == "hf":
        from pipeline.teachers.hf import HfEngine

        return HfEngine.load(folder, dtype)
    if name == "text":
        from pipeline.teachers.text import TextEngine

        return TextEngine()
    from pipeline.teachers.stub import StubEngine

    return StubEngine.load(folder)
