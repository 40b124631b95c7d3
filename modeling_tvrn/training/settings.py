"""Reading and checking settings: YAML, `key=value`, types and limits, and help for every key."""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo

from ..plain_yaml import DEEPEST, load_yaml, yaml_problem
from ..redaction import redacted, redacted_command, redacted_text

__all__ = [
    *("COMMAS", "FREE", "Count", "Section", "Share", "describe", "flat_items", "model_fields", "near_matches"),
    *("read_overrides", "read_yaml", "told", "undotted"),
]

# What `describe` explains before all else.
FIRST_KEYS = (
    *("data", "dual_encoder", "start_from", "output_dir", "phases", "epochs"),
    *("batch_size", "learning_rate", "mixed_precision"),
)
# An entry of a docstring's Args: names, what kind of value in parentheses, and the text with its indented lines.
_DOCUMENTED = re.compile(r"^ {4}(\w+(?:,\s+\w+)*)(?: \(([^)]*)\))?:[ \n]+(.*(?:\n {8}.*)*)", re.MULTILINE)

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
# Marks of a key, in its `Annotated` type.
FREE = "may change between a run and its continuation: none of it reaches the weights"
COMMAS = BeforeValidator(
    lambda value: [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
)
# pydantic's names of limits that were passed
LIMITS = {
    "greater_than_equal": "at least", "greater_than": "above", "less_than_equal": "at most", "less_than": "below",
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """Mark of the key that begins a section of `--keys`."""

    title: str


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; `-` is stdin."""
    file = Path(path)
    if str(path) != "-" and not file.is_file():
        raise ValueError(f"no configuration file {str(path)!r}; give the path of a YAML file, as in examples/configs/")
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else file.read_bytes()
        values = load_yaml(content.decode("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {redacted_text(yaml_problem(error))}; correct it there") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected `key: value` lines")
    return undotted(values)


def read_overrides(overrides: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """`values` with `key=value` strings laid over them; a dotted key reaches into a mapping."""
    merged = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            given = redacted_text(override)
            raise ValueError(f"override {given!r} is not of the form key=value, as in batch_size=128")
        try:
            value = load_yaml(text)
        except yaml.YAMLError as error:
            given = redacted_command([override])
            problem = redacted_text(yaml_problem(error))
            raise ValueError(f"override {given:.200}: the value is not valid YAML ({problem}); quote it") from None
        # `query=a dog: running` is a sentence with a colon; a mapping on one line has braces
        is_text = isinstance(value, dict) and not text.lstrip().startswith("{")
        _put(merged, key.split("."), text if is_text else value)
    return merged


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Put a value where a dotted key says; a number is a place in a list."""
    if len(path) > DEEPEST:
        raise ValueError(f"the key {'.'.join(path):.80}… is nested more than {DEEPEST} deep; expected section.key")
    inner: Any = values
    for depth in range(len(path) - 1):
        key = _key(inner, path[: depth + 1])
        child = inner[key] if isinstance(inner, list) else inner.get(key)
        if not isinstance(child, (dict, list)):
            child = inner[key] = {}
        inner = child
    inner[_key(inner, path)] = value


def _key(values: dict[str, Any] | list[Any], path: list[str]) -> Any:
    """The last part of a dotted key, as the mapping or list that holds it takes it."""
    *before, last = path
    if isinstance(values, dict):
        return last
    if not last.isdecimal() or int(last) >= len(values):
        name = ".".join(before)
        known = f"{name}.0 to {name}.{len(values) - 1}" if values else "it is empty"
        raise ValueError(f"there is no {name}.{last}: {name} is a list of {len(values)} ({known})")
    return int(last)


def undotted(values: dict[str, Any]) -> dict[str, Any]:
    """`{"model.hidden_size": 8}`, as a YAML file may say it, becomes `{"model": {"hidden_size": 8}}`."""
    dotted = {key: value for key, value in values.items() if "." in str(key)}
    if not dotted:
        return values
    nested = copy.deepcopy({key: value for key, value in values.items() if key not in dotted})
    for key, value in dotted.items():
        _put(nested, key.split("."), value)
    return nested


def flat_items(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of mappings in mappings by their dotted keys."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def near_matches(key: str, known: Iterable[str]) -> str:
    """A sentence naming the known keys nearest to a mistaken one."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    near += [name for name in names if len(key) > 3 and (key in name or name in key) and name not in near][:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known keys are {', '.join(names)}"


def told(error: ValidationError, cls: type[BaseModel]) -> str:
    """What is wrong with which key, and what was expected, a line each, in the words of this project.

    Args:
        error: pydantic's.
        cls: whose keys they are.
    """
    return "\n".join(_told(each, cls) for each in error.errors())


def _told(problem: Any, cls: type[BaseModel]) -> str:
    kind, place, given, context = problem["type"], problem["loc"], problem["input"], problem.get("ctx", {})
    if kind == "value_error":  # of our own
        return str(context["error"])
    if isinstance(place[-1], int) and kind != "model_type":  # an item of a list goes by the list's name
        place = place[:-1]
    outer, last, name = str(place[0]), str(place[-1]), ".".join(map(str, place))
    owner = cls if len(place) == 1 else entry_of(cls.model_fields[outer]) or cls
    if kind == "extra_forbidden":
        return f"unknown key {repr(name) if owner is cls else name}; {near_matches(last, owner.model_fields)}"
    field = owner.model_fields.get(last) or cls.model_fields[outer]
    if kind == "model_type":
        expected = f"a mapping, as in {(field.examples or [''])[0]}"
    elif kind.endswith("_type"):
        expected = {"string_type": "str", "bool_type": "true or false"}.get(kind, kind.removesuffix("_type"))
        expected += " or null" if type(None) in typing.get_args(field.annotation) else ""
    elif kind in LIMITS:
        expected = f"{LIMITS[kind]} {next(iter(context.values())):.15g} ({field.description})"
    else:
        expected = f"one of {', '.join(choices(field.annotation))} ({field.description})"
    is_a = f" is a {type(given).__name__}" if kind.endswith("_type") else ""
    return f"{name} = {redacted(given)!r}{is_a}; expected {expected}"


def choices(annotation: Any) -> tuple[str, ...]:
    """The words that a key's type allows, alone or in a list; none where it is no `Literal`."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return next(filter(None, map(choices, typing.get_args(annotation))), ())


def entry_of(field: FieldInfo) -> type[BaseModel] | None:
    """Of a list of mappings, the class that says what each may hold."""
    kinds = [kind for each in typing.get_args(field.annotation) for kind in typing.get_args(each)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


@functools.cache
def _model_source() -> tuple[dict[str, Any], dict[str, Any], str]:
    """What depends on the first stage, the fields and the docstring of TVRNConfig, read and not imported: torch, which
    comes with it, takes seconds, and a mistaken key is answered at once."""
    module = ast.parse((Path(__file__).resolve().parents[1] / "configuration_tvrn.py").read_text("utf-8"))
    config = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "TVRNConfig")
    outside, inside = (
        {
            ast.unparse(node.target): node.value
            for node in body
            if isinstance(node, ast.AnnAssign) and node.value and "ClassVar" not in ast.unparse(node.annotation)
        }
        for body in (module.body, config.body)
    )
    fields = {name: ast.literal_eval(value) for name, value in inside.items()}
    return ast.literal_eval(outside["BY_FIRST_STAGE"]), fields, ast.get_docstring(config) or ""


def model_fields(has_dual_encoder: bool | None = None) -> dict[str, Any]:
    """The fields of TVRNConfig (not those every configuration inherits) with their defaults.

    Args:
        has_dual_encoder: decides those that depend on it; None leaves these None.
    """
    by_first_stage, fields, _ = _model_source()
    if has_dual_encoder is None:
        return dict(fields)
    return {**fields, **{name: both[has_dual_encoder] for name, both in by_first_stage.items()}}


def describe(cls: type[BaseModel]) -> str:
    """Help for each key of settings, with default and choices: those that matter most, then section by section."""
    known = cls.model_fields
    lines = ["what matters most:", *(_explained(name, known[name]) for name in FIRST_KEYS)]
    for name, field in known.items():
        lines += [f"\n{mark.title}:" for mark in field.metadata if isinstance(mark, Section)]
        if name not in FIRST_KEYS:
            lines.append(_explained(name, field))
    lines.append("\nmodel (fields of TVRNConfig):")
    meanings = {}
    for names, kind, text in _DOCUMENTED.findall(_model_source()[2]):
        meaning = " ".join(text.split()) + (f" ({kind.split(', defaults')[0]})" if '"' in kind else "")
        for value in (None, True, False):  # as YAML writes them
            meaning = meaning.replace(f"`{value}`", _plain(value))
        meanings.update(dict.fromkeys(names.replace(",", " ").split(), meaning.replace("`", "")))
    for name, default in model_fields().items():
        lines.append(f"  model.{name}={_plain(default)}\n      {meanings[name]}")
    return "\n".join(lines)


def _explained(name: str, field: FieldInfo) -> str:
    words = choices(field.annotation)
    said = f" ({'|'.join(words)})" if words else ""
    lines = [f"  {name}={_plain(field.default)}", f"      {field.description}{said}"]
    if entry := entry_of(field):
        for key, inner in entry.model_fields.items():
            lines.append(f"    {name}.N.{key}\n      {inner.description}")
        lines.append(f"    Example: {(field.examples or [''])[0]}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
