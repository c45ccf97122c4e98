"""Pieces of Markdown, in lines of at most 100 characters."""

import textwrap
from collections.abc import Iterable


def wrap(text: str, indent: str = "") -> str:
    """Returns a paragraph. Its lines after the first begin with `indent`."""
    words = " ".join(text.split())
    return textwrap.fill(words, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def item(name: str, text: str) -> str:
    """Returns an entry of a list."""
    return wrap(f"- {name}: {text}", "  ")


def table(titles: list[str], rows: Iterable[tuple[str, ...]]) -> str:
    """Returns a table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines)
