"""The file of `qfleet train --config FILE`, and the text that `--print-config` prints, which is such a file."""

import dataclasses
import io
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qfleet.cli.topology_flags import topology_flags, topology_with
from qfleet.cli.train_help import field_texts
from qfleet.config import TOPOLOGIES, AgentConfig, ConfigError, MeshConfig, TrainConfig
from qfleet.config.checks import check_ray_address_trusted
from qfleet.config.encoding import SCHEMA_VERSION, decode, encode, encode_topology, migrated
from qfleet.config.new_run import check_new_run
from qfleet.config.own_parts import OWN_PARTS, check_parts_trusted, is_own_name
from qfleet.config.toml import from_toml, to_toml
from qfleet.config.topologies import field_names
from qfleet.config.values import show
from qfleet.envs.names import check_trusted, module_in
from qfleet.presets.making import check_lane_options
from qfleet.runtime.run_files import parse_json, read_given, shortened

_WIDTH = 100
"""Characters of a line of a comment."""

_AGENT, _TRAIN = field_names(AgentConfig), field_names(TrainConfig)


class ConfigFile(NamedTuple):
    """What a file says about a run."""

    path: str
    content: dict[str, Any]
    """The settings, in the tables that the file has them in."""
    is_of_run: bool
    """Whether it is the config.json of a run's folder."""

    @property
    def is_complete(self) -> bool:
        """Whether it gives every setting and nothing else, or is a run's config.json, which must."""
        topology = self.content.get("topology") if isinstance(self.content, dict) else None
        kind = TOPOLOGIES.get(str(topology.get("name"))) if isinstance(topology, dict) else None
        if self.is_of_run or kind is None:
            return self.is_of_run
        whole = encode(TrainConfig(env="", topology=kind()))
        return all(
            _names(self.content, *tables) == _names(whole, *tables)
            for tables in ([], ["agent"], ["topology"], ["topology", "mesh"])
        )


def _names(content: Any, *tables: str) -> set[str]:
    """Returns the names of what is in a table of a table of `content`."""
    for table in tables:
        content = content.get(table) if isinstance(content, dict) else None
    return set(content) if isinstance(content, dict) else set()


def read_config_file(path: str) -> ConfigFile:
    """Returns what a file in TOML or JSON says about a run. It may be a pipe.

    Raises:
      ConfigError: if it can't be read, or is something else.
    """
    rule = "--config must be a file of settings in TOML or JSON"
    try:
        content = read_given(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{rule}, got {path} ({getattr(error, 'strerror', error)}); give another") from error
    try:
        text = content.decode()
        found = parse_json(content) if text.lstrip().startswith("{") else from_toml(text)
        if not isinstance(found, dict):
            raise ConfigError(f"it must hold settings by name, got a {type(found).__name__}")
    except ValueError as error:
        raise ConfigError(f"{rule}, got {path}: {shortened(str(error))}; correct it") from error
    if is_of_run := {"qfleet_version", "config"} <= found.keys():
        settings, version = found["config"], found.get("schema_version", 1)
    else:
        version = found.pop("schema_version", SCHEMA_VERSION)
        settings = found
    try:
        return ConfigFile(path, migrated(settings, version), is_of_run)
    except ConfigError as error:
        raise ConfigError(f"{error}, in {path}; use the version of qfleet that wrote it, or correct it") from error


def config_from_file(file: ConfigFile, given: Mapping[str, Any], *, trust: bool) -> TrainConfig | None:
    """Returns the config of a file that gives every setting, with those of flags in place of its own.

    Args:
      file: the file.
      given: settings that flags give, by name; those of a mesh as `mesh.data` and `mesh.model`.
      trust: whether to import modules that only the file names.

    Returns:
      The config, which a new run may have. None if settings are missing: then `settings_of` gives those that are there.

    Raises:
      ConfigError: if it isn't a valid config, or names a module that isn't trusted.
    """
    if not file.is_complete:
        return None
    try:
        config = decode(file.content)
    except ConfigError as error:
        raise ConfigError(f"{error}, in {file.path}") from error
    _check_trusted(file, {**_flat(file), "env": config.env}, given, trust=trust)
    if "preset" in given:
        raise ConfigError(
            f"preset must be left out with a file that gives every setting, because it would change none, got "
            f"{show(given['preset'])} and {file.path}; leave one of the two out"
        )
    rest = dict(given)
    topology = {name: rest.pop(name) for name in [*rest] if name in topology_flags()}
    agent = {name: rest.pop(name) for name in [*rest] if name in _AGENT}
    changed = dataclasses.replace(
        config,
        agent=dataclasses.replace(config.agent, **agent),
        topology=topology_with(config.topology, topology),
        **rest,
    )
    check_new_run(changed)
    check_lane_options(changed)
    return changed


def settings_of(file: ConfigFile, given: Mapping[str, Any], *, trust: bool) -> dict[str, Any]:
    """Returns the settings of a file as the flags of `qfleet train` give them, with those of flags in their place.

    Args and Raises: as for `config_from_file`.
    """
    found = _flat(file)
    mesh = found.pop("mesh", {})
    if not isinstance(mesh, dict) or (unknown := [*(mesh.keys() - field_names(MeshConfig))]):
        wrong = unknown[0] if isinstance(mesh, dict) else mesh
        raise ConfigError(f"mesh must be a table of data and model, got {show(wrong)} in {file.path}; correct it")
    found |= {f"mesh.{name}": value for name, value in mesh.items()}
    if "env" not in {**found, **given}:
        raise ConfigError(f"a run needs an environment, got none in {file.path}; add env = 'NAME', or give ENV")
    _check_trusted(file, found, given, trust=trust)
    return {**found, **given}


def _flat(file: ConfigFile) -> dict[str, Any]:
    """Returns the settings of a file by name, without its tables.

    Raises:
      ConfigError: if a table is something else, or a setting is given twice.
    """
    found = {name: value for name, value in file.content.items() if name not in ("agent", "topology")}
    tables = {name: file.content.get(name, {}) for name in ("agent", "topology")}
    if isinstance(tables["topology"], str):  # as the flag names it
        tables["topology"] = {"name": tables["topology"]}
    for table, settings in tables.items():
        if not isinstance(settings, dict):
            raise ConfigError(f"{table} must be a table of settings, got {show(settings)} in {file.path}; correct it")
        named = {"topology" if (table, name) == ("topology", "name") else name: settings[name] for name in settings}
        if twice := [*(named.keys() & found.keys())]:
            raise ConfigError(f"{twice[0]} must be given once, got it twice in {file.path}; leave one of them out")
        found |= named
    return found


def _check_trusted(file: ConfigFile, found: Mapping[str, Any], given: Mapping[str, Any], *, trust: bool) -> None:
    """Checks that the user wants the modules to be imported, and the Ray cluster to be joined, that only a file names.

    Raises:
      ConfigError: if one isn't trusted, or a module would be looked for in a run's folder.
    """
    if isinstance(address := found.get("ray_address"), str) and "ray_address" not in given:
        check_ray_address_trusted(address, file.path, "--ray-address", trust=trust)
    own = {name: found[name] for name in ("env", *OWN_PARTS) if name in found and name not in given}
    env = own.pop("env", "")
    named = {"env": env} if isinstance(env, str) and module_in(env) else {}
    parts = {name: value for name, value in own.items() if is_own_name(value)}
    named |= parts
    if named and not trust:
        name, value = next(iter(named.items()))
        raise ConfigError(
            f"a module that only a file names must be trusted before it is imported, because importing it runs its "
            f"code: {file.path} names {name} {value}; if you trust it, give --trust"
        )
    if file.is_of_run and named:
        folder = Path(file.path).parent
        check_trusted(named.get("env", ""), folder, trust=trust)
        check_parts_trusted(parts, folder, trust=trust)


def print_config(text: str) -> None:
    """Prints what `config_text` returns. TOML is UTF-8, whatever the terminal is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    print(text, end="")


def config_text(config: TrainConfig, whose: str, reason: str = "") -> str:
    """Returns a config as a file for `qfleet train --config`, in which a comment says what each setting means.

    Args:
      config: the config. The file gives it back exactly.
      whose: the end of a sentence that begins "What ...".
      reason: what to say of the preset: why it was chosen, or how it was adapted. It may be empty.
    """
    trust = " --trust" if module_in(config.env) or any(is_own_name(getattr(config.agent, n)) for n in OWN_PARTS) else ""
    topology = encode_topology(config.topology)
    lines = [
        *_comment(f"What {whose}" + (f": {config.preset}, {reason}" if reason else "")),
        *_comment(
            f'Train with it: qfleet train --config FILE{trust}. Flags that are given too win. "none" means no value. A '
            f"setting that FILE leaves out is chosen as if its flag were left out."
        ),
        f"schema_version = {SCHEMA_VERSION}",
        *_table(config, TrainConfig(env=config.env), _TRAIN - {"agent", "topology"}),
        "", "[agent]",
        *_table(config.agent, AgentConfig(), _AGENT),
        "", "[topology]", f"name = {to_toml('name', topology['name'])}",
        *_table(config.topology, type(config.topology)(), set(topology) - {"name", "mesh"}),
    ]  # fmt: skip
    if "mesh" in topology:
        lines += ["", "[topology.mesh]", *_table(config.topology.mesh, MeshConfig(), field_names(MeshConfig))]
    return "\n".join(lines) + "\n"


def _table(config: Any, defaults: Any, names: set[str]) -> Iterator[str]:
    """Yields the lines of some fields of a config, in order, and says which of them don't have their defaults."""
    texts = field_texts(type(config))
    for field in dataclasses.fields(config):
        if field.name in names:
            value, default = getattr(config, field.name), getattr(defaults, field.name)
            yield ""
            yield from _comment(texts[field.name])
            changed = "" if value == default else f"  # default {to_toml(field.name, default)}"
            yield f"{field.name} = {to_toml(field.name, value)}{changed}"


def _comment(text: str) -> list[str]:
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return textwrap.wrap(
        printable, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )
