"""Check the objectives against a file of expected values: `python -m tests.golden FILE`.

Prints the largest error of each section; exits with 1 above 1e-6 and on a missing or unknown section or key.
"""

import json
import sys
from pathlib import Path

import torch

from stages.objectives import avril, minillm
from stages.objectives.divergences import jsd
from stages.objectives.outcomes import dense

TOLERANCE = 1e-6


def _tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _error(found, expected) -> float:
    return float((torch.as_tensor(found, dtype=torch.float64) - _tensor(expected)).abs().max())


def _generalized_jsd(case: dict) -> float:
    mask = torch.tensor(case["mask"], dtype=torch.bool)
    teacher, student = dense(_tensor(case["teacher_logits"]), _tensor(case["student_logits"]), case["temperature"])
    return _error(jsd(teacher, student, case["beta"])[mask].mean(), case["loss_mean_over_unmasked_tokens"])


def _avril(case: dict) -> float:
    q_all, actions = _tensor(case["q_values"]), torch.tensor(case["actions"])
    lse = torch.logsumexp(q_all, -1)
    logprob = q_all.gather(-1, actions[:, None]).squeeze(-1) - lse
    q = avril.action_values(logprob, lse, "logits")[None]
    mask, stop = torch.ones_like(q, dtype=torch.bool), torch.tensor([True])
    delta, kept = avril.td_residual(q, q, mask, stop, case["gamma"], "sarsa", case["terminal"])
    mu, log_sigma = _tensor(case["reward_mean"])[None], _tensor(case["reward_log_std"])[None]
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
    student, teacher = _tensor(case["student_logprobs"]), _tensor(case["teacher_logprobs"])
    found = minillm.advantages(student, teacher, case["gamma"], case["length_normalization"])
    return _error(found, case["advantages"])


CHECKS = {
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


def check(golden: dict) -> tuple[dict[str, float], list[str]]:
    """Largest error a section, and everything that is wrong with the file."""
    problems = [f"missing section {name}" for name in CHECKS.keys() - golden.keys()]
    problems += [f"unknown section {name}" for name in golden.keys() - CHECKS.keys()]
    errors: dict[str, float] = {}
    for name in golden.keys() & CHECKS.keys():
        run, keys = CHECKS[name]
        wrong = [
            f"{name}[{i}]: keys {sorted(case.keys() ^ keys)}"
            for i, case in enumerate(golden[name])
            if case.keys() != keys
        ]
        problems += wrong or ([] if golden[name] else [f"{name} is empty"])
        if not wrong and golden[name]:
            errors[name] = max(run(case) for case in golden[name])
    problems += [
        f"{name}: error {error:.1e} above {TOLERANCE:.0e}" for name, error in errors.items() if not error <= TOLERANCE
    ]
    return errors, sorted(problems)


def main(path: str) -> int:
    errors, problems = check(json.loads(Path(path).read_text()))
    for name, error in sorted(errors.items()):
        print(f"{name:24} largest error {error:.1e}")
    for problem in problems:
        print(f"FAILED {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.golden FILE")
    sys.exit(main(sys.argv[1]))
