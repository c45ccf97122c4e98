"""The page of the Python interface: every public name with its signature and its docstring."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from typing import Any

from formatting import item, wrap

import qfleet

_SECTIONS = ("Args", "Returns", "Raises", "Yields", "Args and Raises", "Attributes")
_FUNCTIONS_FIRST = ("make_config", "train", "iterate", "resume", "load", "watch")
_SETTINGS = ("AgentConfig", "TrainConfig", "FusedConfig", "OverlappedConfig")


def page() -> str:
    """Returns the page."""
    names = [*_FUNCTIONS_FIRST, *(name for name in qfleet.__all__ if name not in _FUNCTIONS_FIRST)]
    parts = ["# Python interface", "Everything in `qfleet`. All other modules may change without notice."]
    for name in names:
        value = getattr(qfleet, name)
        if name == "PRESETS":
            parts += [f"## {name}", "The presets by name, as [listed](presets.md)."]
        elif name in _SETTINGS:
            parts += [f"## {name}", *_text(value), "[Settings](config.md) lists its fields."]
        elif inspect.isclass(value):
            parts += [f"## {name}", *_text(value), *_members(value)]
        else:
            parts += [f"## {name}", _signature(f"qfleet.{name}", value), *_text(value)]
    return "\n\n".join(parts)


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    shown = signature.replace(
        parameters=[p for p in bare if p.name != "self"], return_annotation=inspect.Signature.empty
    )
    return f"```text\n{textwrap.fill(f'{name}{shown}', 96, subsequent_indent='    ', break_long_words=False)}\n```"


def _members(kind: Any) -> list[str]:
    """Returns the fields and public methods of a class."""
    parts = []
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        parts.append("\n".join(item(f"`{name}`", text) for name, text in _fields(kind).items()))
    for name, member in vars(kind).items():
        is_call = name == "__call__" and not getattr(kind, "_is_protocol", False)
        is_value = isinstance(member, property | functools.cached_property)
        if (name.startswith("_") and not is_call) or not (inspect.isfunction(member) or is_value):
            continue
        if is_value:
            parts += [f"**`{name}`**", *_text(member)]
        elif inspect.getdoc(member):
            called = kind.__name__.lower() if is_call else f"{kind.__name__}.{name}"
            parts += [_signature(called, member), *_text(member)]
    return parts


def _fields(kind: Any) -> dict[str, str]:
    """Returns the text below each field of a record; a field without one has its type instead."""
    texts: dict[str, str] = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            texts[statement.target.id] = f"`{ast.unparse(statement.annotation)}`"
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                texts[statement.target.id] = str(after.value.value)
    return texts


def _text(value: Any) -> list[str]:
    """Returns a docstring as Markdown: its paragraphs, and a list for each of its sections."""
    parts: list[str] = []
    for block in re.split(r"\n\n|\n(?=[A-Z][A-Za-z ]+:\n)", inspect.getdoc(value) or ""):
        title, _, rest = block.partition("\n")
        if title.rstrip(":") in _SECTIONS and title.endswith(":"):
            parts += [f"*{title.rstrip(':')}*", _items(textwrap.dedent(rest))]
        elif block.startswith(" "):
            parts.append(textwrap.indent(textwrap.dedent(block), "    "))
        else:
            parts.append(wrap(block))
    return parts


def _items(text: str) -> str:
    """Returns the entries of a section, each of which begins at the margin, as a list."""
    entries = re.split(r"\n(?=\S)", text)
    found = [re.match(r"(\**\w+(?:, \w+)*): (.*)", entry, re.DOTALL) for entry in entries]
    if not all(found):
        return wrap(text)
    return "\n".join(item(f"`{match[1]}`", match[2]) for match in found if match)
