"""Resuming a run: the config that it continues with, and checks."""

import dataclasses
from typing import Any, Literal

from qfleet.config import ConfigError, TopologyConfig, TrainConfig
from qfleet.config.checks import check_ray_address_trusted
from qfleet.config.own_parts import check_parts_trusted, own_parts
from qfleet.core.types import EnvSpec
from qfleet.envs.names import check_trusted
from qfleet.networks.torsos import earlier_reading
from qfleet.runtime.run_directory import RunDirectory


def config_to_resume(
    config: TrainConfig,
    *,
    env_steps: int | None,
    stop_return: float | Literal["none"] | None,
    topology: TopologyConfig | None,
    **processes: Any,
) -> TrainConfig:
    """Returns the config that a run continues with. None leaves a setting as it was when the run began.

    Args:
      config: config that the run began with.
      env_steps: new environment step at which the run ends.
      stop_return: new return at which the run ends; "none" for a run that no return ends.
      topology: where the run continues.
      **processes: settings for `TopologyConfig.with_processes`.

    Raises:
      ConfigError: if sizes don't divide over that many processes, or the settings contradict each other.
    """
    topology = config.topology if topology is None else topology
    if given := {name: value for name, value in processes.items() if value is not None}:
        topology = topology.with_processes(given)
    env_steps = config.env_steps if env_steps is None else env_steps
    stop_return = config.stop_return if stop_return is None else None if stop_return == "none" else stop_return
    return dataclasses.replace(config, env_steps=env_steps, stop_return=stop_return, topology=topology)


def check_goes_on(metadata: dict[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError if the run, according to its checkpoint's metadata, has ended already, evaluation included."""
    env_steps = metadata["counters"]["env_steps"]
    if env_steps >= config.env_steps and metadata.get("evaluated_at", env_steps) >= env_steps:
        raise ConfigError(
            f"a run ends after env_steps={config.env_steps}, and this one has taken "
            f"{metadata['counters']['env_steps']}; give a larger --env-steps"
        )


def check_same_place_for_seeds(before: TrainConfig, config: TrainConfig, checkpoint: int | str | None) -> None:
    """Checks that a resumed run trains its seeds in one program, or in a process each, as it did before.

    Args:
      before: config that the run began with.
      config: config that it goes on with.
      checkpoint: environment step of the checkpoint that the caller wants, if any.

    Raises:
      ConfigError: if it doesn't, or a checkpoint is given that each seed would need one of its own of.
    """
    if before.has_seed_processes != config.has_seed_processes:
        here, there = ("one program", "a process each")[:: -1 if before.has_seed_processes else 1]
        raise ConfigError(
            f"a run of {before.num_seeds} seeds must go on with them where they are, got topology "
            f"{config.topology.name}, which trains them in {there}, for a run that trains them in {here}; leave the "
            f"topology as it was"
        )
    if config.has_seed_processes and checkpoint is not None:
        raise ConfigError(
            f"checkpoint must be left out for a run with a process for each seed, got {checkpoint}; leave it out, or "
            f"resume the run of one seed, as in `qfleet resume RUN/seeds/{config.seed} --checkpoint {checkpoint}`"
        )


def check_run_trusted(directory: RunDirectory, *, trust: bool) -> None:
    """Checks that the user wants the modules to be imported that a run's folder names.

    Raises:
      ConfigError: if a module isn't trusted, or would be looked for in the run's folder.
    """
    check_trusted(directory.config.env, directory.path, trust=trust)
    check_parts_trusted(own_parts(directory.config.agent), directory.path, trust=trust)


def check_address_trusted(directory: RunDirectory, config: TrainConfig, given: str | None, *, trust: bool) -> None:
    """Checks that the user wants to join the Ray cluster that a run goes on in.

    Args:
      directory: the run's folder.
      config: with which the run goes on.
      given: the cluster's address, if the user has given it.
      trust: whether the user trusts what the folder names.

    Raises:
      ConfigError: if only the folder names the cluster, and isn't trusted.
    """
    before, now = (getattr(each.topology, "ray_address", None) for each in (directory.config, config))
    named = now if given is None and now == before else None
    check_ray_address_trusted(named, str(directory.path), "--ray-address", trust=trust)


def check_network_is_given(is_given: bool, is_needed: bool) -> None:
    """Raises ConfigError if the caller gives a network but the run uses a built-in one, or the other way round."""
    if is_given != is_needed:
        own, remedy = ("its own network", "give `network`") if is_needed else ("a built-in network", "leave it out")
        given = "one" if is_given else "none"
        raise ConfigError(
            f"`network` must be the one that the run was trained with, got {given}, but this run has {own}; {remedy}"
        )


def check_reads_the_same(directory: RunDirectory, spec: EnvSpec) -> None:
    """Checks that a built-in network reads observations as it did when the run began.

    Raises:
      ConfigError: if an older version of qfleet began the run, and its networks read these observations otherwise.
    """
    if directory.schema_version >= _FIRST_THAT_READS_AS_NOW:
        return
    if earlier := earlier_reading(spec, directory.config.agent.torso):
        raise ConfigError(
            f"a network must read observations as when its run began, got {directory.path}, which an earlier version "
            f"of qfleet began: with observations {spec.observation_dtype}{list(spec.observation_shape)} of {spec.name} "
            f"its network {earlier}; train anew, or use the version of qfleet that began the run"
        )


_FIRST_THAT_READS_AS_NOW = 3
"""Schema version of config.json from which on networks read images with channels first, and of floats, as now."""
