"""What holds for dropout: what is trained has what the parameters say, none by default, and is saved with its own."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig

from pipeline.learning.batches import collate
from pipeline.learning.consistency import Consistency
from pipeline.learning.divergence import Divergence
from pipeline.learning.dropout import set_dropout
from pipeline.learning.learner import StudentLearner, count
from pipeline.learning.residuals import Scaled
from pipeline.learning.terms import Likelihood
from pipeline.models import load_lm, load_tokenizer, save_model
from pipeline.params import Train
from pipeline.store.selection import Selection
from stages.distill import distill
from stages.distill.inputs import RewardInputs
from stages.reward.fit import Fitting, Sources
from stages.teach import teach
from tests.conftest import make_params, make_prompts

SIZE = {"vocab_size": 44, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# Rates as modules, as numbers that forward passes read, in the configuration; and layers that are skipped.
CONFIGS = {
    "t5": {
        "vocab_size": 44, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.4
    },
    "llama": {**SIZE, "intermediate_size": 64, "attention_dropout": 0.4},
    "gpt2": {"vocab_size": 44, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.4},
    "opt": {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.4, "layerdrop": 0.4},
    "falcon": {**SIZE, "hidden_dropout": 0.4, "attention_dropout": 0.4},
    "gpt_neox": {**SIZE, "intermediate_size": 64, "hidden_dropout": 0.4, "attention_dropout": 0.4},
    "bloom": {"vocab_size": 44, "hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.4},
    "mpt": {"vocab_size": 44, "d_model": 32, "n_layers": 2, "n_heads": 2},  # has none of its own
    "pegasus": {
        "vocab_size": 44, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.4,
        "attention_dropout": 0.4, "activation_dropout": 0.4, "encoder_layerdrop": 0.4,
    },
}  # fmt: skip


def new_model(kind: str):
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    name = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, name).from_config(config).train()


def passes(model, n: int = 4) -> list[torch.Tensor]:
    """Logits of some forward passes over the same tokens, as in training."""
    ids = torch.arange(4, 24)[None]
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return [model(input_ids=ids, **given).logits.detach() for _ in range(n)]


def repeats(found: list[torch.Tensor]) -> bool:
    return all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_of_any_kind_has_the_rate_that_is_set_and_is_saved_with_its_own(kind, tmp_path):
    model = new_model(kind)
    model.save_pretrained(tmp_path / "before")
    assert repeats(passes(model)) == (kind == "mpt")
    set_dropout(model, 0.0)
    assert repeats(passes(model))
    set_dropout(model, 0.5)
    assert not repeats(passes(model))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} <= {0.5}
    assert repeats(passes(model.eval()))
    model.save_pretrained(tmp_path / "after")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after"))
    assert before == after


@pytest.fixture
def dropping(tmp_path, student):
    """A student's starting point whose own configuration has dropout."""
    folder = tmp_path / "dropping"
    model = load_lm(student)
    model.config.attention_dropout = 0.4
    save_model(folder, model, load_tokenizer(student), "---\nlicense: apache-2.0\n---\n# a test model\n")
    assert load_lm(folder).model.layers[0].self_attn.attention_dropout == 0.4
    return folder


def losses(learner, rows, n: int = 4) -> set[float]:
    batch = collate(rows, True, {"delta": {row.key: row.logprobs for row in rows}})
    return {learner.train()(count(batch, learner.terminal), **batch)[0].item() for _ in range(n)}


def up_projection(folder) -> torch.Tensor:
    return load_lm(folder).model.layers[0].mlp.up_proj.weight


def saved_rate(folder) -> float:
    return json.loads((folder / "config.json").read_text())["attention_dropout"]


@pytest.mark.parametrize("lora", [0, 2])
def test_a_student_learns_without_dropout_unless_it_is_set(cache, student, dropping, tmp_path, lora):
    """By the weights it ends with. Adapters have a dropout of their own, which is another matter."""

    def distilled(name: str, start, *settings: str) -> torch.Tensor:
        given = "distill.reward=none", "distill.optimisation.steps=3", f"distill.lora.rank={lora}", *settings
        out = tmp_path / name
        paths = cache / "selection", start, None, out, tmp_path / "metrics", tmp_path / "runs"
        distill(make_params("unused", *given), *paths)
        assert saved_rate(out) == saved_rate(start)
        return up_projection(out)

    plain, own = distilled("plain", student), distilled("own", dropping)
    assert torch.equal(plain, own)
    assert not torch.equal(plain, distilled("set", student, "distill.dropout=0.3"))
    adapters = [distilled(f"lora{i}", start, "distill.lora.dropout=0.3") for i, start in enumerate((student, dropping))]
    assert torch.equal(*adapters) and torch.equal(plain, adapters[0]) == (lora == 0)


def test_teach_trains_without_dropout_unless_it_is_set(dropping, student, tmp_path):
    prompts = make_prompts(tmp_path / "prompts.parquet", train=20)

    def taught(name: str, base, rate: float) -> torch.Tensor:
        settings = f"base={base}", "optimisation.steps=3", f"dropout={rate}"
        params = make_params("unused", *(f"teach.student.{setting}" for setting in settings))
        teach(params, "student", prompts, student, tmp_path / name, tmp_path / "runs")
        assert saved_rate(tmp_path / name) == saved_rate(base)
        return up_projection(tmp_path / name)

    plain = taught("plain", student, 0)
    assert torch.equal(plain, taught("own", dropping, 0))
    assert not torch.equal(plain, taught("set", student, 0.3))


@pytest.mark.parametrize("encoder", ["separate", "own"])
@pytest.mark.parametrize("fit", ["teacher", "policy"])
def test_a_reward_is_fitted_and_read_without_dropout(cache, dropping, tmp_path, fit, encoder):
    rows = list(Selection(cache / "selection").rows("train"))[:8]
    settings = make_params("unused", f"reward.fit={fit}", f"reward.encoder={encoder}").reward
    fitting = Fitting(settings, 0, Sources(tmp_path, dropping), rows, rows, [], tmp_path, Train())
    learner = fitting.training("sarsa", False, 0).learner
    assert len(losses(learner, rows)) == 1


@pytest.mark.parametrize("kind", ["joint", "scratch"])
def test_a_reward_that_is_trained_along_has_no_dropout(cache, fitted, dropping, kind):
    rows = list(Selection(cache / "selection").rows("train"))[:8]
    params = make_params("unused", f"distill.reward={kind}")
    scaled = Scaled.of(rows, "sarsa", params.distill.residual)
    reward = RewardInputs(None, scaled, 0.1).reward(params.distill, params.reward, dropping, fitted)
    student = load_lm(dropping)
    set_dropout(student, 0.0)
    learner = StudentLearner(student, [Likelihood(), Divergence("fkl"), Consistency(reward, 0.1)], scaled)
    assert len(losses(learner, rows)) == 1
