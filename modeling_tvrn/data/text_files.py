"""Text and JSON out of files that people and downloads leave: what cannot be read is said in one sentence."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .file_kinds import HEAD, is_unicode, kind_in_place_of_text


def text_of(path: Path) -> str:
    r"""A text file's letters, with `\n` for the ends of lines; UTF-16 is told by its mark, everything else is UTF-8.

    Single bytes that are no UTF-8 stand as lone surrogates, as in file names: what holds them is left out by itself.

    Raises:
        ValueError: the whole file is in another encoding, or no text; the message says how to convert it.
    """
    content = path.read_bytes()
    if kind := kind_in_place_of_text(content[:HEAD]):
        raise ValueError(f"{path} is no table: it is {kind}")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} begins as UTF-16 and is none ({error.reason}); save it as UTF-8") from error
    else:
        text = content.decode("utf-8-sig", "surrogateescape")
    if 4 * text.count("\0") > len(text):
        raise ValueError(
            f"{path} is half zero bytes, as UTF-16 without a mark is: save it as UTF-8, such as by "
            f"`iconv -f UTF-16LE -t UTF-8 {path.name}`"
        )
    text = text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    lines = text.split("\n")
    broken = [number for number, line in enumerate(lines, start=1) if not is_unicode(line)]
    if broken and not any(is_unicode(line) and not line.isascii() for line in lines):
        raise ValueError(
            f"{path} is not UTF-8 text (first in line {broken[0]}), and probably Latin-1 or Windows-1252: save it as "
            f"UTF-8, such as by `iconv -f WINDOWS-1252 -t UTF-8 {path.name}`"
        )
    return text


def read_json(text: str, name: str) -> Any:
    """The value of JSON text.

    Args:
        name: what the text is, for the message.

    Raises:
        ValueError: it is not JSON, is nested too deeply, holds a number of thousands of digits, or names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply; expected plain objects and lists") from error
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of values under one name Python would keep the last alone."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(
            f"the key {twice!r} occurs twice in {json.dumps(found)[:80]}; rename one, or join their values"
        )
    return found


def read_json_file(path: Path) -> Any:
    """The value of a JSON file; what is wrong with it is said as by `text_of` and `read_json`."""
    return read_json(text_of(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file of JSON lines, each with the number of its line; empty ones are passed over."""
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if line.strip():
            yield number, read_json(line, f"{path}, line {number}")
