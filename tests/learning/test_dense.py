"""What holds for the divergence to a live teacher: the plain formula over the vocabulary, in loss and gradients."""

import numpy as np
import pytest
import torch

from pipeline.learning.batches import IGNORED, collate
from pipeline.learning.closeness import LogitSource, both_kls
from pipeline.learning.dense import DenseDivergence
from pipeline.learning.learner import StudentLearner, count
from pipeline.learning.terms import Likelihood
from pipeline.models import load_lm
from pipeline.objectives.divergences import DIVERGENCES
from pipeline.store.schema import Row
from tests import references
from tests.conftest import make_seq2seq_model
from tests.learning.test_closeness import capped_model, responses

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
PADDING = {"causal": (0, 0), "larger teacher": (20, 0), "larger student": (0, 20)}  # of teacher and student


@pytest.fixture(scope="module")
def folders(teacher, student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    made = make_seq2seq_model(folder / "a", 0), make_seq2seq_model(folder / "b", 1, tied=False)
    return {"seq2seq": made} | dict.fromkeys(PADDING, (teacher, student))


def pair_of(folders, kind: str, dtype: str = "float32") -> list:
    """Teacher and student; one of them has embeddings, of padding, that it really says."""
    models = [load_lm(folder, dtype) for folder in folders[kind]]
    for model, more in zip(models, PADDING.get(kind, (0, 0)), strict=True):
        if more:
            size = model.config.vocab_size
            model.resize_token_embeddings(size + more, mean_resizing=False)
            with torch.no_grad():
                model.get_output_embeddings().weight[size:] *= 3
    return models


def logits_of(model, response: Row) -> torch.Tensor:
    """[T, V] of one response, by transformers' own forward pass."""
    prompt, answer = (torch.tensor(ids)[None].long() for ids in (response.prompt_ids, response.response_ids))
    if model.config.is_encoder_decoder:
        return model(input_ids=prompt, labels=answer).logits[0]
    return model(input_ids=torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1]


def plain(teacher, student, given: list[Row], name: str, weight: float) -> torch.Tensor:
    """The mean over all response tokens of the formula on float64 probabilities."""
    values = []
    for response in given:
        if len(response.response_ids):
            logits = [logits_of(model, response) for model in (teacher, student)]
            size = min(each.shape[-1] for each in logits)
            t, s = (torch.softmax(each[:, :size].double(), -1) for each in logits)
            values.append(references.divergence(name, t.detach(), s, weight))
    return torch.cat(values).mean()


def learned(terms, student, given: list[Row], chunk: int = 0):
    """The loss of a learner and its sums."""
    batch = collate(given, topk=False)
    return StudentLearner(student, terms, chunk=chunk)(count(batch, "drop"), **batch)


def gradients(loss, model) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(one, other, model, precision: float = 1e-5) -> None:
    """Losses and their gradients for a model."""
    torch.testing.assert_close(one.double(), other, rtol=precision, atol=precision)
    pairs = list(zip(gradients(one, model), gradients(other, model), strict=True))
    assert max(expected.abs().max() for _, expected in pairs) > 1e-3
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=precision * max(1, float(expected.abs().max())))


@every_divergence
@pytest.mark.parametrize("chunk", [1, 3, 0])
@pytest.mark.parametrize("kind", [*PADDING, "seq2seq"])
def test_loss_and_gradients_are_those_of_the_plain_formula(name, chunk, kind, folders):
    """In float64, in which transformers' norms and attention still round to float32; the head alone: to 1e-10."""
    (teacher, student), given = (model.double() for model in pair_of(folders, kind)), responses()
    loss, sums = learned([DenseDivergence(LogitSource(teacher, "t"), name, 0.3)], student, given, chunk)
    assert loss.dtype == torch.float64 and sums.keys() == {"kd"}
    assert_same(loss, plain(teacher, student, given, name, 0.3), student, 1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_jsd_with_beta_a_half_is_that_of_gkd(folders):
    """Half of the KLs of either side to the mixture of both halves; as the golden values have it."""
    (teacher, student), given = pair_of(folders, "causal"), responses()
    loss, _ = learned([DenseDivergence(LogitSource(teacher, "t"), "jsd", 0.5)], student, given, 3)
    values = []
    for response in given:
        if len(response.response_ids):
            t, s = (torch.log_softmax(logits_of(model, response).double(), -1) for model in (teacher, student))
            mixture = torch.logsumexp(torch.stack([t, s]) - np.log(2), 0)
            values.append(0.5 * (t.exp() * (t - mixture)).sum(-1) + 0.5 * (s.exp() * (s - mixture)).sum(-1))
    torch.testing.assert_close(loss.double(), torch.cat(values).mean(), rtol=1e-5, atol=1e-6)


@every_divergence
def test_it_is_added_to_other_terms(name, folders):
    (teacher, student), given = pair_of(folders, "causal"), responses()
    terms = [Likelihood(0.5), DenseDivergence(LogitSource(teacher, "t"), name, 0.3)]
    loss, sums = learned(terms, student, given, 3)
    spoken = [each for each in given if len(each.response_ids)]
    logprobs = (torch.log_softmax(logits_of(student, each).double(), -1) for each in spoken)
    tokens = (torch.tensor(each.response_ids)[:, None].long() for each in spoken)
    nll = -torch.cat([values.gather(-1, ids) for values, ids in zip(logprobs, tokens, strict=True)]).mean()
    assert_same(loss, plain(teacher, student, given, name, 0.3) + 0.5 * nll, student)
    assert sums.keys() == {"nll", "kd"}


@every_divergence
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, folders):
    (teacher, _), given = pair_of(folders, "causal"), responses()
    loss, _ = learned([DenseDivergence(LogitSource(teacher, "t"), name, 0.3)], load_lm(folders["causal"][0]), given, 3)
    torch.testing.assert_close(loss, torch.zeros(()), atol=1e-6, rtol=0)


def test_a_teacher_that_caps_its_logits_after_its_head_says_what_it_says(folders):
    student, given = pair_of(folders, "causal")[1], responses()
    teacher = capped_model(student.config.vocab_size)
    loss, _ = learned([DenseDivergence(LogitSource(teacher, "t"), "jsd", 0.3)], student, given, 3)
    assert_same(loss, plain(teacher, student, given, "jsd", 0.3), student)


def test_it_is_the_kl_that_is_evaluated(folders):
    (teacher, student), given = pair_of(folders, "larger student"), responses()
    sources = LogitSource(teacher, "t"), LogitSource(student, "s")
    with torch.no_grad():
        for name, expected in zip(("fkl", "rkl"), both_kls(*sources, collate(given, topk=False)), strict=False):
            loss, _ = learned([DenseDivergence(sources[0], name)], student, given)
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected.mean())


def test_responses_without_tokens_teach_nothing(folders):
    (teacher, student), given = pair_of(folders, "causal"), [responses()[3]]
    loss, _ = learned([DenseDivergence(LogitSource(teacher, "t"), "fkl")], student, given)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in student.parameters() if p.grad is not None)


def test_the_teacher_is_neither_trained_nor_saved_and_stays_in_evaluation(folders):
    teacher, student = pair_of(folders, "causal")
    source = LogitSource(teacher.train(), "t")
    learner = StudentLearner(student, [DenseDivergence(source, "fkl")]).train()
    alone = StudentLearner(student, [Likelihood()])
    assert learner.state_dict().keys() == alone.state_dict().keys()
    assert len(list(learner.parameters())) == len(list(alone.parameters()))
    assert not teacher.training and student.training and learner.terms[0].teacher is source


@every_divergence
def test_half_precision_is_compared_in_float32(name, folders):
    given, exact = responses(), pair_of(folders, "causal")
    teacher = pair_of(folders, "causal", "bfloat16")[0]
    term = DenseDivergence(LogitSource(teacher, "t"), name, 0.3)
    loss, _ = learned([term], exact[1], given, 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain(*exact, given, name, 0.3), rtol=0.05, atol=0.01)
    gradient = gradients(loss, exact[1])
    assert all(g.isfinite().all() for g in gradient)
    half = pair_of(folders, "causal", "bfloat16")[1]
    loss, _ = learned([term], half, given, 3)
    assert loss.dtype == torch.float32 and all(g.isfinite().all() for g in gradients(loss, half))


def test_no_more_than_a_chunk_of_logits_exists_at_once(folders, monkeypatch):
    (teacher, student), given = pair_of(folders, "causal"), responses()
    term, seen = DenseDivergence(LogitSource(teacher, "t"), "jsd"), []
    of = term.of

    def watched(t, s, weight):
        seen.append((t.shape, s.shape))
        return of(t, s, weight)

    monkeypatch.setattr(term, "of", watched)
    batch = collate(given, topk=False)
    learned([term], student, given, 3)[0].backward()
    tokens = int((batch["labels"] != IGNORED).sum())
    assert sum(t[0] for t, _ in seen) == tokens and max(max(t[0], s[0]) for t, s in seen) == 3
