"""The five rules about which module may import which. Every module is checked against all of them."""

from collections.abc import Callable, Iterable

import pytest
from test_architecture import MODULES, imports

import qfleet.config

LAYERS = (
    {"config"},
    {"core"},
    {"networks", "envs"},
    {"defaults"},
    {"presets"},
    {"runtime"},
    {"topologies"},
    {"runs", "doctor"},
    {"exporting"},
    {"policy"},
    {"serving"},
    {"training"},
    {"planning"},
    {"loading"},
    {"api"},
    {"sweeps"},
    {"cli"},
)
"""A module may import from its own package and from earlier layers; `qfleet` itself and `__main__` from all."""

TOPOLOGIES = {"fused", "overlapped", "actor_learner", "parameter_server", "all_reduce", "gossip"}
"""The packages in `topologies/`, one for each topology."""

TOPOLOGY_CONFIGS = {kind.__name__ for kind in qfleet.config.TOPOLOGIES.values()}

IMPORT_RAY = {
    "fleet.cluster", "fleet.ray_calls", "fleet.ray_internals", "fleet.remote_process", "fleet.supervisor",
    "all_reduce.ray_processes",
}  # fmt: skip
"""Modules of `topologies/` that may import Ray, besides every `remote`."""

DIRECTING = ("topology", "director", "remote")
"""Modules of a package that may import each other, but only later ones in this list."""

DIRECTING_ON_RAY = {
    "topology", "director", "machine_director", "remote", "remote_process", "supervisor", "cluster", "ray_calls",
    "ray_internals",
}  # fmt: skip
"""Modules that workers, learners, server shards and peers must not import."""

DECIDING = {
    "fleet.machine", "fleet.messages", "fleet.pooled_actors", "fleet.rate_limiter", "fleet.sharded_replay",
    "fleet.stats", "actor_learner.machine", "all_reduce.machine", "gossip.machine", "gossip.peer_records",
    "parameter_server.gradient_filter", "parameter_server.machine", "parameter_server.requests",
    "parameter_server.sharded_server", "parameter_server.stats", "parameter_server.step_queue",
}  # fmt: skip
"""Modules of `topologies/` that decide what processes on Ray do. They are pure."""

IMPURE = {"concurrent", "logging", "os", "pathlib", "queue", "random", "ray", "socket", "threading", "time"}
"""Modules that such a module must not import, because its decisions must follow from what it is told."""

ENVS_MAY_IMPORT = ("qfleet.config.errors", "qfleet.config.lane_options", "qfleet.config.python_path")


def layer(name: str) -> int:
    """Returns the position of the layer of a module, or of a name in a module."""
    part = [*name.split("."), ""][1]
    return next((i for i, names in enumerate(LAYERS) if part in names), len(LAYERS))


def topology(name: str) -> str | None:
    """Returns the topology whose package a module, or a name in a module, belongs to; None for all others."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["qfleet", "topologies"] and TOPOLOGIES & set(parts[2:3]) else None


def module_of(name: str) -> str:
    """Returns the module that an imported name stands for or belongs to."""
    return name if name in MODULES else name.rpartition(".")[0]


def in_remote_processes() -> set[str]:
    """Returns the modules of `topologies/` that do the work of processes on Ray, which `remote` modules import."""
    found: set[str] = set()
    waiting = [name for name in MODULES if name.endswith(".remote")]
    while waiting:
        for name in imports(MODULES[waiting.pop()]):
            module = module_of(name)
            is_new = module.startswith("qfleet.topologies.") and module not in found
            if is_new and module.rpartition(".")[2] not in DIRECTING_ON_RAY:
                found.add(module)
                waiting.append(module)
    return found


WORKERS = in_remote_processes()


def breaks_rule_1(module: str, name: str) -> bool:
    """Modules import only from earlier layers, or from their own package."""
    if not name.startswith("qfleet.") or layer(module) == len(LAYERS):
        return False
    return layer(name) >= layer(module) and name.split(".")[1] != module.split(".")[1]


def breaks_rule_2(module: str, name: str) -> bool:
    """No topology imports another. Modules that all of them share import no topology, and no topology's config."""
    if not module.startswith("qfleet.topologies"):
        return False
    own, other = topology(module), topology(name)
    if own is None:
        return other is not None or name.rpartition(".")[2] in TOPOLOGY_CONFIGS
    return other not in (None, own)


def breaks_rule_3(module: str, name: str) -> bool:
    """Only the modules that talk to Ray import it, because it is an extra."""
    local = module.removeprefix("qfleet.topologies.")
    return name.split(".")[0] == "ray" and local not in IMPORT_RAY and not module.endswith(".remote")


def breaks_rule_4(module: str, name: str) -> bool:
    """Topology, director and remote import only later ones in this order, and modules that do the work import none."""
    own, imported = module.rpartition(".")[2], module_of(name).rpartition(".")[2]
    if not name.startswith("qfleet.topologies."):
        return False
    if module in WORKERS:
        return imported in DIRECTING_ON_RAY
    if topology(module) and topology(module) == topology(name) and own in DIRECTING and imported in DIRECTING:
        return DIRECTING.index(imported) < DIRECTING.index(own)
    return False


def breaks_rule_5(module: str, name: str) -> bool:
    """Environments know nothing of agents and topologies."""
    return (
        module.startswith("qfleet.envs")
        and name.startswith("qfleet.config")
        and not name.startswith(tuple(f"{allowed}." for allowed in ENVS_MAY_IMPORT))
    )


def breaks_rule_6(module: str, name: str) -> bool:
    """Modules that decide know nothing of clocks, threads, files, Ray and the modules that direct processes on it."""
    if module.removeprefix("qfleet.topologies.") not in DECIDING:
        return False
    return name.split(".")[0] in IMPURE or module_of(name).rpartition(".")[2] in {*DIRECTING_ON_RAY, "checkpoints"}


RULES: list[Callable[[str, str], bool]] = [
    breaks_rule_1, breaks_rule_2, breaks_rule_3, breaks_rule_4, breaks_rule_5, breaks_rule_6,
]  # fmt: skip


def broken(module: str, names: Iterable[str]) -> list[tuple[int, str]]:
    """Returns the numbers of the rules that a module breaks by importing these names."""
    return [(i, name) for name in names for i, breaks in enumerate(RULES, 1) if breaks(module, name)]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_the_rules_let_it(module: str) -> None:
    assert broken(module, imports(MODULES[module])) == []


def test_every_module_is_in_a_layer() -> None:
    assert {name for name in MODULES if layer(name) == len(LAYERS)} == {"qfleet", "qfleet.__main__"}


def test_the_packages_of_topologies_are_the_ones_that_are_checked() -> None:
    packages = {name.split(".")[2] for name in MODULES if name.startswith("qfleet.topologies.") and name.count(".") > 2}
    assert packages == TOPOLOGIES | {"fleet"}
    assert {kind.replace("-", "_") for kind in qfleet.config.TOPOLOGIES} == TOPOLOGIES


def test_the_modules_that_decide_exist() -> None:
    assert {f"qfleet.topologies.{name}" for name in DECIDING} <= set(MODULES)


def test_the_modules_that_do_the_work_on_ray_are_found() -> None:
    expected = {"actor_learner.learner", "parameter_server.worker", "parameter_server.server_shard", "gossip.peer"}
    assert {f"qfleet.topologies.{name}" for name in (*expected, "fleet.actor", "fleet.replay_shard")} <= WORKERS


@pytest.mark.parametrize(
    ("rule", "module", "planted"),
    [
        (1, "qfleet.config.agent", "qfleet.core.types.EnvSpec"),
        (1, "qfleet.runtime.metrics", "qfleet.topologies.base.Topology"),
        (1, "qfleet.envs.spec", "qfleet.networks.make_network"),
        (1, "qfleet.policy", "qfleet.training.run.Run"),
        (2, "qfleet.topologies.gossip.peer", "qfleet.topologies.all_reduce.launcher.Launcher"),
        (2, "qfleet.topologies.fleet.actor", "qfleet.topologies.actor_learner.learner.GlobalLearner"),
        (2, "qfleet.topologies.base", "qfleet.topologies.fused.topology.Fused"),
        (2, "qfleet.topologies.footprint", "qfleet.config.FusedConfig"),
        (3, "qfleet.topologies.gossip.director", "ray"),
        (3, "qfleet.topologies.fleet.director", "ray.exceptions.RayError"),
        (3, "qfleet.training.run", "ray"),
        (4, "qfleet.topologies.parameter_server.worker", "qfleet.topologies.parameter_server.director.ServerDirector"),
        (4, "qfleet.topologies.gossip.peer", "qfleet.topologies.fleet.supervisor.Supervisor"),
        (4, "qfleet.topologies.actor_learner.remote", "qfleet.topologies.actor_learner.director.ActorLearnerDirector"),
        (5, "qfleet.envs.gymnasium", "qfleet.config.AgentConfig"),
        (5, "qfleet.envs.host", "qfleet.config.topologies.FusedConfig"),
        (6, "qfleet.topologies.actor_learner.machine", "time.monotonic"),
        (6, "qfleet.topologies.gossip.machine", "qfleet.topologies.fleet.machine_director.MachineDirector"),
        (6, "qfleet.topologies.fleet.sharded_replay", "qfleet.topologies.fleet.remote.RemoteReplayShard"),
    ],
)
def test_an_import_against_a_rule_is_found(rule: int, module: str, planted: str) -> None:
    assert module in MODULES
    assert (rule, planted) in broken(module, [*imports(MODULES[module]), planted])
