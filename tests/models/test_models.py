"""What holds for models: the same weights are the same teacher, wherever they are and whatever they are called."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.learning.forward import require_plain_head
from pipeline.models import (
    build_from_config,
    describe_model,
    keep_layers,
    link_model,
    load_config,
    load_lm,
    load_tokenizer,
    local_folder,
    require_same_tokenizer,
    resolve,
    save_model,
    stop_token_ids,
    tokenizer_identity,
    weights_digest,
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


def test_quantization_makes_another_teacher_and_without_it_identities_stay_what_they_were(teacher):
    plain, quantized = describe_model(teacher, "float32"), describe_model(teacher, "float32", "fp8")
    assert quantized["identity"] != plain["identity"] and quantized["quantization"] == "fp8"
    config = json.loads((teacher / "config.json").read_text())
    for key in ("transformers_version", "dtype", "use_cache", "_name_or_path"):
        config.pop(key, None)
    stored = {
        "weights": weights_digest(teacher), "config": config, "dtype": "float32",
        "tokenizer": tokenizer_identity(load_tokenizer(teacher)),
    }  # fmt: skip
    assert plain["identity"] == digest(stored)[:16] and "quantization" not in plain


def test_other_weight_formats_are_refused(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    torch.save({}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        describe_model(copy, "float32")
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        load_lm(copy)


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
    model, tokenizer = load_lm(teacher), load_tokenizer(teacher)
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
    assert load_lm(copy).generation_config.repetition_penalty in (None, 1.0)


def test_kept_layers_are_the_base_s_own_and_the_cut_model_is_loaded_again(tmp_path, teacher):
    deep = load_lm(make_model(tmp_path / "deep", seed=3, layers=7))
    tokenizer = load_tokenizer(teacher)
    before = [block.mlp.up_proj.weight.clone() for block in deep.model.layers]
    cut = keep_layers(deep, 3)
    for block, number in zip(cut.model.layers, (0, 3, 6), strict=True):
        assert torch.equal(block.mlp.up_proj.weight, before[number])
    save_model(tmp_path / "cut", cut, tokenizer, "")
    again = load_lm(tmp_path / "cut")
    ids = torch.arange(4, 12)[None]
    assert torch.equal(again(ids).logits, cut.eval()(ids).logits) and again.config.num_hidden_layers == 3
    # Its key-value cache works: generation is what repeated forward passes say.
    generated = again.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        ids = torch.cat([ids, again(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, ids)
    with pytest.raises(UserError, match=r"cannot cut a model with 3 layers to 7"):
        keep_layers(again, 7)


def test_a_link_stands_for_a_model_and_notices_other_weights(tmp_path, teacher):
    shutil.copytree(teacher, tmp_path / "model")
    link_model(tmp_path / "link", tmp_path / "model", weights_digest(tmp_path / "model"))
    direct, linked = describe_model(tmp_path / "model", "auto"), describe_model(tmp_path / "link", "auto")
    assert direct == linked
    assert resolve(tmp_path / "link") == str(tmp_path / "model") and local_folder(tmp_path / "link").is_dir()
    assert torch.equal(load_lm(tmp_path / "link").lm_head.weight, load_lm(tmp_path / "model").lm_head.weight)
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] += 1
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="have changed since it was made the teacher"):
        describe_model(tmp_path / "link", "auto")
    link_model(tmp_path / "link", tmp_path / "model", weights_digest(tmp_path / "model"))  # replaced, not refused
    assert describe_model(tmp_path / "link", "auto")["identity"] != direct["identity"]


def test_a_configuration_alone_becomes_a_new_model_for_the_tokenizer(teacher):
    tokenizer = load_tokenizer(teacher)
    one, same, other = (build_from_config(load_config(teacher), tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight) and not torch.equal(
        one.lm_head.weight, other.lm_head.weight
    )
    assert one.config.hidden_size == 64 and one.config.eos_token_id == tokenizer.eos_token_id


def test_a_model_that_changes_its_logits_after_the_head_is_refused(teacher):
    from transformers import CohereConfig, CohereForCausalLM

    require_plain_head(load_lm(teacher), "a plain model")
    config = CohereConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, logit_scale=0.1
    )
    with pytest.raises(UserError, match=r"CohereForCausalLM.*after its language-model head"):
        require_plain_head(CohereForCausalLM(config), "the student")
