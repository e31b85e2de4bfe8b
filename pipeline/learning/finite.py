"""A training whose numbers are no longer finite ends there: no model of NaN is ever saved."""

from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.errors import UserError


def require_finite(value: Tensor, what: str, parts: Mapping[str, Tensor] | None = None) -> None:
    """Raises UserError where a number of a training is NaN or infinite. parts: what it was made of, to be shown."""
    if not value.isfinite().all():
        shown = ", ".join(f"{name} {float(part):.4g}" for name, part in (parts or {}).items())
        raise UserError(
            f"{what} is not finite{f' ({shown})' if shown else ''}: the training ends, and no model is saved. Lower "
            "its learning rate; if that does not help, look at the model it started from, or choose another objective"
        )


def require_finite_weights(model: nn.Module, what: str) -> None:
    """The same of a model's parameters, after `what`."""
    for name, parameter in model.named_parameters():
        require_finite(parameter.detach(), f"{what}: {name}")
