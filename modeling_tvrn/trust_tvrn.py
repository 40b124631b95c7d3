"""Code that a folder or a repository brings: it runs where the user said so, and nobody is asked. Shipped.

Where `trust_remote_code` is not given, transformers asks on the terminal, for parts of a model too. So it is always
given here, and what names code inside a config is taken out of it before anything is built.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

HUB_ARGUMENTS = frozenset(
    ["cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"]
)
# Where each part of a checkpoint may name code, and for which Auto classes.
MODEL_CODE = {"config.json": ("Auto",)}
TOKENIZER_CODE = {"tokenizer_config.json": ("AutoTokenizer",)}
_PICTURES = ("AutoImageProcessor", "AutoFeatureExtractor")
PICTURE_CODE = dict.fromkeys(("preprocessor_config.json", "processor_config.json", "config.json"), _PICTURES)
PROCESSOR_CODE = {
    "processor_config.json": ("AutoProcessor", *_PICTURES),
    "preprocessor_config.json": ("AutoProcessor", *_PICTURES),
    "tokenizer_config.json": ("AutoProcessor", "AutoTokenizer"),
}


def without_code(config: Any) -> Any:
    """A config, or a dict of one, that names no code to run: neither itself nor in a config inside it."""
    if isinstance(config, PreTrainedConfig):
        for name, value in list(vars(config).items()):
            if name == "auto_map":
                delattr(config, name)
            elif isinstance(value, PreTrainedConfig | Mapping):
                setattr(config, name, without_code(value))
        return config
    if isinstance(config, Mapping):
        return {name: without_code(value) for name, value in config.items() if name != "auto_map"}
    return config


def explained(error: Exception, name: str | os.PathLike, code: Mapping[str, tuple[str, ...]], **hub: Any) -> str:
    """Why loading failed: that a file asks to run code, where one does and may not, else the error's own words.

    Args:
        error: what loading raised.
        name: Hub id or folder.
        code: the files that may ask, each with the beginnings of the Auto classes that it may name code for.
        hub: how it was loaded; with `trust_remote_code` no file is looked at.
    """
    reason = str(error).strip()
    asking = [] if hub.get("trust_remote_code") else list(_asking(name, code, hub))
    if not asking:
        return reason if reason.endswith((".", "!", "?")) else f"{reason}."
    first = "" if "trust_remote_code" in reason else f" ({reason.partition(chr(10))[0][:160]})"
    return (
        f"{' and '.join(asking)} of {os.fspath(name)!r} asks to run Python code that comes with it{first}. Nothing of "
        "it was run. Read that code; if you trust it, pass trust_remote_code=True (--trust-remote-code of a command, "
        "trust_remote_code=true of a recipe)."
    )


def read_json(name: str | os.PathLike, file: str, **hub: Any) -> dict[str, Any]:
    """A JSON file of a folder or a Hub repository; empty where it has none.

    Raises:
        OSError: there is no such repository, or no connection.
        ValueError: it is no JSON object.
    """
    where = {key: value for key, value in hub.items() if key in HUB_ARGUMENTS}
    found = cached_file(os.fspath(name), file, _raise_exceptions_for_missing_entries=False, **where)
    if found is None:
        return {}
    try:
        value = json.loads(Path(found).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} of {os.fspath(name)!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} of {os.fspath(name)!r} holds a {type(value).__name__}; expected an object")
    return value


def _asking(name: str | os.PathLike, code: Mapping[str, tuple[str, ...]], hub: Mapping[str, Any]) -> Iterator[str]:
    for file, classes in code.items():
        try:
            value = read_json(name, file, **hub)
        except (OSError, ValueError):  # such a file asks for nothing; loading has said what is wrong with it
            continue
        if wanted := sorted({target for target in _targets(value) if target.startswith(classes)}):
            yield f"{file} (auto_map: {', '.join(wanted)})"


def _targets(value: Any) -> Iterator[str]:
    """The Auto classes that some `auto_map` in a JSON value names code for."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name != "auto_map":
                yield from _targets(inner)
            elif isinstance(inner, list):  # as tokenizers once wrote it
                yield "AutoTokenizer"
            elif isinstance(inner, Mapping):
                yield from inner
