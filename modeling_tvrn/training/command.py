"""From the words of a command line to a configuration; what is written otherwise is answered with the right way."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path

from .config import TrainingConfig
from .recipes import default_recipe, shipped_recipes
from .settings import model_fields

__all__ = ["settings_of"]


def settings_of(recipe: str | Path | None, words: Sequence[str]) -> TrainingConfig:
    """The configuration that a command line asks for.

    Args:
        recipe: a file, or the name of a shipped recipe; None: `own` where the words name data or a model to start
            from, else the quickstart.
        words: `key=value`, and what was mistaken for it.

    Raises:
        ValueError: a word is no `key=value`: says how it is written; and as `TrainingConfig.from_yaml`.
    """
    _refuse_options(words)
    _refuse_bare_words(words)
    return TrainingConfig.from_yaml(recipe or default_recipe(words), words)


def _refuse_options(words: Sequence[str]) -> None:
    """Answer `--key value` and `--key=value` with `key=value`."""
    known = TrainingConfig.model_fields
    said, written, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            continue
        name, _, value = word.lstrip("-").partition("=")
        key = _key(name.replace("-", "_"), word)
        said.append(word)
        if "=" not in word and rest:
            # What begins a key of its own is no value of the one before it.
            before, equals, _ = rest[0].partition("=")
            if not rest[0].startswith("--") and not (equals and before.partition(".")[0] in known):
                value = rest.pop(0)
                said.append(value)
        is_switch = key in known and isinstance(known[key].default, bool)
        written.append(f"{key}={value or ('true' if is_switch else 'VALUE')}")
    if said:
        raise ValueError(f"write {shlex.join(written)} in place of {shlex.join(said)}: keys go without dashes")


def _key(name: str, word: str) -> str:
    """The key that an option means."""
    known = TrainingConfig.model_fields
    if name in known or name.partition(".")[0] in ("model", "data_options"):
        return name
    if name in model_fields():
        return f"model.{name}"
    near = difflib.get_close_matches(name, known, cutoff=0.5)
    hint = f"did you mean {' or '.join(f'{key}=…' for key in near)}? " if near else ""
    raise ValueError(f"no option {word!r}; {hint}Keys are written key=value (tvrn train --keys lists them)")


def _refuse_bare_words(words: Sequence[str]) -> None:
    """Answer a path or a recipe's name alone with how it is given."""
    for word in words:
        if "=" in word:
            continue
        if word in shipped_recipes() or word.endswith((".yaml", ".yml")):
            raise ValueError(f"{word!r} alone is no key=value; write -c {shlex.quote(word)}")
        if Path(word).expanduser().exists() or "/" in word:
            raise ValueError(f"{word!r} alone is no key=value; write data={shlex.quote(word)}")
