"""What holds for input that is broken or means harm: one line that names it, in bounded time, and nothing is lost."""

import json
import os
import time
from pathlib import Path
from typing import get_args

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli.comparison import compare
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.learning.posterior import read_description
from pipeline.models import load_tokenizer
from pipeline.params import DataSet, Params, Section
from pipeline.params.file import load_params
from pipeline.prompts import Prompt, PromptFormat, chat, prompt_id, read_prompts, read_responses
from pipeline.prompts.records import load_records
from pipeline.store.selection import Selection
from stages.prepare.data_sets import draw_records
from stages.report import report
from tests.cli.test_comparison import write as write_results
from tests.conftest import CHAT_TEMPLATE, make_chat_model, make_prompts
from tests.processes import run

HALF = "w1 \ud83d"  # half of a surrogate pair, as json.dumps writes it and json.loads reads it
DIGITS = "9" * 5000
DEEP = "[" * 100_000
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
READERS = {"prompts": read_prompts, "responses": read_responses}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def message(raising, *arguments) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as error:
        raising(*arguments)
    text = str(error.value)
    text.encode()
    assert len(text) < 1200
    return text


def refused(*arguments: object, log: Path, **options) -> str:
    """What a command says that must end with exit code 2 and without a traceback."""
    code, said = run(*arguments, log=log, **options)
    assert code == 2 and "Traceback" not in said and said.count("error:") == 1, said
    assert len(said.splitlines()) <= 3, said
    return said


# Prompt and response files


@pytest.mark.parametrize("column", ["prompt", "references", "response"])
def test_half_a_surrogate_pair_is_refused_by_file_row_and_column(tmp_path, column):
    good = {"prompt": "w1", "response": "w2"}
    path = jsonl(
        tmp_path / "p.jsonl", good, good | {"prompt": "w2", column: [HALF] if column == "references" else HALF}
    )
    found = message(READERS["responses" if column == "response" else "prompts"], path)
    assert "p.jsonl: row 2" in found and f"'{column}'" in found and r"\ud83d" in found


def test_a_row_is_not_lost_for_half_a_surrogate_pair_in_its_id(teacher, tmp_path):
    """The id is only a name: it is escaped, so that store, selection and messages can hold it."""
    path = jsonl(
        tmp_path / "p.jsonl", {"id": "a\ud83d", "prompt": "w1"}, {"id": "long\ud83d", "prompt": "w2 " * 99},
        {"id": "c", "prompt": "w3"},
    )  # fmt: skip
    assert [prompt.id for prompt in read_prompts(path)] == [r"a\ud83d", r"long\ud83d", "c"]
    arguments = "--teacher", teacher, "--engine", "stub", "--samples", "1", "--set", "generate.max_skipped=1"
    out = tmp_path / "out"
    code, said = run("generate", *arguments, "--prompts", path, "--out", out, log=tmp_path / "log", cwd=tmp_path)
    assert code == 0 and r"prompt 'long\ud83d' left out" in said, said
    assert [row.prompt_id for row in Selection(out).rows("train")] == [r"a\ud83d", "c"]
    both = jsonl(tmp_path / "both.jsonl", {"id": "a\ud83d", "prompt": "w1"}, {"id": r"a\ud83d", "prompt": "w2"})
    assert r"row 2 repeats id 'a\ud83d' of row 1" in message(read_prompts, both)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bad", [f'{{"prompt": {DIGITS}}}', DEEP, '{"prompt": ' + '{"a":' * 100_000, '{"prompt'])
def test_a_row_that_json_cannot_hold_is_named(tmp_path, reader, bad):
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "w1", "response": "w1"}, bad)
    assert "p.jsonl: row 2 is not JSON" in message(READERS[reader], path)


@pytest.mark.parametrize(
    "row", [{"prompt": "w1", "split": "x\n" * 9000}, {"y" * 9000: 1}, {"prompt": "w1", "id": "z" * 9000}]
)
def test_a_message_is_short_however_long_the_value(tmp_path, row):
    assert "\n" not in message(
        read_prompts, jsonl(tmp_path / "p.jsonl", row, row | {"prompt": "w2"} if "id" in row else row)
    )


@pytest.mark.parametrize("reader", READERS)
def test_parquet_files_with_broken_pages_or_broken_text_are_named(tmp_path, reader):
    texts = [f"w1 w2 {number}" for number in range(3000)]
    whole = pa.table({"prompt": texts, "response": texts})
    pq.write_table(whole, tmp_path / "pages.parquet", compression="zstd", use_dictionary=False)
    content = bytearray((tmp_path / "pages.parquet").read_bytes())
    content[200:1200] = b"\x55" * 1000
    (tmp_path / "pages.parquet").write_bytes(content)
    assert pq.ParquetFile(tmp_path / "pages.parquet").metadata.num_rows == 3000
    wrong = pa.array([b"w1", b"w\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"prompt": wrong, "response": ["w1", "w1"]}), tmp_path / "text.parquet")
    for name in ("pages", "text"):
        found = message(READERS[reader], tmp_path / f"{name}.parquet")
        assert f"{name}.parquet is not a Parquet file, or a damaged one" in found


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, reader):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("fifo.jsonl", "folder.jsonl"):
        assert f"at {tmp_path / name}" in message(READERS[reader], tmp_path / name)
        assert str(tmp_path / name) in message(load_params, tmp_path / name)
    assert "neither a file nor a folder" in message(load_records, str(tmp_path / "fifo.jsonl"))


def test_files_that_may_not_be_read_are_named(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "w1"})
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    for raising in (read_prompts, read_responses, load_params):
        assert f"{path} cannot be read" in message(raising, path)


# Data sets


SIZES = {"teach": 0, "train": 4, "validation": 1, "test": 1}


@pytest.mark.parametrize("column", ["prompt", "references"])
def test_half_a_surrogate_pair_in_a_data_set_is_refused_by_its_row(teacher, column):
    """Arrow cannot hold one, but readers of other kinds give it as they find it."""
    rows = [{"prompt": f"w{number}", "references": "w1"} for number in range(9)]
    rows[4][column] = HALF
    found = message(draw_records, {"train": rows}, DataSet(path="here"), SIZES, None, PromptFormat("{prompt}"), 0)
    assert "here, split train, row 5" in found and r"\ud83d" in found


def test_a_data_set_with_broken_text_is_refused_by_its_row(tmp_path):
    wrong = pa.array([b"w1", b"w2", b"w\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"prompt": wrong, "references": ["w1"] * 3}), tmp_path / "d.parquet")
    records = load_records(str(tmp_path / "d.parquet"))
    found = message(draw_records, records, DataSet(path="d.parquet"), SIZES, None, PromptFormat("{prompt}"), 0)
    assert "d.parquet, split train, row 3 cannot be read" in found


# Parameters


def bomb(levels: int = 12) -> str:
    """A few hundred bytes that stand for nine to the power of `levels` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"template: *a{levels - 1}"])


FILES = {
    "bomb": (bomb(), "aliases"),
    "deep": ("seed: " + DEEP, "levels"),
    "deep blocks": ("seed:\n" + "".join(" " * n + "-\n" for n in range(1, 300)), "levels"),
    "digits": (f"seed: {DIGITS}", "digits"),
    "hexadecimal": (f"seed: 0x{'f' * 5000}", "digits"),
    "surrogate": ('template: "{prompt} \\ud83d"', "half a surrogate pair"),
    "surrogate in a key": ('"\\ud83d": 1', "half a surrogate pair"),
    "null": ('system: "a\\0b"', "null character"),
    "date": ("seed: 2001-13-45", "month must be in 1..12"),
    "object": ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "huge": ("#" * 2**21, "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("name", FILES)
def test_parameter_files_are_refused_at_once_and_by_name(tmp_path, name):
    text, reason = FILES[name]
    (tmp_path / "p.yaml").write_text(text)
    started = time.monotonic()
    found = message(load_params, tmp_path / "p.yaml")
    assert time.monotonic() - started < 1 and "p.yaml" in found and reason in found and "\n" not in found


def test_a_parameter_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_bytes(b"template: '\xff{prompt}'")
    assert "p.yaml cannot be read: UnicodeDecodeError" in message(load_params, tmp_path / "p.yaml")


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("huge", "deep blocks", "bomb")])
def test_values_of_set_are_refused_alike(name):
    text, reason = FILES[name]
    _, _, value = text.partition(": ")
    found = message(load_params, None, [f"seed={value}" if name != "surrogate in a key" else 'seed={"\\ud83d": 1}'])
    assert found.startswith("--set seed=") and reason in found and "\n" not in found


def test_an_alias_in_a_value_of_set_is_refused():
    assert "aliases" in message(load_params, None, ["generate.engine_options={a: &x [1], b: *x}"])


def leaves(section: Section, path: str = ""):
    """Path, default and numeric type of every number among the parameters, those in lists and unions included."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{path}{name}.")
        elif {int, float} & {field.annotation, *get_args(field.annotation)}:
            yield path + name, value, field.annotation
        elif isinstance(value, list) and value and isinstance(value[0], float):
            yield path + name, value, list


NUMBERS = list(leaves(Params()))


def test_no_number_is_true_infinite_or_not_a_number():
    assert len(NUMBERS) > 60
    for path, _, kind in NUMBERS:
        for bad in ("true", "false", ".inf", "-.inf", ".nan", "inf", "nan"):
            found = message(load_params, None, [f"{path}={f'[{bad}]' if kind is list else bad}"])
            assert path in found, (path, bad)


def test_minus_zero_is_zero():
    """They are equal, and would be two requests: the identity is a digest of the text."""
    for path, _, kind in NUMBERS:
        if kind is int:
            continue
        try:
            tree = load_params(None, [f"{path}={'[-0.0]' if kind is list else '-0.0'}", "generate.samples=1"])
        except UserError:
            continue  # must be above 0
        for part in path.split("."):
            tree = getattr(tree, part)
        assert str(tree).strip("[]") == "0.0", path
    assert load_params(None, ["generate.temperature=-0.0", "generate.samples=1"]).generate.temperature == 0


def test_numbers_in_every_form_that_yaml_and_json_have_are_read():
    given = ["generate.k=16.0", 'generate.samples="3"', "distill.lam=1", "distill.optimisation.learning_rate=1e-3"]
    given += ["generate.engine_options={kv_cache_memory_bytes: 1e9, gpu_memory_utilization: 0.5, enforce_eager: true}"]
    params = load_params(None, given)
    assert (params.generate.k, params.generate.samples, params.distill.lam) == (16, 3, 1.0)
    assert params.distill.optimisation.learning_rate == 1e-3
    assert params.generate.engine_options["kv_cache_memory_bytes"] == 1_000_000_000


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("max_num_seqs: true", "max_num_seqs must be a finite number, not True"),
        ("max_num_seqs: many", "max_num_seqs must be a finite number, not 'many'"),
        ("gpu_memory_utilization: .nan", "gpu_memory_utilization must be a finite number"),
        ("gpu_memory_utilization: inf", "gpu_memory_utilization must be a finite number"),
        ("enforce_eager: 1", "enforce_eager must be true or false, not 1"),
        ("safetensors_load_strategy: false", "safetensors_load_strategy must be a text, not False"),
    ],
)
def test_engine_options_are_of_their_kind(option, reason):
    assert reason in message(load_params, None, [f"generate.engine_options={{{option}}}"])


def test_temperatures_too_small_for_a_division_are_refused():
    for section in ("generate", "score", "evaluate"):
        for small in ("1e-40", "1.0e-40", "0.009", "-1", *(["0"] if section != "generate" else [])):
            found = message(load_params, None, [f"{section}.temperature={small}"])
            assert f"{section}.temperature" in found and "at least 0.01" in found
        assert getattr(load_params(None, [f"{section}.temperature=0.01"]), section).temperature == 0.01


# Results


BROKEN = ("{", DEEP, DIGITS, "[]", "null", '{"metrics": {}}', '{"metrics": []}', b"\xff")


def spoil(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def shapes(path: Path):
    """The results in a file, each time with one entry of another shape or gone, down to the metrics' values."""

    def places(value, place=()):
        for name in value if isinstance(value, dict) else ():
            yield (*place, name)
            yield from places(value[name], (*place, name))

    whole = path.read_text()
    for place in places(json.loads(whole)):
        for change in ("gone", "list", "none"):
            results = at = json.loads(whole)
            for name in place[:-1]:
                at = at[name]
            if change == "gone":
                del at[place[-1]]
            else:
                at[place[-1]] = [1] if change == "list" else None
            yield json.dumps(results)


def test_a_comparison_of_broken_results_names_the_file(tmp_path):
    folder = write_results(tmp_path / "one", 30.0, "fkl")
    path = folder / "evaluation" / "results.json"
    whole = path.read_bytes()
    refusals = 0
    for content in (*BROKEN, whole[:100], *shapes(path)):
        spoil(path, content)
        try:
            compare([str(folder)], Layout())
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refusals += 1
    assert refusals > 60
    path.write_bytes(whole)
    for content in ("{", DEEP, "[]", "null"):
        spoil(folder / "distill" / "results.json", content)
        assert str(folder / "distill" / "results.json") in message(compare, [str(folder)], Layout())


def test_a_report_of_broken_results_names_the_file(tmp_path):
    """Every file that the report reads, and every entry of the evaluation."""
    folder = write_results(tmp_path / "data", 30.0, "fkl")
    evaluation = folder / "evaluation" / "results.json"
    results = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps(results | {"differences": {"teacher": results["metrics"]["teacher"]}}))
    (folder / "distill" / "results.json").unlink()
    report(Params().report, Layout(data=folder), tmp_path / "page.html")
    whole, refusals = evaluation.read_bytes(), 0
    for content in (*BROKEN, whole[:100], *shapes(evaluation)):
        spoil(evaluation, content)
        try:
            report(Params().report, Layout(data=folder), tmp_path / "page.html")
        except UserError as error:
            assert str(evaluation) in str(error) and "\n" not in str(error)
            refusals += 1
    assert refusals > 100
    evaluation.write_bytes(whole)
    others = [f"{name}/results.json" for name in ("distill", "audit", "generate", "score")]
    others += ["prompts/counts.json", "evaluation/predictions.parquet"]
    for name in others:
        for content in (*BROKEN, '{"cost": 1, "provenance": []}'):
            (folder / name).parent.mkdir(exist_ok=True)
            spoil(folder / name, content)
            if (name, content) != ("prompts/counts.json", '{"metrics": {}}'):  # which says that a split has no prompts
                assert str(folder / name) in message(
                    report, Params().report, Layout(data=folder), tmp_path / "page.html"
                )
        (folder / name).unlink()


def test_broken_descriptions_of_a_reward_are_named(tmp_path):
    for content in (*BROKEN, '{"residual": {"gamma": "x"}}'):
        spoil(tmp_path / "reward.json", content)
        assert str(tmp_path / "reward.json") in message(read_description, tmp_path)


# Chat templates


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chatty") / "model", seed=0)


PROMPTS = [Prompt(prompt_id(text), text, (), "train") for text in ("w1 w2", "w3 ü 漢", "w4 " * 50)]
PROMPTS.append(Prompt("named", "w5", (), "train"))
CHAT = PromptFormat("{prompt} w0", chat=True, system="w9")

ERRORS = {
    "{{ raise_exception('no system message') }}": "TemplateError: no system message",
    "{% if messages|length > 1 %}{{ nothing.at.all }}{% endif %}": "UndefinedError: 'nothing' is undefined",
    "{% if %}": "TemplateSyntaxError",
    "{{ messages | unheard_of }}": "No filter named 'unheard_of'",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{% macro a(n) %}{{ a(n + 1) }}{% endmacro %}{{ a(1) }}": "RecursionError",
    "{{ '\\ud83d' }}": "its text is not valid Unicode",
    "\ud83d": "not a text of valid Unicode",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
    "{{ raise_exception('x' * 10**6) }}": "TemplateError: xxx",
}


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_a_chat_template_that_fails_is_named_with_the_prompt(chatty, number):
    template, reason = list(ERRORS.items())[number]
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = template
    found = message(CHAT.texts, tokenizer, PROMPTS[-1:])
    assert reason in found and str(chatty) in found and "\n" not in found
    assert "prompt 'named'" in found or template == "\ud83d"


@pytest.mark.parametrize("template", [5, ["{{ x }}"], {"default": 7}, {"other": "x"}, {"default": "\ud83d"}])
def test_a_chat_template_that_is_no_text_is_refused(chatty, template):
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = template
    assert "the chat template of" in message(CHAT.texts, tokenizer, PROMPTS)


def test_only_the_prompt_that_fails_is_named(chatty):
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = (
        CHAT_TEMPLATE + "{% if 'w5' in messages[-1].content %}{{ raise_exception('no w5') }}{% endif %}"
    )
    assert "prompt 'named': TemplateError: no w5" in message(CHAT.texts, tokenizer, PROMPTS)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP, "longer than"),
        ("{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "memory"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{{ '%9999999999d' % 1 }}", "memory"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "memory"),
        ("{{ 7 ** (10 ** 9) }}", "longer than"),
        ("{{ 'x' * 2**21 }}", "characters"),
    ],
)
def test_a_chat_template_that_never_ends_or_grows_is_stopped(chatty, monkeypatch, template, reason):
    """Also where nothing is put out, and within one operation of C that no handler of a signal could interrupt."""
    monkeypatch.setattr(chat, "SECONDS", 2 if reason == "longer than" else 20)
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = template
    started, process = time.monotonic(), psutil.Process()
    before, others = process.memory_info().rss, process.children()
    found = message(CHAT.texts, tokenizer, PROMPTS[-1:])
    assert reason in found and "prompt 'named'" in found
    assert time.monotonic() - started < 30 and process.memory_info().rss - before < 2**28
    assert process.children() == others


def test_the_prompt_that_never_ends_is_the_one_named(chatty, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if 'w5' in messages[-1].content %}" + LOOP + "{% endif %}"
    assert "prompt 'named': it takes longer than 1 s" in message(CHAT.texts, tokenizer, PROMPTS)


def test_many_long_prompts_are_rendered_as_transformers_does(chatty):
    """More than a pipe holds, in order, with every character as it was."""
    tokenizer = load_tokenizer(chatty)
    texts = [f"{number} ü 漢 \x00 \u2028 {'w1 ' * (number % 997)}" for number in range(3000)] + ["漢" * 2**21]
    prompts = [Prompt(str(number), text, (), "train") for number, text in enumerate(texts)]
    assert CHAT.texts(tokenizer, prompts) == [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "w9"}, {"role": "user", "content": f"{text} w0"}],
            add_generation_prompt=True, tokenize=False,
        )
        for text in texts
    ]  # fmt: skip
    assert CHAT.texts(tokenizer, []) == []


def test_without_chat_no_process_is_started(chatty, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert PromptFormat("{prompt} w0").texts(load_tokenizer(chatty), PROMPTS[:1]) == ["w1 w2 w0"]


# The command line


def spoilt(folder: Path, seed: int, template: str) -> Path:
    make_chat_model(folder, seed)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_commands_end_with_one_line_and_exit_code_2(chatty, tmp_path):
    log, prompts = tmp_path / "log", make_prompts(tmp_path / "p.parquet", train=2)
    asking = ("generate", "--teacher", chatty, "--engine", "stub", "--out", tmp_path / "out", "--samples", "1")

    def says(*arguments: object, **options) -> str:
        return refused(*arguments, log=log, cwd=tmp_path, **options)

    for name, rows in {"half": [{"prompt": HALF}], "digits": [f'{{"prompt": {DIGITS}}}'], "deep": [DEEP]}.items():
        path = jsonl(tmp_path / f"{name}.jsonl", *rows)
        assert f"{name}.jsonl: row 1" in says(*asking, "--prompts", path)
        assert f"{name}.jsonl: row 1" in says(*asking, "--prompts", prompts, "--responses", path)
    for name in ("bomb", "deep", "digits", "surrogate"):
        (tmp_path / "bad.yaml").write_text(FILES[name][0])
        assert "bad.yaml" in says("params", "--params", tmp_path / "bad.yaml")
    os.mkfifo(tmp_path / "fifo")
    assert "no parameter file at" in says("params", "--params", tmp_path / "fifo")
    assert r"\udcff" in says("params", "--set", "template=\udcff{prompt}")
    assert r"\udcff" in says(*asking, "--prompts", prompts, "--out", tmp_path / "o\udcff")
    assert r"\udcff" in says(*asking, "--prompts", prompts, XKD_STORE=str(tmp_path / "s\udcff"))
    folder = write_results(tmp_path / "data", 30.0, "fkl")
    (folder / "evaluation" / "results.json").write_text('{"metrics": {"teacher": 1}}')
    assert "results.json" in says("compare", folder)
    assert "results.json" in says("report", "--data", folder, "--out", tmp_path / "page.html")


@pytest.mark.slow
def test_a_chat_template_that_fails_or_never_ends_ends_the_command_with_one_line(tmp_path):
    prompts = make_prompts(tmp_path / "p.parquet", train=2)
    for number, (template, reason) in enumerate(
        (
            ("{{ raise_exception('no') }}", "TemplateError: no"),
            (LOOP, "longer than 10 s"),
            ("{{ 'x' * 10**10 }}", "memory"),
        )
    ):
        model = spoilt(tmp_path / str(number), 0, template)
        arguments = (
            "--teacher",
            model,
            "--engine",
            "stub",
            "--prompts",
            prompts,
            "--set",
            "chat=true",
            "--samples",
            "1",
        )
        found = refused("generate", *arguments, "--out", tmp_path / "out", log=tmp_path / "log", cwd=tmp_path)
        assert reason in found and str(model) in found and f"prompt '{read_prompts(prompts)[0].id}'" in found
