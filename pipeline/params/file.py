"""Parameters from and to text: defaults, then a YAML file, then single values; clear messages about mistakes.

`xkd-pipeline params` prints the complete file; `dvc exp run -S key=value` and `--set key=value` change single values.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.errors import UserError, in_one_line, is_printable, shown
from pipeline.params import Distill, Params, Section

_DEEPEST, _DIGITS, _LONGEST = 10, 100, 2**20  # of a parameter file: levels, digits of a number, bytes
# What to write instead of objectives' names in papers, in other tools and in our own tables.
_OBJECTIVES = get_args(Distill.model_fields["objective"].annotation)
_HINTS = {
    "(forward|reverse)?_?kld?|kd": "fkl is KL(teacher || student), rkl is KL(student || teacher)",
    "jsd?": "write jsd",
    "ce|nll|hard": "sft learns references, seqkd the teacher's samples",
    "distillm": "write skew_fkl or skew_rkl",
    "avril|x_?kd": "write fkl with distill.reward=frozen, or with scratch for the one-stage form",
    f"x_(?P<name>{'|'.join(_OBJECTIVES)})": "write {name} with distill.reward=frozen",
}


def load_params(path: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Params:
    """Defaults, then the YAML file at `path` (may be partial), then `key.subkey=value` overrides.

    Raises UserError that names the file or option, the key and the values allowed.
    """
    tree: dict[str, Any] = {} if path is None else _read(Path(path))
    for override in overrides:
        _apply(tree, override)
    source = ", ".join([*([] if path is None else [str(path)]), *(f"--set {shown(o)}" for o in overrides)])
    try:
        return Params.model_validate(_merge(Params().model_dump(), tree))
    except ValidationError as error:
        raise UserError("\n".join([f"bad parameters in {source}:", *map(_explain, error.errors())])) from None


def is_params_file(path: Path) -> bool:
    """Whether a file is a parameter file, complete or partial, without a mistake in it."""
    try:
        load_params(path)
    except UserError:
        return False
    return True


def _read(path: Path) -> dict:
    """The mapping in a parameter file. Pipes and devices other than /dev/null, which may never end, are not read."""
    if not path.is_file() and str(path) != os.devnull:
        raise UserError(f"no parameter file at {path}: {'not a file' if path.exists() else 'nothing is there'}")
    with in_one_line(f"{path} cannot be read"):
        if path.stat().st_size > _LONGEST:
            raise UserError(f"{path} has more than {_LONGEST:,} bytes: not a parameter file")
        text = path.read_text(encoding="utf-8")
    tree = _parse(text, f"{path} is not valid YAML")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of parameters, found a {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML as far as parameters need it, within bounds: no aliases (a few can stand for billions of values), limited
    depth, no numbers that take long to read, no text that cannot be written."""

    depth = 0

    def compose_node(self, parent, index):
        here = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=here)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=here)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        if not is_printable(node.value) or "\0" in node.value:
            problem = "a text with half a surrogate pair or a null character"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def construct_yaml_int(self, node):
        if len(node.value) > _DIGITS:
            raise yaml.MarkedYAMLError(problem=f"a number of over {_DIGITS} digits", problem_mark=node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parse(text: str, what: str) -> Any:
    """The value of a YAML text. Raises UserError that begins with `what`."""
    with in_one_line(what):
        return yaml.load(text, _Loader)


def _apply(tree: dict, override: str) -> None:
    key, mark, value = override.partition("=")
    if not mark:
        raise UserError(f"--set {shown(override)}: expected key=value, for instance distill.objective=rkl")
    *parents, last = path = key.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {shown(override)}: '{shown(parent)}' is a value, not a section")
    literal = _takes_text(path) and not _is_quoted(value)
    tree[last] = value if literal else _parse(value, f"--set {shown(override)}: the value is not valid YAML")
    if literal and (not is_printable(value) or "\0" in value):
        raise UserError(f"--set {shown(override)}: a text with half a surrogate pair or a null character")


def _takes_text(path: Sequence[str]) -> bool:
    """Whether a parameter is a text, or one of several: then a value is taken as it stands, braces included."""
    section: Any = Params
    for part in path:
        if not (isinstance(section, type) and issubclass(section, Section) and part in section.model_fields):
            return False
        section = section.model_fields[part].annotation
    return section is str or (
        get_origin(section) is Literal and all(isinstance(each, str) for each in get_args(section))
    )


def _is_quoted(value: str) -> bool:
    value = value.strip()
    return len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"


def _merge(default: Any, partial: Any) -> Any:
    """Fill a partial tree with defaults; keys that no default has are kept for the schema to refuse."""
    if isinstance(default, dict) and isinstance(partial, dict):
        return default | {key: _merge(default.get(key), value) for key, value in partial.items()}
    return partial


def _explain(problem: dict) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "(file)"
    if problem["type"] == "extra_forbidden":
        return f"  {key}: unknown parameter; {_place(problem['loc'])}"
    value = problem["input"]
    hint = _objective_hint(value) if key == "distill.objective" and isinstance(value, str) else ""
    if problem["type"] == "string_type" and isinstance(value, dict):
        hint = "a text that begins with { needs quotes: '{...}'"
    whole_section = isinstance(value, dict) and problem["type"] == "value_error"
    shown_value = "" if whole_section else f", found {shown(repr(value))}"
    return f"  {key}: {problem['msg']}{shown_value}" + (f"; {hint}" if hint else "")


def _objective_hint(name: str) -> str:
    for pattern, hint in _HINTS.items():
        if match := re.fullmatch(pattern, name.lower().replace("-", "_")):
            return hint.format(**match.groupdict())
    return ""


def _place(unknown: Sequence) -> str:
    """Advice on an unknown parameter: where one of this or a similar name is, or what its section has."""
    *parents, name = map(str, unknown)
    prefix, tree = ".".join([*parents, ""]), Params().model_dump()
    same = [key for key in _keys(tree) if key.rpartition(".")[2] == name]
    nearer = [key for key in same if parents and key.startswith(f"{parents[0]}.")]
    if same:
        return "it is " + " or ".join(nearer or same)
    known = [key.removeprefix(prefix) for key in _keys(tree) if key.rpartition(".")[0] == prefix.rstrip(".")]
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"


def _keys(tree: dict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and parameters."""
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def to_yaml(params: Params) -> str:
    """The complete parameter file, each key with its meaning as a comment."""
    lines = ["# Written by `xkd-pipeline params`. Change values here, or with `dvc exp run -S key=value`."]
    _write(params, lines, "")
    return "\n".join(lines) + "\n"


def to_text(value: Any) -> str:
    """A parameter's value as YAML, in one line."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10_000)
    return text.replace("\n...", "").strip()


def _write(section: Section, lines: list[str], indent: str) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        is_section = isinstance(value, Section)
        text = "" if is_section else f" {to_text(value)}"
        lines.append(f"{indent}{name}:{text}" + (f"  # {field.description}" if field.description else ""))
        if is_section:
            _write(value, lines, indent + "  ")
