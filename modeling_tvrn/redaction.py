"""Secrets stay out of everything that is written: settings, commands, logs, reports, cards, checkpoints.

A secret is known by its name (`token`, `api_key`, `password`, `authorization`) or by its shape (`hf_…`, `Bearer …`).
What is written instead is `REDACTED`.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "REDACTED", "SecretsFilter", "guard_logs", "is_secret", "redacted", "redacted_command", "redacted_text",
    "without_secrets",
]  # fmt: skip

REDACTED = "REDACTED"
SECRET = {
    *("password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "authorization"),
    *("auth", "apikey", "accesskey", "cookie", "cookies", "jwt", "dsn"),
}
KEYS = {  # before `key`
    *("api", "access", "secret", "private", "account", "auth", "signing", "encryption", "subscription", "storage"),
    "session",
}
SYMBOLS = {  # before `token`: what a language model calls one is no secret
    *("pad", "unk", "bos", "eos", "cls", "sep", "mask", "image", "video", "audio", "start", "end", "stop", "special"),
    *("class", "word", "text", "prefix", "suffix", "middle", "decoder"),
}
SIGNATURES = {"signature", "sig", "credential", "token"}  # in the query of an address
EMPTY = {"", "none", "null", "true", "false"}
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
      hf_[A-Za-z0-9]{10,}|api_org_[A-Za-z0-9]{10,}      # Hugging Face
    | gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}
    | (?:sk|rk|pk)-(?=[\w-]*\d)[\w-]{16,}|pypi-[\w-]{16,}
    | (?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|xox[a-z]-[\w-]{10,}
    | eyJ[\w-]{5,}\.eyJ[\w-]{5,}\.[\w-]*                # a signed JSON web token
    | -----BEGIN\ [A-Z\ ]*PRIVATE\ KEY-----[\s\S]*?(?:-----END\ [A-Z\ ]*PRIVATE\ KEY-----|\Z)
    )""",
    re.VERBOSE,
)
BEARER = re.compile(r"\b(Bearer|bearer|BEARER)(\s+|%20|\+)(?=\S*\d|\S{16,}|\S*[-_.])[\w.~+/=-]{6,}")
USER_OF_ADDRESS = re.compile(r"(\bhttps?://)[^/\s@\"']+@|(://)[^/\s:@\"']*:[^/\s@\"']+@")
NAMED = re.compile(
    r"(?P<name>[A-Za-z][\w.-]*)(?P<between>[\"']?[ \t]*(?P<sign>[=:])[ \t]*)"
    r"(?P<value>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|(?:(?:Bearer|Basic|Token)\s+)?[^\s\"'&,)}\]]+)",
)
IN_QUERY = re.compile(r"(?P<name>[?&][\w.-]+)=(?P<value>[^\s\"'&#]+)")


def is_secret(name: object) -> bool:
    """Whether what goes by this name is a secret: `token`, `hub_token`, `data_options.api_key`, `X-Api-Key`, …"""
    words = [word.lower() for word in WORDS.findall(str(name))]
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else None
    if last == "token":
        return before not in SYMBOLS
    if last in ("key", "tokens"):
        return before in KEYS
    return last in SECRET or (before, last) == ("connection", "string")


def redacted(value: Any) -> Any:
    """A JSON value without its secrets: those under a secret's name, and those that look like one."""
    if isinstance(value, Mapping):
        return {_name(name): _redacted_item(name, item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([redacted(item) for item in value])
    return redacted_text(value) if isinstance(value, str) else value


def _redacted_item(name: Any, item: Any) -> Any:
    # `token: true` only says that the saved one is used, and an empty one hides nothing.
    is_given = item is not None and not isinstance(item, bool) and item not in ("", [], {})
    if is_given and is_secret(name):
        return REDACTED
    return redacted_command(item) if name == "command" and isinstance(item, str) else redacted(item)


def without_secrets(value: Any) -> Any:
    """As `redacted`, but without what goes by a secret's name: settings that differ in secrets alone become equal."""
    if isinstance(value, Mapping):
        return {_name(name): without_secrets(item) for name, item in value.items() if not is_secret(name)}
    if isinstance(value, (list, tuple)):
        return type(value)([without_secrets(item) for item in value])
    return redacted(value)


def redacted_text(text: str) -> str:
    """A text (a message, a line of a log, a card) without what looks like a secret or is called one."""
    text = BEARER.sub(rf"\1\2{REDACTED}", SHAPES.sub(REDACTED, text))
    text = USER_OF_ADDRESS.sub(lambda found: f"{found[1] or found[2]}{REDACTED}@", text)
    return _nameless(IN_QUERY.sub(_in_query, text))


def _name(name: Any) -> Any:
    return redacted_text(name) if isinstance(name, str) else name


def _in_query(found: re.Match[str]) -> str:
    words = WORDS.findall(found["name"])
    hidden = is_secret(found["name"]) or (bool(words) and words[-1].lower() in SIGNATURES)
    return f"{found['name']}={REDACTED}" if hidden else found[0]


def _nameless(text: str) -> str:
    """Without what follows a secret's name: `token=…`, `"token": …`, `{token: …}`."""
    parts, end, start = [], 0, 0
    while found := NAMED.search(text, start):
        start = found.end("between")  # what is no secret may itself be `name=value`
        if _names_a_secret(found):
            quote = found["value"][0] if found["value"][0] in "\"'" else ""
            parts += [text[end : found.start("value")], quote, REDACTED, quote]
            start = end = found.end()
    return "".join([*parts, text[end:]])


def _names_a_secret(found: re.Match[str]) -> bool:
    value = found["value"].strip("\"'")
    if not is_secret(found["name"]) or value.lower() in EMPTY or not re.search(r"\w", value):
        return False
    if found["sign"] == "=" or found["between"][0] in "\"'":
        return True
    before = found.string[: found.start()].rstrip(" ")  # after a word of a sentence a colon names nothing
    return not before or before[-1] in "{,\n\"'"


def redacted_command(command: str | Sequence[str]) -> str:
    """A command line as it would be typed again, but for the secrets in its arguments."""
    if isinstance(command, str):
        try:
            words = shlex.split(command)
        except ValueError:
            return redacted_text(command)
    else:
        words = list(command)
    shown, follows = [], False
    for word in words:
        shown.append(REDACTED if follows and not word.startswith("--") else _redacted_word(word))
        follows = word.startswith("-") and "=" not in word and is_secret(word)
    return shlex.join(shown)


def _redacted_word(word: str) -> str:
    """An argument: `key=value` whose key is a secret's, `key={token: …}`, or any text."""
    key, equals, value = word.partition("=")
    if equals and is_secret(key) and value.lower() not in EMPTY:
        return f"{key}={REDACTED}"
    if value.lstrip().startswith(("{", "[")):
        import yaml  # here, since `tvrn --help` would wait an eighth longer

        from .plain_yaml import load_yaml

        try:
            given = load_yaml(value)
        except yaml.YAMLError:
            return redacted_text(word)
        hidden = redacted(given)
        return word if hidden == given else f"{key}={yaml.safe_dump(hidden, default_flow_style=True).strip()}"
    return redacted_text(word)


class SecretsFilter(logging.Filter):
    """Takes secrets out of what a handler is about to log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, changed where need be."""
        message = record.getMessage()
        if (hidden := redacted_text(message)) != message:
            record.msg, record.args = hidden, None
        if record.exc_info and not record.exc_text:
            record.exc_text = redacted_text(logging.Formatter().formatException(record.exc_info))
        return True


def guard_logs() -> None:
    """Keep secrets out of all that this process logs through the handlers that are set up."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(SecretsFilter())
