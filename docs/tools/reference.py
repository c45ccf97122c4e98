"""Writes the reference pages from the code itself: commands, settings, presets and the Python interface.

python docs/tools/reference.py            # writes docs/reference/ and the tutorials' pages
python docs/tools/reference.py --check    # writes nothing; exit code 1 if a page isn't what the code says
"""

import dataclasses
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import python_interface
import tutorials
import tyro
from formatting import table, wrap
from settings import DEFAULT_SOURCES, DEFAULTS, TEXTS, unit_of

from qfleet.cli import main as command_line
from qfleet.cli.train_help import field_texts, groups
from qfleet.config import TOPOLOGIES, AgentConfig, MeshConfig, TrainConfig
from qfleet.presets import OFF_ATARI, ON_ATARI, PRESETS, TUNED

DOCS = Path(__file__).parents[1]
WRITTEN = "<!-- Written by docs/tools/reference.py. Change the code's docstrings, then run `make docs`. -->"


def pages() -> dict[str, str]:
    """Returns the text of every generated page, by its path below docs/."""
    found = {
        "reference/commands.md": commands(),
        "reference/config.md": settings(),
        "reference/presets.md": presets(),
        "reference/python.md": python_interface.page(),
        **tutorials.pages(DOCS / "tutorials"),
    }
    return {path: f"{WRITTEN}\n\n{text.rstrip()}\n" for path, text in found.items()}


def commands() -> str:
    """Returns the page of all commands and their flags."""
    parts = [
        "# Commands",
        wrap(
            "Flags may be written with dashes or underscores. Whole numbers may be written as `100000` or `1e5`. "
            "RUN is a run's folder, the beginning of its name, or `latest`. `--debug` adds a traceback to any error."
        ),
    ]
    for name, summary in command_line._COMMANDS.items():
        parts += [f"## qfleet {name}", wrap(f"{summary[0].upper()}{summary[1:]}."), *_command(name)]
    return "\n\n".join(parts)


def _command(name: str) -> list[str]:
    module = importlib.import_module(f"qfleet.cli.{name.replace('-', '_')}_command")
    if name == "train":
        return _train_command()
    own = [kind for key, kind in vars(module).items() if key.endswith("Flags") and dataclasses.is_dataclass(kind)]
    if own:
        return _own_flags(name, own[0])
    if text := getattr(module, "_HELP", ""):
        return [f"```text\n{text.rstrip()}\n```"]
    shown = (module._list.__doc__ or "").strip()
    return [f"    qfleet {name}", wrap(f"{shown} It has no flags.")]


def _own_flags(name: str, kind: Any) -> list[str]:
    """Returns the section of a command whose flags are the fields of a dataclass."""
    hints, texts = typing.get_type_hints(kind, include_extras=True), field_texts(kind)
    positional, rows = [], []
    for field in dataclasses.fields(kind):
        hint, help_text, metavar, is_positional = _without_annotations(hints[field.name])
        text = texts.get(field.name) or help_text
        must_be_given = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_positional:
            place = metavar or field.name.upper()
            positional.append((place if must_be_given else f"[{place.strip('[]')}]", text))
        else:
            rows.append((_flag(field.name, hint), describe(hint), _default(field), text))
    usage = " ".join(["qfleet", name, *(place for place, _ in positional), *(["[FLAGS]"] if rows else [])])
    more = [f"    {usage}", *(wrap(paragraph) for paragraph in _paragraphs(kind)[1:])]
    more += [wrap(f"`{place}`: {text}") for place, text in positional]
    if name == "resume":
        more.append(wrap("Every flag of a topology is taken too: see [settings](config.md#where-it-runs)."))
    return [*more, table(["flag", "value", "default", "meaning"], rows)] if rows else more


def _train_command() -> list[str]:
    kinds, texts = _fields_of_runs()
    rows = [
        (_flag(name, kinds[name][0]), describe(kinds[name][0]), _first_sentence(texts[name]))
        for names in groups().values()
        for name in names
        if name in kinds
    ]
    return [
        "    qfleet train ENV [FLAGS]",
        wrap(
            "Every setting is a flag. Without `--preset`, the preset and its settings are [chosen for the environment]"
            "(../guide.md#without-a-preset). [Settings](config.md) gives the defaults, units and sources, and the "
            "flags of each topology. `--quiet` prints nothing but errors. `--log wandb` and `--log mlflow` log to "
            "[trackers](../logging.md#trackers) too. `--num-seeds-at-once N` bounds how many seeds are trained at the "
            "same time, if each has a process of its own. `qfleet train ENV --preset P --help` shows the defaults of "
            "that run. `--config FILE` reads settings from a [file](../guide.md#settings-in-a-file), `--print-config` "
            "prints one and trains nothing, and `--trust` lets FILE name modules to import."
        ),
        table(["flag", "value", "meaning"], rows),
    ]


def _fields_of_runs() -> tuple[dict[str, tuple[Any, Any]], dict[str, str]]:
    """Returns type and field of each setting of a run and its agent, and what the code says about it."""
    fields = {
        field.name: (hint, field)
        for kind in (TrainConfig, AgentConfig)
        for field, hint in _fields(kind)
        if field.name not in ("env", "agent", "topology")
    }
    return fields, field_texts(TrainConfig) | field_texts(AgentConfig) | TEXTS


def settings() -> str:
    """Returns the page of all settings."""
    kinds, texts = _fields_of_runs()
    parts = [
        "# Settings",
        wrap(
            "Each setting is a flag of `qfleet train` (`env_steps` is `--env-steps`) and an argument of "
            "`qfleet.make_config`. The defaults here are those of the classes. [Presets](presets.md) change them, and "
            "without a preset they are [chosen](../guide.md#without-a-preset). Where no source is given, the default "
            "is ours. A preset's own settings come from the paper that it names. `None` is written `none` on the "
            "command line."
        ),
    ]
    for title, names in groups().items():
        owner = "AgentConfig" if names[0] in AgentConfig.__dataclass_fields__ else "TrainConfig"
        found = [(name, *kinds[name], texts[name]) for name in names if name in kinds]
        parts += [f"## {title[0].upper()}{title[1:]}", wrap(f"Fields of `qfleet.{owner}`."), _settings_table(found)]
    parts += [
        "## Where it runs",
        wrap(
            "`--topology NAME` says where a run takes place; each topology has a config of its own, in "
            "`qfleet.config`. [From one core to many machines](../topologies.md) compares them. Lanes, in all of them, "
            "are environments that are stepped at once."
        ),
    ]
    for name, topology in TOPOLOGIES.items():
        parts += [f"### {name}", *_class_section(topology)]
    parts += ["### mesh", *_class_section(MeshConfig, prefix="mesh.")]
    return "\n\n".join(parts)


def _class_section(kind: Any, prefix: str = "") -> list[str]:
    texts = field_texts(kind)
    found = [
        (prefix + field.name, hint, field, texts[field.name]) for field, hint in _fields(kind) if field.name != "mesh"
    ]
    has_mesh = any(field.name == "mesh" for field in dataclasses.fields(kind))
    words = [wrap(f"`{kind.__name__}`. {paragraph}") if i == 0 else wrap(paragraph)
             for i, paragraph in enumerate(_paragraphs(kind))]  # fmt: skip
    mesh = [wrap("Its devices are given by [`mesh.data` and `mesh.model`](#mesh).")] if has_mesh else []
    return [*words, *mesh, _settings_table(found)]


def _settings_table(fields: Iterable[tuple[str, Any, Any, str]]) -> str:
    rows = []
    for name, hint, field, text in fields:
        source = f" Default: {DEFAULT_SOURCES[name]}." if name in DEFAULT_SOURCES else ""
        rows.append((f"`{name}`", describe(hint), _default(field), unit_of(name), text + source))
    return table(["setting", "value", "default", "unit", "meaning"], rows)


def presets() -> str:
    """Returns the page of all presets."""
    parts = [
        "# Presets",
        wrap(
            "A preset is a named combination of [settings](config.md); everything that it doesn't name keeps its "
            "default. What you give yourself takes the place of both. [Algorithms](../algorithms.md) says what each of "
            "them is, and how it differs from its paper."
        ),
    ]
    for name, preset in PRESETS.items():
        parts += [f"## {name}", wrap(f"{preset.summary}. Source: {preset.source}.")]
        if preset.topology:
            parts.append(wrap(f"It runs in topology `{preset.topology}` unless you name another."))
        parts.append(_preset_table(preset.settings) if preset.settings else wrap("All settings have their defaults."))
        for where, replaced in (("On Atari", ON_ATARI), ("Outside Atari", OFF_ATARI)):
            if name in replaced:
                parts += [wrap(f"{where}, these take their place:"), _preset_table(replaced[name])]
        for (tuned_preset, env), tuned in TUNED.items():
            if tuned_preset == name:
                parts += [wrap(f"Tuned for `{env}`:"), _preset_table(tuned)]
    return "\n\n".join(parts)


def _preset_table(changes: Mapping[str, Any]) -> str:
    return table(["setting", "value"], [(f"`{name}`", _value(value)) for name, value in changes.items()])


# --- Words ---


def describe(hint: Any) -> str:
    """Returns what a setting of this type may be, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys("`none`" if each is types.NoneType else describe(each) for each in arguments))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        if typing.get_origin(arguments[0]) is typing.Literal:
            return describe(arguments[0])
        return "whole numbers" if arguments[0] is int else f"{describe(arguments[0])}s"
    if origin is not None and issubclass(origin, Mapping):
        return "pairs of NAME and VALUE"
    return {bool: "flag", int: "whole number", float: "number", str: "text"}[hint]


def _fields(kind: Any) -> list[tuple[Any, Any]]:
    hints = typing.get_type_hints(kind)
    return [(field, hints[field.name]) for field in dataclasses.fields(kind)]


def _without_annotations(hint: Any) -> tuple[Any, str, str, bool]:
    """Returns the bare type, its help and metavar by tyro's annotations, and whether it is given without a flag."""
    text, metavar, is_positional = "", "", False
    if typing.get_origin(hint) is typing.Annotated:
        hint, *marks = typing.get_args(hint)
        for mark in marks:
            text, metavar = getattr(mark, "help", None) or text, getattr(mark, "metavar", None) or metavar
            is_positional |= mark is tyro.conf.Positional
    return hint, text, metavar, is_positional


def _flag(name: str, hint: Any) -> str:
    flag = name.replace("_", "-")
    return f"`--{flag}`, `--no-{flag}`" if hint is bool else f"`--{flag}`"


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return DEFAULTS.get(field.name) or _value(field.default)
    if field.default_factory is dataclasses.MISSING:
        return "must be given"
    return _value(field.default_factory())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"`{name} {_bare(each)}`" for name, each in value.items()) or "empty"
    if isinstance(value, tuple | list):
        return f"`{' '.join(map(_bare, value))}`" if value else "empty"
    return f"`{_bare(value)}`"


def _bare(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return (
            str(value)
            if abs(value) < 10_000
            else f"{value:_}"
            if abs(value) < 10**12
            else f"{value:.0e}".replace("e+", "e")
        )
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _paragraphs(kind: Any) -> list[str]:
    return [" ".join(part.split()) for part in (inspect.getdoc(kind) or "").split("\n\n")]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z)`\d]\.) (?=[A-Z`])", text)[0]


def main() -> int:
    """Writes the pages, or checks them."""
    changed = []
    for name, text in pages().items():
        path = DOCS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            changed.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    verb = "not what the code says" if "--check" in sys.argv else "written"
    print("\n".join(f"docs/{name}: {verb}" for name in changed) or "docs: every generated page is up to date")
    return int("--check" in sys.argv and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
