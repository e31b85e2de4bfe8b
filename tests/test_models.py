"""What holds for models: the same weights are the same teacher, wherever they are and whatever they are called."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from pipeline.errors import UserError
from pipeline.models import (
    describe_model,
    load_causal_lm,
    load_config,
    load_tokenizer,
    require_same_tokenizer,
    save_model,
    stop_token_ids,
    word_tokenizer,
)
from tests.conftest import WORDS, make_model


def test_the_same_weights_at_another_path_are_the_same_teacher(teacher, tmp_path):
    copy = tmp_path / "other" / "name"
    shutil.copytree(teacher, copy)
    (copy / "README.md").write_text("# another card\n")
    one, other = describe_model(teacher, "float32"), describe_model(copy, "float32")
    assert one["identity"] == other["identity"] and one["licence"] == "apache-2.0" and other["licence"] is None


def change_weight(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def change_tokenizer(folder):
    word_tokenizer(WORDS[::-1]).save_pretrained(folder)


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


@pytest.mark.parametrize("change", [change_weight, change_tokenizer, change_config])
def test_any_change_makes_another_teacher(teacher, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    before = describe_model(copy, "float32")["identity"]
    change(copy)
    assert describe_model(copy, "float32")["identity"] != before


def test_the_number_type_is_part_of_the_identity(teacher):
    assert describe_model(teacher, "bfloat16")["identity"] != describe_model(teacher, "float32")["identity"]
    assert describe_model(teacher, "auto") == describe_model(teacher, "float32")


def test_other_weight_formats_are_refused(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    torch.save({}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        describe_model(copy, "float32")
    with pytest.raises(UserError, match="cannot load the model"):
        load_causal_lm(copy)


@pytest.mark.parametrize("source", ["/absent/model", "./absent", "absent/deep/model", "absent"])
def test_a_path_that_does_not_exist_is_named(source):
    with pytest.raises(UserError, match=f"no model at {source}"):
        load_config(source)


def test_a_broken_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"cannot load the model of {tmp_path}"):
        load_config(tmp_path)
    with pytest.raises(UserError, match=f"cannot load the tokenizer of {tmp_path}"):
        load_tokenizer(tmp_path)


def test_teacher_and_student_must_share_the_tokenizer(teacher, student, tmp_path):
    identity = describe_model(teacher, "float32")["tokenizer"]
    require_same_tokenizer(identity, load_tokenizer(student), student)
    stranger = make_model(tmp_path / "stranger", seed=0, words=WORDS[::-1])
    with pytest.raises(UserError, match=r"stranger .* is not the teacher's"):
        require_same_tokenizer(identity, load_tokenizer(stranger), stranger)


def test_stop_tokens_are_those_of_the_tokenizer_and_of_the_generation_config(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    tokenizer = load_tokenizer(copy)
    assert stop_token_ids(copy, tokenizer) == (tokenizer.eos_token_id,)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert stop_token_ids(copy, tokenizer) == (2, 7)
    (copy / "generation_config.json").unlink()
    assert stop_token_ids(copy, tokenizer) == (2,)


def test_only_a_folder_of_a_model_is_replaced(teacher, tmp_path):
    model, tokenizer = load_causal_lm(teacher), load_tokenizer(teacher)
    for name in ("new", "new"):  # the second time over the first
        save_model(tmp_path / name, model, tokenizer, "# card\n")
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "notes", "file", "."):
        with pytest.raises(UserError, match="choose another --out"):
            save_model(tmp_path / name, model, tokenizer, "# card\n")
    assert (tmp_path / "mine" / "deep").exists() and (tmp_path / "notes" / "notes.json").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_hidden_generation_settings_are_not_used(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    (copy / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 5.0, "temperature": 0.1, "do_sample": True})
    )
    assert load_causal_lm(copy).generation_config.repetition_penalty in (None, 1.0)
