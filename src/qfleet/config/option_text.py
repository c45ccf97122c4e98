"""Options as users write them: as in JSON or in Python, or as plain text."""

import ast
import contextlib
import json
from collections.abc import Callable
from typing import Any

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def read_option(text: str) -> Any:
    """Returns the value of an option that is written as in JSON or in Python; any other text is itself.

    `50` is a whole number, `0.5` and `1e-3` are numbers, `true` and `False` flags, `none` and `null` None, `[1, 2]` and
    `('a', 'b')` lists, `8x8` and `"50"` text.
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    if not text.startswith(tuple("\"'[({")):
        readers = () if "_" in text else (int, float)
    for read in readers:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return text
