"""Dropout of a model that is trained: as the parameters say, whatever its own configuration says."""

import copy

from torch import nn


def set_dropout(model: nn.Module, rate: float) -> None:
    """Give every dropout of `model`, a transformers model, this rate, in place; it is saved with its own rates.

    Rates are in modules, in numbers such as `attention_dropout` that forward passes read, and in the configuration,
    which some parts read too: so those get a copy of it, and the model keeps the one that it is saved with.
    Skipping whole layers (`layerdrop`) is switched off.
    """
    configs: dict[int, object] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = rate
            continue
        _set_rates(module, rate)
        config = getattr(module, "config", None)
        if module is not model and config is not None:
            if id(config) not in configs:
                configs[id(config)] = copy.copy(config)
                _set_rates(configs[id(config)], rate)
            module.config = configs[id(config)]


def _set_rates(holder: object, rate: float) -> None:
    """Set the numbers of `holder` that are rates of dropout, by their names; configurations would insist on types."""
    for name, value in vars(holder).items():
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            vars(holder)[name] = 0.0 if "layer" in name else rate
