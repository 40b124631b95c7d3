"""JSON out of files that people and downloads leave: what cannot be read is one sentence, whatever went wrong."""

from __future__ import annotations

import json
from typing import Any


def read_json(text: str, name: str) -> Any:
    """The value of JSON text.

    Args:
        name: what the text is, for the message.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply; expected plain objects and lists") from error
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
