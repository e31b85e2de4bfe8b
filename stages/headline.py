"""What a model is quoted with: its task's first metric, and the exact KL or, where no teacher ran, its bound."""

from collections.abc import Mapping

KL_NAMES = {
    "kl": "KL(T‖S)",
    "reverse_kl": "KL(S‖T)",
    "kl_bound": "KL(T‖S), bound",
    "cross_entropy": "cross-entropy",
}


def headline_metric(evaluation: Mapping) -> str:
    """The task's first metric, of the results of `evaluate`."""
    return next(iter(evaluation["higher_is_better"]))


def headline_kl(modes: Mapping) -> tuple[str, Mapping | None]:
    """The measure's name and its interval, of a model's or a difference's entry in results.json; None without one."""
    found = modes.get("heldout", {})
    measure = "kl" if "kl" in found else "kl_bound"
    return measure, found.get(measure)
