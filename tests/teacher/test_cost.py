"""What holds for cost on paper: it agrees with real models and real stores, also for models that are not here."""

import csv
import json
import re
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pipeline.cli.dry_run import Assumptions, dry_run
from pipeline.cli.listing import Form
from pipeline.errors import UserError
from pipeline.models import load_config, load_lm
from pipeline.store.requests import RequestFolder
from pipeline.teacher.cost import GIB, SEQUENCES, USABLE, Held, ModelMemory, Need, bytes_per_token
from stages.generate import Summary, generate
from tests.conftest import make_params, make_prompts, make_seq2seq_model, run_cli


@pytest.fixture(scope="session")
def t5(tmp_path_factory) -> Path:
    return make_seq2seq_model(tmp_path_factory.mktemp("t5") / "model", seed=0)


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path / "prompts.parquet", train=20, validation=5)


def without_weights(model: Path, folder: Path, tokenizer: bool = True) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", *["token*"] * (not tokenizer)))
    return folder


def printed(text: str) -> dict[str, list[str]]:
    """Lines of tables and facts: name -> what stands in its columns."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.startswith(" ")]
    return {name: values for name, *values in lines}


def counted(cell: str) -> float:
    return float(cell.replace(",", ""))


def stored(store: Path, k: int, kind: str = "sample") -> tuple[Held, int]:
    """What the store's only request of a kind holds, and its bytes."""
    (request,) = [
        path.parent for path in store.glob("*/*/request.json") if json.loads(path.read_text())["kind"] == kind
    ]
    held = Held.of(RequestFolder(store, request.parent.name, request.name).index(), k, "sampled")
    return held, sum(shard.stat().st_size for shard in request.glob("part-*.parquet"))


@pytest.mark.parametrize("name", ["teacher", "student", "t5"])
def test_parameters_and_bytes_of_a_configuration_are_those_of_the_built_model(name, request):
    folder = request.getfixturevalue(name)
    model = load_lm(folder)
    found = ModelMemory.of(load_config(folder), "float32")
    assert found.parameters == model.num_parameters()
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert ModelMemory.of(load_config(folder), "bfloat16").weights == found.weights / 2


@pytest.mark.parametrize(
    ("kind", "published"), [("gpt2", 124_439_808), ("llama", 6_738_415_616), ("mixtral", 46_702_792_704)]
)
def test_large_models_are_counted_as_published(kind, published):
    from transformers import AutoConfig

    assert ModelMemory.of(AutoConfig.for_model(kind), "bfloat16").parameters == published


def test_a_model_without_attention_keeps_nothing_of_a_token():
    from transformers import MambaConfig

    found = ModelMemory.of(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1), "float32")
    assert found.cache == 0 < found.parameters


def cached_bytes(cache) -> int:
    """Of a transformers key-value cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_the_cache_of_a_token_is_the_one_that_a_causal_model_keeps(teacher):
    ids = torch.ones(3, 7, dtype=torch.long)
    kept = load_lm(teacher)(ids, use_cache=True).past_key_values
    assert ModelMemory.of(load_config(teacher), "float32").cache == cached_bytes(kept) / ids.numel()


def test_the_cache_of_a_token_is_the_one_that_an_encoder_decoder_model_keeps(t5):
    prompt, response = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 4, dtype=torch.long)
    kept = load_lm(t5)(prompt, decoder_input_ids=response, use_cache=True).past_key_values
    found = ModelMemory.of(load_config(t5), "float32").cache
    assert found == cached_bytes(kept.self_attention_cache) / response.numel()
    assert found == cached_bytes(kept.cross_attention_cache) / prompt.numel()


def test_grouped_heads_keep_less():
    from transformers import LlamaConfig

    plain = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    grouped = LlamaConfig(**plain.to_diff_dict() | {"num_key_value_heads": 1})
    assert ModelMemory.of(plain, "float16").cache == 2 * 3 * 64 * 2 == 4 * ModelMemory.of(grouped, "float16").cache


def test_a_copy_gets_as_few_gpus_as_hold_its_weights_and_cache():
    model = ModelMemory(parameters=70 * 10**9, weights=140 * 10**9, cache=2**18)
    assert model.fewest_gpus(length=1024, memory=80) == 4  # 130 GiB and 16 GiB do not go into 144
    assert model.fewest_gpus(length=512, memory=80) == 2
    exactly = (model.weights + SEQUENCES * 512 * model.cache) / GIB / USABLE
    assert model.fewest_gpus(512, exactly * 1.001) == 1 and model.fewest_gpus(512, exactly * 0.999) == 2


def test_what_transformers_cannot_build_is_refused():
    from transformers import ViTConfig

    with pytest.raises(UserError, match="no language model of type vit"):
        ModelMemory.of(ViTConfig(), "float32")


def test_hours_are_tokens_over_rate():
    need = Need(10, 100, 9_000_000, 0) + Need(5, 50, 9_000_000, 0)
    assert need.gpu_hours(rate=2500) == 2 and need.responses == 15


def test_expected_length_and_bytes_are_those_of_the_store(teacher, prompts, tmp_path, own_store, capsys):
    params = partial(make_params, teacher, "generate.engine=stub")
    generate(params(), prompts, tmp_path / "a")
    before, size = stored(own_store, k=8)
    capsys.readouterr()
    assert dry_run(params("generate.samples=4"), prompts).missing == 40
    found = printed(capsys.readouterr().out)
    assert found["responses"] == ["40", "40"] and counted(found["response tokens"][0]) == 40 * 6
    assert counted(found["response tokens"][1]) == pytest.approx(40 * before.mean, abs=1)
    assert found["expected length"][0].endswith("the mean of 45 stored responses")
    generate(params("generate.samples=4"), prompts, tmp_path / "b")
    after, grown = stored(own_store, k=8)
    assert before.bytes_per_token * 40 * before.mean == pytest.approx(grown - size, rel=0.2)
    assert len(after.lengths) == 85


def test_rows_to_rescore_count_with_the_length_that_they_have(teacher, prompts, tmp_path, own_store, capsys):
    params = partial(make_params, teacher, "generate.engine=stub")
    generate(params(), prompts, tmp_path / "a")
    tokens = sum(sum(stored(own_store, 8, kind)[0].lengths.values()) for kind in ("sample", "score"))
    capsys.readouterr()
    dry_run(params("generate.k=16"), prompts)
    assert printed(capsys.readouterr().out)["response tokens"] == [f"{tokens:,}"] * 2


def test_shards_with_another_k_are_scaled(teacher, prompts, tmp_path, own_store):
    generate(make_params(teacher, "generate.engine=stub"), prompts, tmp_path / "a")
    at_8, at_16 = stored(own_store, k=8)[0], stored(own_store, k=16)[0]
    lines = [bytes_per_token(k, "sampled") for k in (8, 16)]
    assert at_16.bytes_per_token / at_8.bytes_per_token == pytest.approx(lines[1] / lines[0])


def test_a_teacher_without_weights_is_planned_for_and_not_looked_up(teacher, prompts, tmp_path, capsys):
    params = make_params(teacher, "generate.engine=stub")
    generate(params, prompts, tmp_path / "a")
    shutil.rmtree(tmp_path / "store")
    dry_run(params, prompts)
    here = printed(capsys.readouterr().out)
    folder = without_weights(teacher, tmp_path / "paper")
    assert dry_run(make_params(folder), prompts) == Summary(0, 0, 0, missing=60)
    there = printed(capsys.readouterr().out)
    same = ("responses", "prompt tokens", "response tokens", "bytes in the store", "one copy")
    assert all(there[name] == here[name] for name in same)
    assert "not looked up" in there["teacher"][0] and "everything is missing" in there["teacher"][0]


def test_without_a_tokenizer_four_characters_are_a_token(teacher, tmp_path, capsys):
    folder = without_weights(teacher, tmp_path / "paper", tokenizer=False)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "12345678"}\n{"prompt": "12345678x"}\n')
    assert dry_run(make_params(folder, "generate.samples=3", "chat=true"), path).missing == 6
    text = capsys.readouterr().out
    assert re.search(r"prompt tokens +15 +15\b", text) and f"4 characters each: {folder} has no tokenizer" in text


def test_a_billion_tokens_need_no_prompts(teacher, tmp_path, capsys):
    folder = without_weights(teacher, tmp_path / "paper", tokenizer=False)
    assumed = Assumptions(tokens=1e9, rate=2500, gpus=64)
    dry_run(make_params(folder, "generate.k=32", "max_tokens=500"), tmp_path / "none", assumed=assumed)
    found = printed(capsys.readouterr().out)
    assert found["responses"] == ["2,000,000"] * 2 and found["response tokens"] == ["1,000,000,000"] * 2
    assert found["bytes in the store"][0] == f"{bytes_per_token(32, 'sampled') * 1e9 / GIB:,.1f} GiB"
    assert found["GPU-hours"] == ["111.1"] * 2 and found["hours on 64 GPUs"] == ["1.7"] * 2


def test_tokens_to_plan_for_have_the_length_and_the_bytes_of_the_store(teacher, prompts, tmp_path, own_store, capsys):
    params = make_params(teacher, "generate.engine=stub")
    generate(params, prompts, tmp_path / "a")
    held, _ = stored(own_store, k=8)
    capsys.readouterr()
    dry_run(params, prompts, assumed=Assumptions(tokens=1e6))
    found = printed(capsys.readouterr().out)
    assert counted(found["responses"][1]) == round(1e6 / held.mean)
    assert found["bytes in the store"][1] == f"{held.bytes_per_token * 1e6 / 2**20:,.1f} MiB"


def totals(rows: list[dict], quantity: str) -> list[float]:
    """At max_tokens and as expected, over all requests."""
    return [sum(float(row[f"{quantity}_{length}"]) for row in rows) for length in ("at_max_tokens", "expected")]


def test_programs_get_the_numbers_of_each_request(teacher, prompts, tmp_path, own_store, capsys):
    generate(make_params(teacher, "generate.engine=stub"), prompts, tmp_path / "a")
    params = make_params(teacher, "generate.engine=stub", "generate.samples=4")
    capsys.readouterr()
    assumed = Assumptions(rate=100, gpus=2)
    dry_run(params, prompts, assumed=assumed)
    text = printed(capsys.readouterr().out)
    summary = dry_run(params, prompts, assumed=assumed, form=Form.JSON)
    found = json.loads(capsys.readouterr().out)
    requests = {row["request"]: row for row in found["requests"]}
    assert summary.missing == 40 and found["teacher"]["identity"] == text["teacher"][0]
    assert [requests["sample"][name] for name in ("cached", "missing", "to_rescore", "left_out")] == [45, 40, 0, 0]
    assert requests["score"]["missing"] == 0 == requests["score"]["bytes_expected"]
    assert [f"{count:,.0f}" for count in totals(found["requests"], "response_tokens")] == text["response tokens"]
    assert [f"{count:.2g}" for count in totals(found["requests"], "gpu_hours")] == text["GPU-hours"]
    assert [f"{count:.2g}" for count in totals(found["requests"], "hours")] == text["hours on 2 GPUs"]
    assert (found["gpus"], found["gpus_per_copy"], found["rate"], found["gpu_memory_gib"]) == (2, 1, 100, 80)
    dry_run(params, prompts, assumed=assumed, form=Form.CSV)
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {key: float(value) for key, value in rows[0].items() if key != "request"} == {
        key: value for key, value in requests["sample"].items() if key != "request"
    }


def test_programs_get_nothing_for_what_is_not_known(teacher, prompts, tmp_path, own_store, capsys):
    folder = without_weights(teacher, tmp_path / "paper", tokenizer=False)
    dry_run(make_params(folder), tmp_path / "none", assumed=Assumptions(tokens=1e6), form=Form.JSON)
    found = json.loads(capsys.readouterr().out)
    assert found["teacher"]["identity"] is None and found["rate"] is None
    (row,) = found["requests"]
    assert row["cached"] is None and row["prompt_tokens_expected"] is None and row["gpu_hours_expected"] is None
    assert row["response_tokens_expected"] == 1e6
    params = make_params(teacher, "generate.engine=stub")
    generate(params, prompts, tmp_path / "a")
    capsys.readouterr()
    assert dry_run(params, prompts, form=Form.JSON).missing == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] is None and totals(found["requests"], "response_tokens") == [0, 0]


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_are_readable_in_a_terminal(teacher, prompts, tmp_path, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    dry_run(make_params(teacher), prompts, assumed=Assumptions(rate=2500))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width or str(tmp_path) in line for line in lines)
    assert any(re.search(r"sample +0 +45 +0 +0$", line) for line in lines)
    assert any(re.search(r"response tokens +\d+ +\d+$", line) for line in lines)


def test_too_few_or_too_small_gpus_are_refused(teacher, prompts):
    params = make_params(teacher)
    with pytest.raises(UserError, match=r"--gpus 1: one copy of the teacher needs 2 GPUs of 0.001 GiB"):
        dry_run(params, prompts, assumed=Assumptions(gpus=1, memory=0.001))


def test_a_copy_has_the_gpus_that_the_parameters_give_it(teacher, prompts, capsys):
    params = make_params(teacher, "generate.engine=vllm", "generate.tensor_parallel=2", "generate.quantization=fp8")
    dry_run(params, prompts)
    said = capsys.readouterr().out
    assert "2 GPUs of 80 GiB" in said and "fp8 takes less" in said


def test_gpus_that_make_no_whole_copy_stay_idle(teacher, prompts, capsys):
    dry_run(make_params(teacher), prompts, assumed=Assumptions(rate=1, gpus=5, memory=0.001))
    found = printed(capsys.readouterr().out)
    assert found["response tokens"][0] == "345" and found["GPU-hours"][0] == "0.096"
    assert found["hours on 4 GPUs"][0] == "0.024"


def test_responses_of_another_tool_need_no_gpu(teacher, prompts, tmp_path, capsys):
    given = tmp_path / "given.jsonl"
    given.write_text('{"prompt": "w0 w0 w0", "response": "w1 w2 w3"}\n')
    folder = without_weights(teacher, tmp_path / "paper")
    params = make_params(folder, "generate.engine=text", f"generate.responses={given}")
    dry_run(params, prompts, assumed=Assumptions(rate=100))
    found = printed(capsys.readouterr().out)
    assert found["response tokens"] == ["4", "4"] and "one copy" not in found and "GPU-hours" not in found
    with pytest.raises(UserError, match="--tokens plans responses of the teacher"):
        dry_run(params, prompts, assumed=Assumptions(tokens=1e9))


class Hub(BaseHTTPRequestHandler):
    """Serves a folder as `org/model`, as far as downloading needs it, and remembers which files were asked for."""

    folder: Path
    asked: set[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        file = self.folder / name
        if self.path.startswith("/api/models/org/model/tree/"):
            entries = [{"type": "file", "path": path.name, "oid": path.name} for path in self.folder.iterdir()]
            body = json.dumps([entry | {"size": (self.folder / entry["path"]).stat().st_size} for entry in entries])
            body = body.encode()
        elif self.path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": path.name} for path in self.folder.iterdir()]
            body = json.dumps({"id": "org/model", "sha": "1" * 40, "siblings": siblings}).encode()
        elif self.path.startswith("/org/model/resolve/") and file.is_file():
            self.asked.add(name)
            body = file.read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_hub_name_needs_no_weights_to_be_planned_for(teacher, prompts, tmp_path):
    handler = type("ThisHub", (Hub,), {"folder": teacher, "asked": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
        command = ("generate", "--dry-run", "--teacher", "org/model", "--prompts", prompts, "--template", "{prompt}")
        done = run_cli(*command, "--params", "/dev/null", cwd=tmp_path, env=environment, fresh=True)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert {"config.json", "tokenizer.json"} <= handler.asked and "model.safetensors" not in handler.asked
    assert "not looked up" in done.stdout and printed(done.stdout)["responses"] == ["60", "60"]


@pytest.mark.slow
def test_what_is_assumed_is_only_taken_with_a_dry_run():
    for option in (("--tokens", "1e9"), ("--rate", "2500"), ("--gpus", "8"), ("--gpu-memory", "40")):
        done = run_cli("generate", *option)
        assert done.returncode == 2 and "are for planning: add --dry-run" in done.stderr
