"""Parameters from and to text: defaults, then a YAML file, then single values; clear refusals of slips.

`xkd-pipeline params` prints the complete file; `dvc exp run -S key=value` and `--set key=value` change single values.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import UserError
from pipeline.params import Params, Section


def load_params(path: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Params:
    """Defaults, then the YAML file at `path` (may be partial), then `key.subkey=value` overrides.

    Raises UserError that names the file or option, the key and the values allowed.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise UserError(f"no parameter file at {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{path} must hold a mapping of parameters, found a {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    source = ", ".join([str(path)] * (path is not None) + [f"--set {o}" for o in overrides])
    return _validate(_merge(Params().model_dump(), tree), source)


def _apply(tree: dict, override: str) -> None:
    key, mark, value = override.partition("=")
    if not mark:
        raise UserError(f"--set {override}: expected key=value, for instance distill.objective=rkl")
    *parents, last = key.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: '{parent}' is a value, not a section")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None


def _merge(default: Any, given: Any) -> Any:
    """Fill a partial tree with defaults; keys that no default has are kept for the schema to refuse."""
    if isinstance(default, dict) and isinstance(given, dict):
        return {
            key: _merge(default[key], given[key])
            if key in default and key in given
            else given.get(key, default.get(key))
            for key in [*default, *(k for k in given if k not in default)]
        }
    return given


def _validate(tree: dict, source: str) -> Params:
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem, tree) for problem in error.errors()]
        raise UserError("\n".join([f"bad parameters in {source}:", *lines])) from None


def _explain(problem: dict, tree: dict) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "(file)"
    if problem["type"] != "extra_forbidden":
        return f"  {key}: {problem['msg']}" + (
            "" if isinstance(problem["input"], dict) else f", found {problem['input']!r}"
        )
    schema: Any = Params().model_dump()
    for part in problem["loc"][:-1]:
        schema = schema[part]
    close = difflib.get_close_matches(str(problem["loc"][-1]), list(schema), n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(schema)}"
    return f"  {key}: unknown parameter; {hint}"


def to_yaml(params: Params) -> str:
    """The complete parameter file, each key with its meaning as a comment."""
    lines = ["# Written by `xkd-pipeline params`. Change values here, or with `dvc exp run -S key=value`."]
    _write(params, lines, "")
    return "\n".join(lines) + "\n"


def _write(section: Section, lines: list[str], indent: str) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            lines.append(f"{indent}{name}:" + (f"  # {field.description}" if field.description else ""))
            _write(value, lines, indent + "  ")
        else:
            style = '"' if isinstance(value, str) and "\n" in value else None  # one line each
            text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10_000)
            text = text.replace("\n...", "").strip()
            lines.append(f"{indent}{name}: {text}" + (f"  # {field.description}" if field.description else ""))
