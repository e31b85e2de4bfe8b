"""What holds for warnings about prompts: those that change with the day, and those that the tokenizer does not know."""

import pytest

from pipeline.models import load_tokenizer
from pipeline.prompts import Prompt, PromptFormat, write_prompts
from pipeline.prompts.warnings import warn_of_prompts
from stages.generate import generate
from stages.prepare import prepare
from tests.conftest import CHAT_TEMPLATE, make_chat_model, make_params
from tests.published import write_jsonl

DATED = "{% if strftime_now is defined %}<system> {{ strftime_now('%d %b %Y') }}{% endif %} " + CHAT_TEMPLATE
UNREACHED = "{% if tools %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHAT_TEMPLATE
KNOWN, STRANGE = Prompt("known", "w1 w2", (), "train"), Prompt("strange", "w1 Frühstück", (), "train")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chatty") / "model", seed=0)


@pytest.mark.parametrize(("template", "dated"), [(DATED, True), (UNREACHED, False), (CHAT_TEMPLATE, False)])
def test_a_template_that_prints_the_date_is_warned_about(chatty, capsys, template, dated):
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = template
    warn_of_prompts(PromptFormat("{prompt}", chat=True, system="w3"), tokenizer, [KNOWN])
    assert ("prints the date" in capsys.readouterr().err) == dated
    warn_of_prompts(PromptFormat("{prompt}"), tokenizer, [KNOWN])
    assert capsys.readouterr().err == ""


def test_prompts_with_unknown_tokens_are_counted_and_the_first_is_named(chatty, capsys):
    tokenizer, form = load_tokenizer(chatty), PromptFormat("{prompt}")
    warn_of_prompts(form, tokenizer, [KNOWN, STRANGE, KNOWN])
    found = " ".join(capsys.readouterr().err.split())
    assert "1 of 3 prompts have text that the tokenizer does not know" in found and "'strange'" in found
    tokenizer.unk_token = tokenizer.eos_token  # as byte-level tokenizers have it, which know all text
    warn_of_prompts(form, tokenizer, [KNOWN, STRANGE])
    assert capsys.readouterr().err == ""


def test_prepare_and_generate_say_it(chatty, tmp_path, capsys):
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(chatty)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"w{i} Frühstück", "references": f"w{i}"} for i in range(9)])
    changes = (
        "chat=true", f"prepare.tokenizer={chatty}", f"prepare.dataset.path={data}", "prepare.test=2", "prepare.teach=0",
        "prepare.validation=2", "generate.engine=stub", "generate.corrupted=0",
    )  # fmt: skip
    params = make_params(chatty, *changes)
    prepare(params, tmp_path / "p" / "p.parquet", tmp_path / "tokenizer")
    found = " ".join(capsys.readouterr().err.split())
    assert "prints the date" in found and "9 of 9 prompts have text that the tokenizer does not know" in found
    write_prompts(tmp_path / "own.parquet", [STRANGE])
    generate(params, tmp_path / "own.parquet", tmp_path / "out")
    found = " ".join(capsys.readouterr().err.split())
    assert "prints the date" in found and "1 of 1 prompts have text that the tokenizer does not know" in found
