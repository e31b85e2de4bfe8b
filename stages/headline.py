"""Which KL a model is quoted with: the exact one where the teacher ran, else the bound that its cached top k gives."""

from collections.abc import Mapping

KL_NAMES = {
    "kl": "KL(T‖S)",
    "reverse_kl": "KL(S‖T)",
    "kl_bound": "KL(T‖S), bound",
    "cross_entropy": "cross-entropy",
}


def headline_kl(modes: Mapping) -> tuple[str, Mapping | None]:
    """The measure's name and its interval, of a model's or a difference's entry in results.json; None without one."""
    found = modes.get("heldout", {})
    measure = "kl" if "kl" in found else "kl_bound"
    return measure, found.get(measure)
