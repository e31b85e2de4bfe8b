"""What holds for the files of a model: the teacher is what loading reads, and nothing is loaded that is not whole."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from pipeline.errors import UserError
from pipeline.models import (
    build_from_config,
    describe_model,
    has_weights,
    licence_of,
    load_config,
    load_lm,
    load_tokenizer,
    require_loadable,
    save_model,
    stop_token_ids,
    word_tokenizer,
)
from stages.generate import generate
from tests.conftest import at_once, make_params, make_prompts, make_seq2seq_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(teacher, tmp_path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "model"))


@pytest.fixture
def sharded(model) -> Path:
    """The same model in two files with an index."""
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, model / file, metadata={"format": "pt"})
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / WEIGHTS).unlink()
    return model


def edit(path: Path, change) -> None:
    """Apply `change` to the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def identity(folder: Path) -> str:
    return describe_model(folder, "auto")["identity"]


# Which files


def test_two_files_under_swapped_names_are_not_one_teacher(model):
    edit(Path(shutil.copy(model / WEIGHTS, model / "other.safetensors")), lambda t: t["model.norm.weight"].add_(1))
    swapped = Path(shutil.copytree(model, model.parent / "swapped"))
    (swapped / WEIGHTS).rename(swapped / "kept")
    (swapped / "other.safetensors").rename(swapped / WEIGHTS)
    (swapped / "kept").rename(swapped / "other.safetensors")
    for folder in (model, swapped):  # of each, vLLM would load both files and transformers one
        with pytest.raises(UserError, match=r"other\.safetensors beside model\.safetensors"):
            identity(folder)
        with pytest.raises(UserError, match=r"other\.safetensors beside model\.safetensors"):
            load_lm(folder)
        (folder / "other.safetensors").unlink()
    assert identity(model) != identity(swapped)


def test_a_sharded_teacher_is_its_shards_whatever_their_names(sharded):
    before = identity(sharded)
    assert load_lm(sharded).num_parameters() > 0
    index = json.loads((sharded / INDEX).read_text())
    renamed = {name: file.replace("a.", "z.") for name, file in index["weight_map"].items()}
    (sharded / "a.safetensors").rename(sharded / "z.safetensors")
    (sharded / INDEX).write_text(json.dumps(index | {"weight_map": renamed}))
    assert identity(sharded) == before


def test_a_file_that_no_engine_reads_is_not_of_the_teacher_and_the_former_identity_is_named(sharded, capsys):
    before = identity(sharded)
    assert capsys.readouterr().err == ""
    save_file({"x": torch.zeros(1)}, sharded / "stray.safetensors")
    assert identity(sharded) == before
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "stray.safetensors" in said and f"identity, which is {before}: rows that an earlier version stored as" in said
    )


def swap(folder: Path) -> None:
    (folder / "a.safetensors").rename(folder / "kept")
    (folder / "b.safetensors").rename(folder / "a.safetensors")
    (folder / "kept").rename(folder / "b.safetensors")


def name_in_config(folder: Path, weights: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": weights}))


def put_in_place(kind: str, path: Path) -> None:
    """Something that is no file: a folder, a pipe, or a link that leads nowhere."""
    path.unlink(missing_ok=True)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere")}[kind]()


STRANGE = ("folder", "pipe", "link")


def rewrite_index(folder: Path, **entries) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, **entries}))


REFUSED = {
    "shards under swapped names": (swap, r"puts tensor lm_head.weight|puts tensor model\.\S+ into \w\.safetensors"),
    "a shard is absent": (lambda f: (f / "b.safetensors").unlink(), "has no b.safetensors, which loading reads"),
    "a tensor is in two shards": (
        lambda f: edit(f / "b.safetensors", lambda t: t.update(load_file(f / "a.safetensors"))),
        "twice, in a.safetensors and in b.safetensors",
    ),
    "a whole copy beside the shards": (
        lambda f: save_file({"x": torch.zeros(1)}, f / WEIGHTS), "which transformers would load, and",
    ),
    "a consolidated copy": (
        lambda f: save_file({"x": torch.zeros(1)}, f / "consolidated.safetensors"),
        "consolidated.safetensors, which vLLM would load instead",
    ),
    "an index that is cut short": (lambda f: (f / INDEX).write_text('{"weight_map": {'), "index.json is not JSON"),
    "an index of nothing": (lambda f: rewrite_index(f, weight_map={}), "has no weight_map"),
    "an index that is a list": (lambda f: (f / INDEX).write_text("[]"), "has no weight_map"),
    "an index that leads elsewhere": (
        lambda f: rewrite_index(f, weight_map={"x": "../other/a.safetensors"}), "is not a file beside it",
    ),
    "a shard that is no safetensors file": (
        lambda f: (f / "b.safetensors").write_bytes(b"\x01" * 64), "cannot read .*b.safetensors",
    ),
    "an index that is a pipe": (lambda f: put_in_place("pipe", f / INDEX), "index.json cannot be read"),
    "weights of another name": (
        lambda f: name_in_config(f, "sub/other.safetensors"), "config.json has transformers_weights 'sub/other.saf",
    ),
    **{
        f"a {kind} that is called as weights are": (
            lambda f, kind=kind: put_in_place(kind, f / "x.safetensors"), "has x.safetensors, .* not a regular file",
        )
        for kind in STRANGE
    },
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json, .*merge it into them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_two_engines_would_read_differently_is_refused(sharded, name):
    change, reason = REFUSED[name]
    change(sharded)
    for read in (identity, load_lm, require_loadable):
        with at_once(), pytest.raises(UserError, match=reason) as found:
            read(sharded)
        assert "\n" not in str(found.value)


def test_a_configuration_that_names_its_weights_is_not_one_without_weights(model):
    """`teach` would make a new model of its shape."""
    (model / WEIGHTS).rename(model / "other")
    assert not has_weights(model)
    name_in_config(model, "other")
    with pytest.raises(UserError, match="transformers_weights 'other'"):
        has_weights(model)


# Which tensors


TENSORS = {
    "absent": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"they lack model\.layers\.1\.mlp\.up_proj"),
    "more": (lambda t: t.update(extra=torch.zeros(2)), "they have more than the model: extra"),
    "another shape": (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "cannot load the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("read", [load_lm, require_loadable], ids=["load", "check without loading"])
def test_weights_that_are_not_those_of_the_configuration_are_refused(model, name, read):
    change, reason = TENSORS[name]
    edit(model / WEIGHTS, change)
    with pytest.raises(UserError, match=reason) as found:
        read(model)
    assert ("would be filled with random values" in str(found.value)) == (name == "absent")


MASKS = {
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
    "gptj": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
    "gpt_neo": ("transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"),
}
SHAPES = {"gpt2": {"n_head": 2}, "gptj": {"n_head": 2, "rotary_dim": 4}, "gpt_neo": {"num_heads": 2}}
SHAPES["gpt_neo"]["attention_types"] = [[["global"], 1]]


@pytest.mark.parametrize("read", [load_lm, require_loadable], ids=["load", "check without loading"])
@pytest.mark.parametrize("family", MASKS)
def test_masks_that_were_saved_with_old_weights_are_not_refused_and_other_tensors_are(tmp_path, family, read):
    tokenizer, folder, (mask, value) = word_tokenizer(["w0"]), tmp_path / family, MASKS[family]
    config = AutoConfig.for_model(family, hidden_size=16, num_layers=1, max_position_embeddings=8, **SHAPES[family])
    save_model(folder, build_from_config(config, tokenizer, seed=0), tokenizer, "a test model")
    edit(folder / WEIGHTS, lambda tensors: tensors.update({mask: torch.ones(1, 1, 8, 8), value: torch.tensor(-1e4)}))
    read(folder)
    edit(folder / WEIGHTS, lambda tensors: tensors.update({value: torch.ones(16)}))
    with pytest.raises(UserError, match=f"they have more than the model: {value}"):
        read(folder)


@pytest.mark.parametrize("engine", ["hf", "vllm", "ray"])
def test_no_engine_starts_with_a_tensor_less(model, tmp_path, engine, monkeypatch):
    monkeypatch.setattr("pipeline.teacher.teacher.choose_engine", lambda name, seq2seq: name)  # as if it were installed
    edit(model / WEIGHTS, lambda tensors: tensors.pop("model.norm.weight"))
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2)
    with pytest.raises(UserError, match=r"they lack model\.norm\.weight"):
        generate(make_params(model, f"generate.engine={engine}"), prompts, tmp_path / "out", tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*.parquet"))


# What a folder says beside its weights


@pytest.mark.parametrize("text", ['{"eos_token_id": ', "[1]", "\udcff", "[" * 100_000])
def test_a_generation_config_that_cannot_be_read_is_not_absent(model, text):
    (model / "generation_config.json").write_text(text, errors="surrogateescape")
    for read in (load_lm, lambda folder: stop_token_ids(folder, load_tokenizer(folder))):
        with pytest.raises(UserError, match=r"generation_config\.json"):
            read(model)


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["generation_config.json", "link.json"])
def test_what_is_in_the_place_of_a_file_is_not_absent(model, name, kind):
    put_in_place(kind, model / name)
    for read in (load_lm, lambda folder: stop_token_ids(folder, load_tokenizer(folder))):
        with at_once(), pytest.raises(UserError, match=rf"{name} cannot be read"):
            read(model)


@pytest.mark.parametrize("kind", STRANGE)
def test_a_card_that_is_no_file_states_no_licence(model, kind):
    put_in_place(kind, model / "README.md")
    with at_once():
        assert licence_of(model) is None


@pytest.mark.parametrize("eos", [-1, 9999, True, 2.0, "2", [2, None], [2, 44]])
def test_a_stop_token_that_no_model_can_say_is_refused(model, eos):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match=r"generation_config\.json has eos_token_id .*expected ids from 0 to 43"):
        stop_token_ids(model, load_tokenizer(model))


ODD = {  # JSON
    "vocab_size": ['"many"', "null", "-1", "0", "true", "1" + "0" * 4400, "2.5"],
    "max_position_embeddings": ['"long"', "-1", "[]", "1" + "0" * 20],
    "hidden_size": ["null", '"wide"', "0", "63"],
    "num_attention_heads": ["0", "3", "{}"],
    "model_type": ["null", "7", '"unheard-of"', r'"\ud83d"'],
    "rope_parameters": ["7", '{"rope_type": "odd"}'],
    "eos_token_id": ['"x"', '{"a": 1}'],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}={value[:12]}") for name, values in ODD.items() for value in values],
)
def test_odd_values_in_a_configuration_are_one_line(model, name, value):
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {name: "VALUE"}).replace('"VALUE"', value))
    try:
        load_config(model)
        describe_model(model, "auto")
        load_lm(model)
    except UserError as error:
        assert "\n" not in str(error) and str(model) in str(error)
    else:  # a value that transformers takes: then the model must be one
        assert name in ("max_position_embeddings", "eos_token_id", "num_attention_heads"), (name, value)


def test_a_decoder_without_its_first_token_is_refused(tmp_path):
    folder = make_seq2seq_model(tmp_path / "t5", seed=0)
    config = json.loads((folder / "config.json").read_text())
    del config["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"decoder_start_token_id": 3}))
    assert load_lm(folder).config.decoder_start_token_id == 3
    (folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match="decoder_start_token_id None, expected a token id"):
        load_lm(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "7", '{"source": 7, "weights": "x"}', '{"source": "x"}', "[" * 100_000, "\udcff"]
)
def test_a_link_that_cannot_be_read_is_one_line(tmp_path, text):
    (tmp_path / "link.json").write_text(text, errors="surrogateescape")
    for read in (load_lm, load_tokenizer, lambda folder: describe_model(folder, "auto")):
        with pytest.raises(UserError, match=r"link\.json"):
            read(tmp_path)


MERGES = "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: 2024-05-01", "2024-05-01"),
        ("license: 1.0", "1.0"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: {mit: yes}", None),
        ("license: !!python/object/apply:os.system [true]", "true"),
        ("license: 'a\n\n  b'", "a b"),
        ("license: [unclosed", None),
        ("license: ", None),
        ("- license: mit", None),
        ("a0: &a0 {x: 1}\n" + MERGES + "license: mit", "mit"),
        ("license: mit\ndate: 2024-13-45", "mit"),
    ],
)
def test_the_licence_of_a_card_is_text_whatever_else_it_says(tmp_path, front, licence):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# a model\n")
    assert licence_of(tmp_path) == licence


def test_a_card_without_front_matter_or_text_states_no_licence(tmp_path):
    assert licence_of(tmp_path) is None
    for text in ("# a model", "---\nlicense: mit", "", "\udcff\udcfe"):
        (tmp_path / "README.md").write_text(text, errors="surrogateescape")
        assert licence_of(tmp_path) is None
