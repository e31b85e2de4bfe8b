"""The files that hold a model's weights: exactly those that every engine loads.

transformers reads `model.safetensors`, else the files that `model.safetensors.index.json` names; vLLM reads every
`.safetensors` file that an index, if there is one, does not exclude, and `consolidated*.safetensors` before all
others. A folder for which the two differ is refused.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import UserError, in_one_line, shown
from pipeline.files import read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_SHOWN = 5  # names in a message
# The causal mask and its fill value: buffers that GPT-2, GPT-Neo, GPT-J and others of their time were saved with.
_MASK = re.compile(r"\.(attn|attention)\.(masked_)?bias$")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a local folder, each with tensors of its own.

    Raises UserError that names the file or tensor: where there are none (other formats than safetensors are not
    loaded), where engines would read different files, where an adapter would be applied, and where the index does not
    fit its files.
    """
    present = weight_names(folder)
    if (folder / _ADAPTER).exists():
        raise UserError(
            f"{folder} has an {_ADAPTER}, whose adapter transformers would apply to the weights and vLLM would not: "
            "merge it into them (PEFT's merge_and_unload, then save_pretrained), or move the adapter's files away"
        )
    if not present:
        raise UserError(f"{folder} has no .safetensors weights (other formats are not loaded)")
    weight_map = _weight_map(folder) if (folder / _INDEX).exists() else None
    read = {_SINGLE} if weight_map is None else set(weight_map.values())
    if absent := read - present:
        raise UserError(
            f"{folder} has no {_named(absent)}, which loading reads"
            + (f" according to {_INDEX}" if weight_map else f"; found {_named(present)}")
        )
    if weight_map is None and present != read:
        raise UserError(
            f"{folder} has {_named(present - read)} beside {_SINGLE}, which vLLM would load and transformers would "
            "not: move it away"
        )
    if weight_map is not None and _SINGLE in present and read != {_SINGLE}:
        raise UserError(
            f"{folder} has {_SINGLE}, which transformers would load, and {_INDEX}, which names other files for vLLM: "
            "move one of them away"
        )
    if preferred := {name for name in present - read if name.startswith("consolidated")}:
        raise UserError(f"{folder} has {_named(preferred)}, which vLLM would load instead of the others: move it away")
    files = [folder / name for name in sorted(read)]
    _require_distinct_tensors(files, weight_map)
    return files


def weight_names(folder: Path) -> set[str]:
    """Names of the weight files in a local folder, read or not.

    Raises UserError where one is not a file, or where config.json sends transformers to a file of another name.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if strange := [path.name for path in paths if not path.is_file()]:
        raise UserError(
            f"{folder} has {_named(strange)}, named as a weight file but not a regular file (it is a folder, a pipe or "
            "a link that leads nowhere): move it away"
        )
    config = read_json(folder / _CONFIG) if os.path.lexists(folder / _CONFIG) else None
    if isinstance(config, dict) and config.get("transformers_weights") is not None:
        raise UserError(
            f"{folder / _CONFIG} has transformers_weights {shown(repr(config['transformers_weights']))}: transformers "
            f"would load that file and vLLM would not. Call the file {_SINGLE} and take the entry out"
        )
    return {path.name for path in paths}


def unread_files(folder: Path) -> list[Path]:
    """Weight files that no engine loads, because the index does not name them."""
    return sorted({folder / name for name in weight_names(folder)} - set(weight_files(folder)))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file name, from the index."""
    path = folder / _INDEX
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    is_map = isinstance(weight_map, dict) and bool(weight_map)
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path} has no weight_map of tensors to files")
    if outside := {name for name in weight_map.values() if Path(name).name != name}:
        raise UserError(f"{path} names {_named(outside)}, which is not a file beside it")
    return weight_map


def _require_distinct_tensors(files: list[Path], weight_map: dict[str, str] | None) -> None:
    """Raises UserError where a tensor is in two files, or not in the file that the index names for it."""
    from safetensors import safe_open

    place: dict[str, str] = {}
    for path in files:
        with in_one_line(f"cannot read {path}"), safe_open(path, "numpy") as file:
            tensors = list(file.keys())
        for tensor in tensors:
            if tensor in place:
                raise UserError(f"{path.parent} has tensor {tensor} twice, in {place[tensor]} and in {path.name}")
            place[tensor] = path.name
    for tensor, name in (weight_map or {}).items():
        if place.get(tensor) != name:
            where = f"it is in {place[tensor]}" if tensor in place else "no file has it"
            raise UserError(f"{files[0].parent / _INDEX} puts tensor {tensor} into {name}, and {where}")


def require_complete(info: dict, folder: Path) -> None:
    """Raises UserError where weights lack a tensor that the model has, which would be random, or have one more.

    info: what transformers says about loading (`output_loading_info`), without tensors that it ignores on purpose.
    Attention masks that were saved as tensors are ignored too.
    """
    lacking = set(info.get("missing_keys", ()))
    added = set(info.get("unexpected_keys", ()))
    added -= _masks(folder, {name for name in added if _MASK.search(name)})
    wrong = {"lack": lacking, "have more than the model:": added}
    if lacking or added:
        random = "A missing tensor would be filled with random values: s" if lacking else "S"
        raise UserError(
            f"the weights of {folder} are not those of its configuration: they "
            f"{' and '.join(f'{what} {_named(names)}' for what, names in wrong.items() if names)}. {random}ave the "
            "model again, or correct its config.json"
        )


def _masks(folder: Path, names: set[str]) -> set[str]:
    """Which of the tensors have the shape of a causal mask, [1, 1, n, n], or of a single value."""
    from safetensors import safe_open

    masks = set()
    for path in weight_files(folder) if names else ():
        with safe_open(path, "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in names & set(file.keys())}
        masks |= {name for name, shape in shapes.items() if not shape or shape == [1, 1, shape[-1], shape[-1]]}
    return masks


def _named(names: Iterable[str]) -> str:
    """Some names, and how many more there are."""
    shown = sorted(map(str, names))
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
