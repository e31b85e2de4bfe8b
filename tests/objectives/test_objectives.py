"""What holds for the objectives: golden values, whole-vocabulary divergences, meaning of the residuals."""

import json
import math

import pytest
import torch

from pipeline.objectives.avril import followed_steps, gaussian_nll, kept_steps, kl_to_prior, td_residual
from pipeline.objectives.divergences import DIVERGENCES, forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl
from tests import golden
from tests.conftest import ROOT
from tests.references import dense, divergence, random_logits

SHARED_GOLDEN = ROOT.parent / "shared" / "golden"


def test_golden_values_are_matched():
    """A hand-computed case of each section, in the format of the golden files."""
    uniform, skewed = [[0.0, 0.0]], [[math.log(3.0), 0.0]]
    case = {"student_logits": [uniform], "teacher_logits": [skewed], "mask": [[True]], "temperature": 1.0}
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    mixed = [0.625, 0.375]
    half = 0.5 * (0.75 * math.log(0.75 / mixed[0]) + 0.25 * math.log(0.25 / mixed[1]))
    half += 0.5 * (0.5 * math.log(0.5 / mixed[0]) + 0.5 * math.log(0.5 / mixed[1]))
    nll = math.log(2.0)
    log_two_pi = math.log(2 * math.pi)
    errors, problems = golden.check(
        {
            "generalized_jsd": [
                case | {"beta": 0.0, "loss_mean_over_unmasked_tokens": forward},
                case | {"beta": 0.5, "loss_mean_over_unmasked_tokens": half},
            ],
            "avril": [
                {
                    "gamma": 0.5, "lam": 2.0, "terminal": "zero", "actions": [0, 1],
                    "q_values": [[1.0, 1.0], [4.0, 4.0]],
                    "reward_mean": [0.0, 1.0], "reward_log_std": [0.0, 0.0], "td": [-1.0, 4.0], "nll": nll,
                    "kl_to_prior": 0.25, "td_nll": 0.5 * log_two_pi + 0.5 * (0.5 + 4.5),
                    "elbo_loss": nll + 0.25 + 2 * (0.5 * log_two_pi + 2.5),
                }
            ],
            "minillm_advantages": [
                {
                    "gamma": 0.5, "length_normalization": True, "student_logprobs": [-1.0, -2.0],
                    "teacher_logprobs": [-2.0, 0.0], "advantages": [0.0, 2.0],
                }
            ],
        }
    )  # fmt: skip
    assert not problems and max(errors.values()) < 1e-12 and len(errors) == 3


def test_the_golden_check_fails_on_wrong_values_and_on_unknown_or_missing_parts():
    case = {
        "gamma": 1.0,
        "length_normalization": False,
        "student_logprobs": [-1.0],
        "teacher_logprobs": [-1.0],
        "advantages": [0.1],
    }
    _, problems = golden.check({"minillm_advantages": [case], "novelty": []})
    assert any("error 1.0e-01" in problem for problem in problems)
    assert "unknown section novelty" in problems and "missing section avril" in problems
    _, problems = golden.check({"minillm_advantages": [case | {"extra": 1}]})
    assert any("extra" in problem for problem in problems)


def supports_case() -> dict:
    """Two slots, tau = .5: of masses 1/2, 1/4, 1/8, 1/8 on a grid that begins at .3 / 2, the first and the third."""
    p, s, w = (0.5, 0.125), (0.25, 0.25), (0.5, 0.5)
    kept = list(zip(p, s, w, strict=True))

    def jsd(beta: float) -> float:
        of_teacher = sum(w * math.log(p / (beta * p + (1 - beta) * s)) for p, s, w in kept)
        of_student = sum(w / p * s * math.log(1 + beta * p / ((1 - beta) * s)) for p, s, w in kept)
        return beta * of_teacher + (1 - beta) * (-math.log(1 - beta) - of_student)

    whole = torch.tensor([0.5, 0.25, 0.125, 0.125]).double(), torch.full((4,), 0.25).double()
    names = {"fkl": ("fkl", 0), "tvd": ("tvd", 0), "skew_fkl_0.1": ("skew_fkl", 0.1), "skew_rkl_0.1": ("skew_rkl", 0.1)}
    names |= {f"jsd_{beta}": ("jsd", beta) for beta in (0.1, 0.5, 0.9)}
    return {
        "teacher_logprobs": whole[0].log().tolist(), "student_logprobs": whole[1].log().tolist(), "slots": 2,
        "offset": 0.3, "kept": [0, 2], "tau": 0.5, "weights": [0.5, 0.5],
        "estimates": {
            "fkl": 0.0, "tvd": 1 - (0.25 + 0.5),
            "skew_fkl_0.1": sum(w * math.log(p / (0.1 * p + 0.9 * s)) for p, s, w in kept),
            "skew_rkl_0.1": -math.log(0.1) - sum(w / p * s * math.log(1 + 0.9 * p / (0.1 * s)) for p, s, w in kept),
            **{f"jsd_{beta}": jsd(beta) for beta in (0.1, 0.5, 0.9)},
        },
        "dense": {key: divergence(name, *whole, weight).item() for key, (name, weight) in names.items()},
    }  # fmt: skip


def test_golden_supports_are_matched():
    errors, problems = golden.check({"cases": [supports_case()]})
    assert not problems and errors["cases"] < 1e-12


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kept": [0, 1]}, "tokens [0, 1] expected, [0, 2] found"),
        ({"offset": 0.1}, "tokens [0, 2] expected"),
        ({"tau": 0.4}, "error 1.0e-01"),
        ({"weights": [0.5, 0.4]}, "error 1.0e-01"),
        ({"weights": [0.5]}, "shape (1,) expected, (2,) found"),
        ({"estimates": supports_case()["estimates"] | {"fkl": 0.5}}, "error 5.0e-01"),
        ({"estimates": {"fkl": 0.0}}, "divergences ["),
        ({"dense": supports_case()["dense"] | {"rkl": 0.0}}, "divergences ["),
        ({"dense": supports_case()["dense"] | {"tvd": float("nan")}}, "error inf"),
        ({"slots": None}, "cases[1]: "),
        ({"seed": 1}, "unknown key seed"),
    ],
)
def test_the_golden_check_of_supports_fails_on_whatever_is_wrong(change, problem):
    _, problems = golden.check({"cases": [supports_case(), supports_case() | change]})
    assert len(problems) == 1 + problem.startswith(("tokens", "shape", "divergences", "cases", "unknown"))
    assert any(problem in found for found in problems), problems


def test_the_golden_check_of_supports_fails_on_missing_keys_and_other_sections():
    case = supports_case()
    del case["tau"]
    _, problems = golden.check({"cases": [case], "avril": []})
    assert "cases[0]: missing key tau" in problems and "unknown section avril" in problems
    assert golden.check({"cases": []})[1] == ["cases is empty or no list"]


@pytest.mark.parametrize(("name", "sections"), [("objectives.json", 3), ("supports.json", 1)])
def test_the_shared_golden_files_are_matched(capsys, name, sections):
    path = SHARED_GOLDEN / name
    if not path.exists():
        pytest.skip("the golden files lie beside the project, not in it")
    assert golden.main(str(path)) == 0
    assert len(json.loads(path.read_text())) == len(capsys.readouterr().out.splitlines()) == sections


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"advantages": [float("nan")]}, "error inf above"),
        ({"advantages": [0.0, 0.0]}, "shape (2,) expected, (1,) found"),
        ({"advantages": "many"}, "invalid data type 'str'"),
        ({"gamma": None}, "unsupported operand"),
    ],
)
def test_the_golden_check_fails_on_values_that_cannot_be_compared(change, problem):
    case = {"gamma": 1.0, "length_normalization": False, "student_logprobs": [-1.0], "teacher_logprobs": [-1.0]}
    errors, problems = golden.check(
        {"minillm_advantages": [case | {"advantages": [0.0]}, case | {"advantages": [0.0]} | change]}
    )
    assert errors["minillm_advantages"] == math.inf and any(problem in found for found in problems), problems


def test_the_golden_check_fails_on_files_that_are_no_golden_files(tmp_path, capsys):
    for content in ("[1]", "{}", "not json", '{"avril": [], "generalized_jsd": [], "minillm_advantages": []}'):
        (tmp_path / "golden.json").write_text(content)
        assert golden.main(str(tmp_path / "golden.json")) == 1
    assert golden.main(str(tmp_path / "absent.json")) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_its_formula_on_whole_distributions(name, weight):
    teacher, student = random_logits(0), random_logits(1)
    teacher[0] = torch.tensor([0.0] + [-math.inf] * 11)  # one-hot
    student[1, :3] = teacher[1, :3] = -math.inf
    expected = divergence(name, torch.softmax(teacher, -1), torch.softmax(student, -1), weight)
    torch.testing.assert_close(DIVERGENCES[name](*dense(teacher, student), weight), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_vocabulary_that_is_padded_has_nothing_of_the_padding(name):
    """The larger side's extra tokens are impossible on the other."""
    teacher, student = random_logits(0, v=8), random_logits(1, v=12)
    padded = torch.nn.functional.pad(torch.softmax(teacher, -1), (0, 4))
    expected = divergence(name, padded, torch.softmax(student, -1), 0.3)
    torch.testing.assert_close(DIVERGENCES[name](*dense(teacher, student), 0.3), expected)


def test_skewed_divergences_tend_to_the_plain_ones():
    t, s = dense(random_logits(0, scale=1), random_logits(1, scale=1))
    torch.testing.assert_close(skew_forward_kl(t, s, 1e-9), forward_kl(t, s), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(skew_reverse_kl(t, s, 1e-9), reverse_kl(t, s), atol=1e-6, rtol=1e-6)


def test_a_likelihood_that_underflows_costs_nothing_even_where_the_other_side_excludes_it():
    t, s = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, -200.0]], requires_grad=True)
    for name in DIVERGENCES:
        for sides in ((t, s), (torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -math.inf]], requires_grad=True))):
            found = DIVERGENCES[name](*sides, 0.3)
            assert found.item() == pytest.approx(0, abs=1e-6), name
            assert torch.autograd.grad(found, sides[1])[0].isfinite().all(), name


def test_kl_is_that_of_torch():
    t, s = dense(random_logits(0), random_logits(1))
    expected = torch.nn.functional.kl_div(s, t, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(t, s), expected)
    torch.testing.assert_close(reverse_kl(s, t), expected)


def test_jsd_at_its_ends_is_forward_and_reverse_kl_and_tends_to_forward_kl_when_scaled():
    t, s = dense(random_logits(0, scale=1), random_logits(1, scale=1))
    torch.testing.assert_close(jsd(t, s, 0), forward_kl(t, s))
    torch.testing.assert_close(jsd(t, s, 1), reverse_kl(t, s))
    torch.testing.assert_close(jsd(t, s, 1e-7) / 1e-7, forward_kl(t, s), rtol=1e-4, atol=1e-4)


def test_outcomes_that_the_teacher_excludes_cost_nothing_forward_and_give_finite_gradients():
    teacher = torch.tensor([[0.0, -math.inf, -math.inf]])
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = forward_kl(teacher, torch.log_softmax(logits, -1)).sum() + jsd(teacher, torch.log_softmax(logits, -1)).sum()
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


# Residuals. Two responses: three tokens that end with EOS, two that were cut off.
MASK = torch.tensor([[True, True, True], [True, True, False]])
STOP = torch.tensor([True, False])
Q = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
V = torch.tensor([1.5, 2.5, 4.5, 8.5, 16.5], dtype=torch.float64)


def residual(q, v, gamma, td, terminal, mask=MASK, stop=STOP):
    kept = kept_steps(mask, stop, terminal)[mask]
    return td_residual(q, v, followed_steps(mask)[mask], kept, gamma, td), kept


def test_the_last_step_is_dropped_or_kept_only_where_the_response_ended_by_itself():
    assert kept_steps(MASK, STOP, "drop").tolist() == [[True, True, False], [True, False, False]]
    assert kept_steps(MASK, STOP, "zero").tolist() == [[True, True, True], [True, False, False]]
    assert followed_steps(MASK).tolist() == [[True, True, False], [True, False, False]]


def test_residuals_by_hand():
    delta, kept = residual(Q, V, 0.5, "sarsa", "zero")
    assert delta[kept].tolist() == [0.0, 0.0, 4.0, 0.0]
    delta, kept = residual(Q, V, 1.0, "soft", "drop")
    assert delta[kept].tolist() == [-1.5, -2.5, -8.5]
    assert (delta[~kept] == 0).all()


def test_sarsa_telescopes_and_soft_sums_to_the_log_probability():
    """With gamma = 1: sarsa says nothing about the sequence, soft is log pi(y|x) + lse_1 (design, section 1)."""
    torch.manual_seed(0)
    logprob, lse = -torch.rand(5), torch.randn(5)
    whole = {"mask": torch.ones(1, 5, dtype=torch.bool), "stop": torch.tensor([True])}
    q = logprob + lse
    sarsa, _ = residual(q, lse, 1.0, "sarsa", "zero", **whole)
    torch.testing.assert_close(sarsa.sum(), q[0])
    soft, _ = residual(q, lse, 1.0, "soft", "zero", **whole)
    torch.testing.assert_close(soft.sum(), logprob.sum() + lse[0])


def test_gaussian_terms_are_those_of_torch():
    delta, mu, log_sigma = torch.randn(3, 7, dtype=torch.float64)
    q = torch.distributions.Normal(mu, log_sigma.exp())
    torch.testing.assert_close(gaussian_nll(delta, mu, log_sigma), -q.log_prob(delta))
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(kl_to_prior(mu, log_sigma), torch.distributions.kl_divergence(q, prior))
