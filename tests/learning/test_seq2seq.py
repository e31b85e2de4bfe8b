"""What holds for encoder-decoder models: the same engine, losses and stages as for causal ones."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

from pipeline.engines import Ask, choose_engine
from pipeline.engines.hf import HfEngine
from pipeline.errors import UserError
from pipeline.learning.batches import collate
from pipeline.learning.forward import require_plain_head, score_tokens
from pipeline.models import describe_model, load_lm, require_context, save_model, word_tokenizer
from pipeline.store.identity import Sampling, sample_seed
from pipeline.store.selection import Selection
from stages.distill import distill
from stages.evaluate import evaluate
from stages.generate import generate
from stages.reward import reward
from tests.conftest import WORDS, make_params, make_prompts, make_seq2seq_model
from tests.engines.test_engines import as_given, assert_support_is_that_of


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def t5(request, tmp_path_factory):
    return make_seq2seq_model(tmp_path_factory.mktemp("t5") / "model", seed=0, tied=request.param)


def asks(n: int) -> list[Ask]:
    rng = np.random.default_rng(0)
    return [
        Ask(str(i), rng.integers(4, 44, rng.integers(2, 9)).astype(np.int32), sample_seed(str(i))) for i in range(n)
    ]


@torch.no_grad()
def logits_of(model, prompt_ids, response_ids) -> torch.Tensor:
    """The oracle: one pass over one prompt and its response, no padding, by the model's own shift of labels."""
    prompt, labels = torch.tensor(prompt_ids)[None].long(), torch.tensor(response_ids)[None].long()
    return model(input_ids=prompt, labels=labels).logits[0]


@pytest.mark.parametrize("real", [44, 38])
def test_a_sampled_support_is_that_of_the_decoders_logits(t5, real):
    """Sampling and scoring; also of a model that has 6 more embeddings than its tokenizer has ids."""
    model, given = load_lm(t5), asks(9)
    engine = HfEngine(model, 4, vocabulary=real)
    drawn = {answer.key: answer for answer in engine.sample(given, Sampling(1.0, 1.0, 6, (2,)), 5, support="sampled")}
    scored = {answer.key: answer for answer in engine.score(as_given(given, drawn), 5, (2,), support="sampled")}
    for ask in given:
        logits = logits_of(model, ask.prompt_ids, drawn[ask.key].response_ids)
        for answer in (drawn[ask.key], scored[ask.key]):
            assert_support_is_that_of(answer, logits, 5, real)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampled_and_scored_columns_are_those_of_the_model(t5, temperature):
    model, sampling = load_lm(t5), Sampling(temperature, 1.0, 6, (2,))
    engine = HfEngine(model, batch_size=4)
    given = {ask.key: ask for ask in asks(9)}
    sampled = {answer.key: answer for answer in engine.sample(list(given.values()), sampling, k=5)}
    alone = {a.key: a for ask in given.values() for a in HfEngine(model, batch_size=1).sample([ask], sampling, k=5)}
    again = [Ask(key, given[key].prompt_ids, 0, answer.response_ids) for key, answer in sampled.items()]
    scored = {answer.key: answer for answer in engine.score(again, 5, (2,))}
    assert len(sampled) == len(scored) == 9
    for key, answer in sampled.items():
        assert answer.response_ids.tolist() == alone[key].response_ids.tolist()
        logits = logits_of(model, given[key].prompt_ids, answer.response_ids)
        if temperature == 0:
            assert logits.argmax(-1).tolist() == answer.response_ids.tolist()
        lse = torch.logsumexp(logits, -1)
        for found in (answer, scored[key]):
            np.testing.assert_allclose(found.lse, lse, atol=1e-4)
            np.testing.assert_allclose(
                found.topk_logprobs, (logits - lse[:, None]).topk(5).values, rtol=1e-4, atol=1e-4
            )
            chosen = (logits - lse[:, None]).gather(-1, torch.tensor(found.response_ids).long()[:, None])[:, 0]
            np.testing.assert_allclose(found.logprobs, chosen, atol=1e-4)


def test_the_losses_see_the_model_s_own_logits(t5, tmp_path):
    model = load_lm(t5)
    require_plain_head(model, "T5")
    prompts = make_prompts(tmp_path / "prompts.parquet", train=7)
    generate(make_params(t5, "generate.engine=auto"), prompts, tmp_path / "selection")
    selection = Selection(tmp_path / "selection")
    rows = list(selection.rows("train"))
    assert describe_model(t5, "auto")["identity"] == selection.teacher["identity"]
    found = score_tokens(model, collate(rows, topk=False))
    for row, logprob in zip(rows, found.logprob.split([len(row.response_ids) for row in rows]), strict=True):
        logits = logits_of(model, row.prompt_ids, row.response_ids).log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(row.response_ids).long()[:, None])[:, 0]
        torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_stages_run_and_the_student_comes_nearer(t5, tmp_path, lora):
    student = make_seq2seq_model(tmp_path / "start", seed=5)
    prompts = make_prompts(tmp_path / "prompts.parquet", train=30, validation=6, test=4)
    params = make_params(
        t5, "generate.engine=auto", "distill.optimisation.steps=40", "distill.optimisation.learning_rate=0.01",
        "prepare.task=summarisation", f"distill.lora.rank={lora}",
    )  # fmt: skip
    data, runs = tmp_path / "data", tmp_path / "runs"
    generate(params, prompts, data / "teacher")
    reward(params, data / "teacher", student, data / "reward", data / "audit", runs)
    distill(params, data / "teacher", student, data / "reward", data / "student", data / "distill", runs)
    curve = pl.read_csv(data / "distill" / "training.csv")
    assert curve["kd"][-1] < 0.5 * curve["kd"][0]
    models = {"teacher": t5, "undistilled": student, "distilled": data / "student"}
    results = evaluate(params, prompts, models, data / "teacher", data / "evaluation")
    kl = {name: modes["heldout"]["kl"]["value"] for name, modes in results["metrics"].items()}
    assert kl["teacher"] < 1e-3 and kl["distilled"] < 0.8 * kl["undistilled"]
    assert json.loads((data / "student" / "config.json").read_text())["model_type"] == "t5"


def make_bart(folder, **generation):
    """A tiny BART for prompts and responses of up to 20 tokens each."""
    tokenizer = word_tokenizer(WORDS)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=20, dropout=0.0,
        init_std=0.5, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config)
    save_model(folder, model, tokenizer, "---\nlicense: apache-2.0\n---\n# a test model\n")
    GenerationConfig(decoder_start_token_id=tokenizer.eos_token_id, **generation).save_pretrained(folder)
    return folder


def test_a_prompt_and_a_response_may_each_fill_the_context_of_absolute_positions(tmp_path):
    """20, which is no length that sequences are padded to."""
    model, prompt = load_lm(make_bart(tmp_path / "bart")), np.arange(4, 24, dtype=np.int32)
    engine = HfEngine(model)
    drawn = list(engine.sample([Ask(str(seed), prompt, seed) for seed in range(8)], Sampling(1.0, 1.0, 20, (2,)), 5))
    given = Ask("a", prompt, 0, np.arange(20, 40, dtype=np.int32))
    for answer in (*drawn, *engine.score([given], 5, (2,))):
        lse = torch.logsumexp(logits_of(model, prompt, answer.response_ids), -1)
        np.testing.assert_allclose(answer.lse, lse, atol=1e-4)
    assert max(len(answer.response_ids) for answer in drawn) == 20
    (failed,) = engine.score([replace(given, response_ids=np.arange(4, 25, dtype=np.int32))], 5, (2,))
    assert "21 exceed the model's context of 20 for each" in failed.reason
    require_context(model.config, [(20, 20)], "the student")
    with pytest.raises(UserError, match=r"at most 20 tokens.*has 3 \+ 21"):
        require_context(model.config, [(20, 20), (3, 21)], "the student")


def test_rows_up_to_that_context_are_asked_of_the_teacher(tmp_path):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2)
    params = make_params(make_bart(tmp_path / "bart"), "generate.engine=auto", "max_tokens=19", "generate.samples=1")
    assert generate(params, prompts, tmp_path / "selection").made == 2  # 3 and 19 tokens


def test_a_model_that_forces_tokens_into_its_answers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"forces or forbids tokens in its answers .forced_bos_token_id., as BART"):
        load_lm(make_bart(tmp_path / "bart", forced_bos_token_id=3))


def test_vllm_is_not_chosen_for_them_and_refused_where_asked_for(t5, tmp_path):
    assert choose_engine("auto", encoder_decoder=True) == "hf"
    prompts = make_prompts(tmp_path / "prompts.parquet", train=2)
    with pytest.raises(UserError, match=r"vllm.*(does not run encoder-decoder models|is not installed)"):
        generate(make_params(t5, "generate.engine=vllm"), prompts, tmp_path / "selection")
