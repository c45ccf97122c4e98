"""What a run goes on with: checks, and the config of the rest of it."""

import dataclasses
from typing import Any

from qfleet.config import ConfigError, TopologyConfig, TrainConfig


def config_to_resume(
    config: TrainConfig, *, env_steps: int | None, topology: TopologyConfig | None, **processes: Any
) -> TrainConfig:
    """Returns the config of the rest of a run; None leaves a setting as the run began with it.

    Args:
      config: of the run, as it began.
      env_steps: a new end.
      topology: where it goes on.
      **processes: as for `TopologyConfig.with_processes`.

    Raises:
      ConfigError: if its sizes don't divide over so many processes, or the settings don't go together.
    """
    topology = config.topology if topology is None else topology
    if given := {name: value for name, value in processes.items() if value is not None}:
        topology = topology.with_processes(given)
    env_steps = config.env_steps if env_steps is None else env_steps
    return dataclasses.replace(config, env_steps=env_steps, topology=topology)


def check_goes_on(metadata: dict[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError if a run whose checkpoint has this metadata is at its end already."""
    if metadata["counters"]["env_steps"] >= config.env_steps:
        raise ConfigError(
            f"a run ends after env_steps={config.env_steps}, and this one has taken "
            f"{metadata['counters']['env_steps']}; give a larger --env-steps"
        )


def check_network_is_given(is_given: bool, is_needed: bool) -> None:
    """Raises ConfigError if a network of the caller's own is given where the run has none, or the other way round."""
    if is_given != is_needed:
        own, remedy = ("its own network", "give `network`") if is_needed else ("a built-in network", "leave it out")
        given = "one" if is_given else "none"
        raise ConfigError(
            f"`network` must be the one that the run was trained with, got {given}, but this run has {own}; {remedy}"
        )
