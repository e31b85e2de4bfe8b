"""Check the objectives, or sampled supports, against a file of expected values: `python -m tests.golden FILE`.

A file of objectives has a section for each of them, a file of supports the one section `cases`. Prints the largest
error of each section; exits with 1 above 1e-6 and on a missing or unknown section or key.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.objectives import avril
from pipeline.objectives.divergences import DIVERGENCES, jsd
from pipeline.objectives.logprobs import TopK
from pipeline.objectives.policy_gradient import returns, reward
from pipeline.objectives.sparse import sparse_divergence
from pipeline.objectives.supports import systematic, weighted
from tests.references import dense, sparse_logprobs

TOLERANCE = 1e-6


def _tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _error(found, expected) -> float:
    """Largest difference; infinite where it is none, so that no comparison is passed by accident."""
    found, expected = torch.as_tensor(found, dtype=torch.float64), _tensor(expected)
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(expected.shape)} expected, {tuple(found.shape)} found")
    return float((found - expected).abs().nan_to_num(nan=torch.inf).max())


def _generalized_jsd(case: dict) -> float:
    mask = torch.tensor(case["mask"], dtype=torch.bool)
    teacher, student = dense(_tensor(case["teacher_logits"]), _tensor(case["student_logits"]), case["temperature"])
    found = jsd(teacher, student, case["beta"])[mask]
    return _error(found.sum() / max(len(found), 1), case["loss_mean_over_unmasked_tokens"])


def _avril(case: dict) -> float:
    if case["terminal"] not in ("zero", "drop"):
        raise ValueError(f"terminal {case['terminal']!r} is neither zero nor drop")
    q_all, actions = _tensor(case["q_values"]), torch.tensor(case["actions"])
    lse = torch.logsumexp(q_all, -1)
    logprob = q_all.gather(-1, actions[:, None]).squeeze(-1) - lse
    q = avril.action_values(logprob, lse, "logits")
    mask, stop = torch.ones(1, len(q), dtype=torch.bool), torch.tensor([True])
    kept = avril.kept_steps(mask, stop, case["terminal"])[0]
    delta = avril.td_residual(q, lse, avril.followed_steps(mask)[0], kept, case["gamma"], "sarsa")
    mu, log_sigma = _tensor(case["reward_mean"]), _tensor(case["reward_log_std"])
    nll = -logprob.mean()
    kl = avril.kl_to_prior(mu, log_sigma)[kept].mean()
    td_nll = avril.gaussian_nll(delta, mu, log_sigma)[kept].mean()
    return max(
        _error(delta[kept], case["td"]),
        _error(nll, case["nll"]),
        _error(kl, case["kl_to_prior"]),
        _error(td_nll, case["td_nll"]),
        _error(nll + kl + case["lam"] * td_nll, case["elbo_loss"]),
    )


def _minillm_advantages(case: dict) -> float:
    rewards = reward(_tensor(case["teacher_logprobs"]), _tensor(case["student_logprobs"]))
    length = "discounted" if case["length_normalization"] else "none"
    return _error(returns(rewards, case["gamma"], length), case["advantages"])


def _support(case: dict) -> float:
    """The kept tokens and their weights, and of each divergence the estimate they give and the dense value."""
    teacher, student = _tensor([case["teacher_logprobs"]]), _tensor([case["student_logprobs"]])
    drawn = systematic(teacher.exp(), case["slots"], _tensor([case["offset"]]))
    kept = drawn.places.sort(-1).values
    if kept[0].tolist() != case["kept"]:
        raise ValueError(f"tokens {case['kept']} expected, {kept[0].tolist()} found")
    rows = TopK(kept, teacher.gather(-1, kept), drawn.tau)
    seen = sparse_logprobs(student, kept, torch.zeros(1))
    errors = [_error(drawn.tau[0], case["tau"]), _error(weighted(rows.logprobs, rows.tau)[1][0], case["weights"])]
    for values, of in (
        (case["estimates"], lambda name, weight: sparse_divergence(name, weight, "sampled")(rows, seen)),
        (case["dense"], lambda name, weight: DIVERGENCES[name](*dense(teacher, student), weight)),
    ):
        if values.keys() != _ESTIMATES.keys():
            raise ValueError(f"divergences {sorted(_ESTIMATES)} expected, {sorted(values)} found")
        errors += [_error(of(*_ESTIMATES[key])[0], value) for key, value in values.items()]
    return max(errors)


# key -> divergence, weight of its mixture
_ESTIMATES = {"fkl": ("fkl", 0.0), "tvd": ("tvd", 0.0)}
_ESTIMATES |= {f"{name}_0.1": (name, 0.1) for name in ("skew_fkl", "skew_rkl")}
_ESTIMATES |= {f"jsd_{beta}": ("jsd", beta) for beta in (0.1, 0.5, 0.9)}

OBJECTIVES = {
    "generalized_jsd": (
        _generalized_jsd,
        {"beta", "temperature", "student_logits", "teacher_logits", "mask", "loss_mean_over_unmasked_tokens"},
    ),
    "avril": (
        _avril,
        {"gamma", "lam", "terminal", "q_values", "actions", "reward_mean", "reward_log_std", "td", "nll",
         "kl_to_prior", "td_nll", "elbo_loss"},
    ),
    "minillm_advantages": (
        _minillm_advantages,
        {"gamma", "length_normalization", "student_logprobs", "teacher_logprobs", "advantages"},
    ),
}  # fmt: skip
SUPPORTS = {
    "cases": (
        _support,
        {"teacher_logprobs", "student_logprobs", "slots", "offset", "kept", "tau", "weights", "estimates", "dense"},
    )
}


def check(golden: dict) -> tuple[dict[str, float], list[str]]:
    """Largest error a section, and everything that is wrong with the file."""
    if not isinstance(golden, dict):
        return {}, ["the file is not an object of sections"]
    checks = SUPPORTS if golden.keys() & SUPPORTS.keys() else OBJECTIVES
    problems = [f"missing section {name}" for name in checks.keys() - golden.keys()]
    problems += [f"unknown section {name}" for name in golden.keys() - checks.keys()]
    errors: dict[str, float] = {}
    for name in golden.keys() & checks.keys():
        cases = golden[name]
        if not isinstance(cases, list) or not cases:
            problems.append(f"{name} is empty or no list")
            continue
        found = [_case(*checks[name], f"{name}[{number}]", case, problems) for number, case in enumerate(cases)]
        errors[name] = max(found)
        if errors[name] > TOLERANCE:
            problems.append(f"{name}[{found.index(errors[name])}]: error {errors[name]:.1e} above {TOLERANCE:.0e}")
    return errors, sorted(problems)


def _case(run: Callable[[dict], float], keys: set[str], name: str, case: dict, problems: list[str]) -> float:
    """The error of one case; infinite, and named in `problems`, where it cannot be computed."""
    try:
        if case.keys() != keys:
            odd = [f"missing key {key}" for key in keys - case.keys()]
            odd += [f"unknown key {key}" for key in case.keys() - keys]
            raise ValueError(", ".join(sorted(odd)))
        return run(case)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        problems.append(f"{name}: {error}")
        return float("inf")


def main(path: str) -> int:
    try:
        golden = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"FAILED {path}: {error}")
        return 1
    errors, problems = check(golden)
    for name, error in sorted(errors.items()):
        print(f"{name:24} largest error {error:.1e}")
    for problem in problems:
        print(f"FAILED {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.golden FILE")
    sys.exit(main(sys.argv[1]))
