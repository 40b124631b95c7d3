"""Reading and checking settings: YAML, `key=value`, types and limits, and help for every key."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..redaction import REDACTED, redacted, redacted_command, redacted_text

__all__ = [
    *("build", "describe", "model_fields", "near_matches", "read_overrides", "read_yaml", "refuse_unknown", "setting"),
    *("shown", "validate"),
]

Settings = TypeVar("Settings")
# What `describe` explains before all else, of those that there are.
FIRST_KEYS = (
    *("data", "dual_encoder", "start_from", "output_dir", "phases", "epochs"),
    *("batch_size", "learning_rate", "mixed_precision"),
)
# An entry of a docstring's Args: names, what kind of value in parentheses, and the text with its indented lines.
_DOCUMENTED = re.compile(r"^ {4}(\w+(?:,\s+\w+)*)(?: \(([^)]*)\))?:[ \n]+(.*(?:\n {8}.*)*)", re.MULTILINE)


def setting(default: Any, section: str, help: str, **limits: Any) -> Any:
    """A field with its help text and its limits (minimum, above, maximum, below, choices) in the metadata.

    Of a list of mappings, `items` is the dataclass that says what each may hold, and `example` shows some.
    """
    metadata = {"help": help, "section": section, **limits}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `no` is a word (a precision here) and `5e-4` is a number; PyYAML's 1.1 says otherwise."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    "-+0123456789.",
)


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no configuration file {str(path)!r}; give the path of a YAML file, as in examples/configs/")
    try:
        values = _load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {_problem(error)}; correct it there") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected `key: value` lines")
    return values


def read_overrides(overrides: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """`values` with `key=value` strings laid over them; a dotted key reaches into a mapping."""
    merged = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            given = redacted_text(override)
            raise ValueError(f"override {given!r} is not of the form key=value, as in batch_size=128")
        try:
            value = _load(text)
        except yaml.YAMLError as error:
            given = redacted_command([override])
            raise ValueError(f"override {given}: the value is not valid YAML ({_problem(error)}); quote it") from None
        # `query=a dog: running` is a sentence with a colon; a mapping on one line has braces
        is_text = isinstance(value, dict) and not text.lstrip().startswith("{")
        _put(merged, key.split("."), text if is_text else value)
    return merged


def _problem(error: Exception) -> str:
    """What is wrong and where, without the lines around it, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return redacted_text(str(getattr(error, "problem", None) or type(error).__name__)) + where


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Put a value where a dotted key says; a number is a place in a list."""
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


def _undot(values: dict[str, Any]) -> dict[str, Any]:
    """`{"model.hidden_size": 8}`, as a YAML file may say it, becomes `{"model": {"hidden_size": 8}}`."""
    nested: dict[str, Any] = {}
    values = copy.deepcopy(values)  # a list of the caller's is not changed
    for key, value in values.items():
        if "." not in str(key):
            nested[key] = {**value, **nested.get(key, {})} if isinstance(value, dict) else value
    for key, value in values.items():
        if "." in str(key):
            _put(nested, key.split("."), value)
    return nested


def build(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """An instance of a settings dataclass from keys and values, refusing unknown keys."""
    nested = _undot(values)
    refuse_unknown(nested, cls)
    return cls(**nested)


def refuse_unknown(values: dict[str, Any], cls: type, prefix: str = "") -> None:
    """Refuse keys that a settings dataclass does not have; the message names the nearest that it has."""
    known = {field.name for field in fields(cls)}
    for key in values:
        if key not in known:
            shown = f"{prefix}{key}" if prefix else repr(key)
            raise ValueError(f"unknown key {shown}; {near_matches(str(key), known)}")


def near_matches(key: str, known: Iterable[str]) -> str:
    """A sentence naming the known keys nearest to a mistaken one."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    near += [name for name in names if len(key) > 3 and (key in name or name in key) and name not in near][:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known keys are {', '.join(names)}"


def validate(settings: Any, prefix: str = "") -> None:
    """Check every field's type and limits, turn numbers into the declared type, and check the names under `model`.

    Args:
        settings: an instance of a settings dataclass.
        prefix: what messages put before a key.
    """
    hints = typing.get_type_hints(type(settings))
    for field in fields(settings):
        name = f"{prefix}{field.name}"
        value = _typed(name, getattr(settings, field.name), hints[field.name])
        setattr(settings, field.name, value)
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                _check_limits(name, field, item)
    _check_model_fields(getattr(settings, "model", {}))
    for name in _redacted_names(vars(settings)):
        raise ValueError(
            f"{name} = {REDACTED!r} stands where results.json or a card hides a secret; give the secret itself, or "
            "leave the key out"
        )


def _redacted_names(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _redacted_names(value, f"{prefix}{name}.")
        elif value == REDACTED:
            yield f"{prefix}{name}"


def shown(settings: Any) -> str:
    """A settings dataclass as `repr` shows it, but for the secrets in it."""
    values = redacted({field.name: getattr(settings, field.name) for field in fields(settings)})
    return f"{type(settings).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the declared type, or a ValueError that says what was expected."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in allowed]
    if list in kinds and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    for kind, whole in zip(kinds, allowed, strict=True):
        if type(value) is kind:
            return [_typed(name, item, typing.get_args(whole)[0]) for item in value] if kind is list else value
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{name} = {redacted(value)!r} is a {type(value).__name__}; expected {expected}")


def _check_limits(name: str, field: Field[Any], value: Any) -> None:
    limits = field.metadata
    wrong = [
        text
        for text, bad in (
            (f"at least {limits.get('minimum')}", "minimum" in limits and value < limits["minimum"]),
            (f"above {limits.get('above')}", "above" in limits and value <= limits["above"]),
            (f"at most {limits.get('maximum')}", "maximum" in limits and value > limits["maximum"]),
            (f"below {limits.get('below')}", "below" in limits and value >= limits["below"]),
            (f"one of {', '.join(limits.get('choices', ()))}", "choices" in limits and value not in limits["choices"]),
        )
        if bad or value != value
    ]
    if wrong:
        raise ValueError(f"{name} = {redacted(value)!r}; expected {wrong[0]} ({limits['help']})")


def model_fields() -> dict[str, Any]:
    """The fields of TVRNConfig itself (not those every configuration inherits) with their defaults."""
    from transformers import PreTrainedConfig

    from ..configuration_tvrn import TVRNConfig

    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = [field for field in fields(TVRNConfig) if field.name not in inherited]
    own += [field for field in fields(TVRNConfig) if field.name == "pad_token_id"]
    return {field.name: _default(field) for field in own}


def _model_meanings() -> dict[str, str]:
    """What TVRNConfig's docstring says of each of its fields; those it explains together have the same text."""
    from ..configuration_tvrn import TVRNConfig

    found = {}
    for names, kind, text in _DOCUMENTED.findall(inspect.getdoc(TVRNConfig) or ""):
        choices = f" ({kind.split(', defaults')[0]})" if '"' in kind else ""
        meaning = " ".join(text.split()) + choices
        for value in (None, True, False):  # as YAML writes them
            meaning = meaning.replace(f"`{value}`", _plain(value))
        found.update(dict.fromkeys(names.replace(",", " ").split(), meaning.replace("`", "")))
    return found


def _check_model_fields(values: dict[str, Any]) -> None:
    if not values:
        return
    known = model_fields()
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key model.{key}; {near_matches(str(key), known)} (fields of TVRNConfig)")


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def describe(cls: type) -> str:
    """Help for each key of settings, with its default and limits: those that matter most, then section by section."""
    known = {field.name: field for field in fields(cls)}
    first = [name for name in FIRST_KEYS if name in known]
    lines = ["what matters most:", *(_explained(known[name]) for name in first)]
    section = None
    for name, field in known.items():
        if name in first:
            continue
        if field.metadata["section"] != section:
            section = field.metadata["section"]
            lines.append(f"\n{section}:")
        lines.append(_explained(field))
    if "model" in known:
        lines.append("\nmodel (fields of TVRNConfig):")
        meanings = _model_meanings()
        for name, default in model_fields().items():
            lines.append(f"  model.{name}={_plain(default)}\n      {meanings[name]}")
    return "\n".join(lines)


def _explained(field: Field[Any]) -> str:
    choices = field.metadata.get("choices")
    text = field.metadata["help"] + (f" ({'|'.join(choices)})" if choices else "")
    lines = [f"  {field.name}={_plain(_default(field))}", f"      {text}"]
    if "items" in field.metadata:
        for inner in fields(field.metadata["items"]):
            lines.append(f"    {field.name}.N.{inner.name}\n      {inner.metadata['help']}")
        lines.append(f"    Example: {field.metadata['example']}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
