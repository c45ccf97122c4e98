"""The nodes of a run: this machine, or those that a file describes."""

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qfleet.config import ConfigError, suggest
from qfleet.config.lane_options import num_cores
from qfleet.config.values import show
from qfleet.runtime.run_files import parse_json, read_given, shortened

MOST_NODES = 20_000

ROLES = ("director", "learner", "actor", "worker", "peer", "replay shard", "server shard")
"""The roles that a node may be given, by the names that the processes of a run have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Nodes that are alike."""

    name: str = "nodes"
    count: int = 1
    """Number of nodes."""
    cores: float = 1
    """CPU cores of each."""
    speed: float = 1.0
    """Speed of a core, as a multiple of this machine's."""
    gigabits_per_second: float = 10.0
    """Bandwidth of each node's connection to the network, in each direction."""
    roles: tuple[str, ...] = ROLES
    """Processes that may be placed there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the processes of a run are placed, and how nodes are connected."""

    groups: tuple[NodeGroup, ...]
    latency_seconds: float = 1e-4
    """Time that the smallest message takes from one node to another."""
    call_seconds: float = 1.8e-3
    """CPU time that the director takes for a call and its reply by Ray, which carries all calls in a cluster."""
    lost_per_process_hour: float = 0.0
    """Number of times that a process is lost in an hour, on average."""
    restart_seconds: float = 20.0
    """Time until the replacement of a lost process is ready."""
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Factors of the costs of parts, by their names."""
    is_here: bool = False
    """Whether it is this machine."""

    def nodes(self) -> Iterator[tuple[int, NodeGroup]]:
        """Yields the number and the group of each node."""
        number = 0
        for group in self.groups:
            for _ in range(group.count):
                yield number, group
                number += 1

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return sum(group.count for group in self.groups)

    @property
    def num_cores(self) -> float:
        """Cores of all nodes."""
        return sum(group.count * group.cores for group in self.groups)

    def with_more_cores(self) -> "Cluster":
        """Returns this cluster with one more core in each node."""
        more = tuple(dataclasses.replace(group, cores=group.cores + 1) for group in self.groups)
        return dataclasses.replace(self, groups=more)

    def place(self, processes: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Returns the number of the node of each process, given by role and number.

        Each process takes a core. It is placed on the node that has most of its cores free among those that may have
        its role. On this machine, as in a run here, there may be more processes than cores.

        Raises:
          ConfigError: if there is no room.
        """
        if self.is_here:
            return dict.fromkeys(processes, 0)
        free = {number: group.cores for number, group in self.nodes()}
        of_role: dict[str, list[int]] = {}
        for number, group in self.nodes():
            for role in group.roles:
                of_role.setdefault(role, []).append(number)
        places, turns = {}, dict.fromkeys(of_role, 0)
        for role, number in processes:
            for _ in range(len(of_role.get(role, []))):
                node = of_role[role][turns[role] % len(of_role[role])]
                turns[role] += 1
                if free[node] >= 1:
                    free[node] -= 1
                    places[role, number] = node
                    break
            else:
                num_wanted = sum(each == role for each, _ in processes)
                which = role if number < 0 else f"{role} {number} of {num_wanted}"
                raise ConfigError(
                    f"the cluster must have a core for each process, got none left for {which} with "
                    f"{self.num_cores:g} cores on {self.num_nodes} nodes; add nodes or cores that may have the role "
                    f"{role!r}, or give fewer processes"
                )
        return places


def this_machine() -> Cluster:
    """Returns the cluster that consists of this machine alone."""
    group = NodeGroup(name="this machine", cores=num_cores())
    return Cluster(groups=(group,), is_here=True)


def check_factors(factors: Mapping[str, float], parts: Sequence[str]) -> None:
    """Checks that all factors are of parts that were measured.

    Raises:
      ConfigError: if one isn't.
    """
    _check_keys("costs of the cluster", factors, [name for name in parts if not name.startswith("memory")])


def read_cluster(path: str) -> Cluster:
    """Returns the cluster that a file describes, in TOML or JSON.

    Args:
      path: of the file.

    Raises:
      ConfigError: if the file can't be read, or doesn't describe a cluster.
    """
    kind = "JSON" if path.endswith(".json") else "TOML"
    try:
        text = read_given(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--cluster must be a file that can be read, got {path} ({error}); check the path") from error
    try:
        content = parse_json(text) if kind == "JSON" else tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else shortened(str(error))
        raise ConfigError(f"{path} must be {kind}, got an error in it ({cause}); mend it, see docs/plan.md") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a table with `nodes`, got {show(content)}; see docs/plan.md")
    return _cluster(path, content)


_TABLES = {
    "network": {"latency_milliseconds": ("latency_seconds", 1e-3), "call_milliseconds": ("call_seconds", 1e-3)},
    "failures": {
        "lost_per_process_hour": ("lost_per_process_hour", 1.0),
        "restart_seconds": ("restart_seconds", 1.0),
    },
}
"""Tables of numbers: for each key, the field of `Cluster` and the unit."""


def _cluster(path: str, content: dict[str, Any]) -> Cluster:
    _check_keys(path, content, ("nodes", "costs", *_TABLES))
    nodes = content.get("nodes")
    if not isinstance(nodes, list) or not nodes:
        raise ConfigError(f"{path} must have at least one table [[nodes]], got {show(nodes)}; see docs/plan.md")
    groups = tuple(_group(f"{path}: nodes[{i}]", each) for i, each in enumerate(nodes))
    num_nodes = sum(group.count for group in groups)
    if num_nodes > MOST_NODES:
        raise ConfigError(f"{path} must describe at most {MOST_NODES} nodes, got {num_nodes}; give fewer, larger ones")
    fields: dict[str, Any] = {}
    for table, keys in _TABLES.items():
        given = content.get(table, {})
        _check_table(f"{path}: {table}", given, tuple(keys))
        for key, value in given.items():
            field, unit = keys[key]
            fields[field] = unit * _number(f"{path}: {table}.{key}", value)
    factors = content.get("costs", {})
    if not isinstance(factors, dict):
        raise ConfigError(f"{path}: costs must be a table, got {show(factors)}; see docs/plan.md")
    factors = {name: _number(f"{path}: costs.{name}", value, above=0.0) for name, value in factors.items()}
    cluster = Cluster(groups=groups, factors=factors, **fields)
    per_hour, seconds = cluster.lost_per_process_hour, cluster.restart_seconds
    if per_hour * seconds >= 3600.0:
        raise ConfigError(
            f"{path}: a process must live for longer than its replacement takes to start, got {per_hour:g} losses per "
            f"hour and {seconds:g} seconds; give fewer losses, or a faster start"
        )
    return cluster


def _group(name: str, content: Any) -> NodeGroup:
    fields = {field.name for field in dataclasses.fields(NodeGroup)}
    _check_table(name, content, tuple(fields))
    found: dict[str, Any] = {}
    for key, value in content.items():
        where = f"{name}.{key}"
        if key == "name":
            found[key] = str(value)
        elif key == "roles":
            if not isinstance(value, list) or not value or not set(map(str, value)) <= set(ROLES):
                raise ConfigError(f"{where} must be a list of roles among {', '.join(ROLES)}, got {show(value)}")
            found[key] = tuple(value)
        elif key == "count":
            if type(value) is not int or value < 1:
                raise ConfigError(f"{where} must be a whole number from 1, got {show(value)}")
            found[key] = value
        else:
            found[key] = _number(where, value, above=0.0)
    return NodeGroup(**found)


def _number(name: str, value: Any, above: float | None = None) -> float:
    is_number = type(value) in (int, float) and abs(value) < 1e12
    if not is_number or (value <= above if above is not None else value < 0):
        rule = "a number above 0" if above is not None else "a number from 0"
        raise ConfigError(f"{name} must be {rule}, got {show(value)}")
    return float(value)


def _check_table(name: str, content: Any, keys: Sequence[str]) -> None:
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must be a table, got {show(content)}; see docs/plan.md")
    _check_keys(name, content, keys)


def _check_keys(name: str, content: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in content:
        if key not in keys:
            raise ConfigError(f"{name} must have only keys among {', '.join(keys)}, got {key!r}.{suggest(key, keys)}")
