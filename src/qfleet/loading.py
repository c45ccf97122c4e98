"""Loading a trained policy: from the checkpoint of a run, or from a folder that it was exported to."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.checks import check_checkpoint
from qfleet.config.own_parts import check_parts_trusted, parts_of_policy
from qfleet.config.values import show, to_plain
from qfleet.core.keys import key_shape
from qfleet.core.masks import masked
from qfleet.core.types import EnvSpec, Network, Params
from qfleet.envs.factory import remember_factory
from qfleet.envs.host import HostEnv
from qfleet.envs.names import check_trusted
from qfleet.envs.recorded import RecordedEnv, record_of
from qfleet.envs.registry import make_env
from qfleet.envs.spec import InGraphEnv
from qfleet.exporting.record import ExportedPolicy, Origin, read_exported
from qfleet.exporting.weights import read_weights
from qfleet.networks import check_network, make_network
from qfleet.policy import Policy
from qfleet.runtime.best_checkpoint import BestCheckpoint
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.devices import limit_cpu_threads
from qfleet.runtime.evaluation import EvaluationOptions
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.video import params_label
from qfleet.runtime.zoo import folder_for_outputs, resolve_zoo
from qfleet.training.metadata import read_metadata
from qfleet.training.resuming import check_network_is_given, check_reads_the_same
from qfleet.training.seed_summary import check_seed, open_seed

_Env = InGraphEnv | HostEnv | RecordedEnv


def load_policy(
    run_dir: str | os.PathLike[str],
    *,
    checkpoint: int | Literal["best"] | None,
    seed: int | None,
    env: Callable[..., Any] | None,
    network: Network | None,
    trust: bool,
) -> Policy:
    """Returns the policy of a run, or of the folder of an exported policy; see `qfleet.load`."""
    run_dir = resolve_zoo(run_dir)
    exported = read_exported(run_dir)
    if exported is None:
        directory = RunDirectory.open(run_dir)
        return _load_run(directory, checkpoint=checkpoint, seed=seed, env=env, network=network, trust=trust)
    for name, value in {"checkpoint": checkpoint, "seed": seed}.items():
        if value is not None:
            raise ConfigError(
                f"{name} must be left out for an exported policy, which is one checkpoint of one seed, got "
                f"{show(value)} for {exported.path}; leave it out, or load the run"
            )
    policy = _load_exported(exported, env=env, network=network, trust=trust)
    jax.devices()  # a policy can't act without any, and here their lack is one clear error
    return policy


def videos_folder(run_dir: str | os.PathLike[str]) -> Path:
    """Returns the folder for the videos of a run or of an exported policy, as the user would name it.

    It is in the folder of the run or the policy, or in the current folder for an agent of the zoo.

    Raises:
      ConfigError: if it is neither.
    """
    run_dir = resolve_zoo(run_dir)
    if (exported := read_exported(run_dir)) is not None:
        return folder_for_outputs(exported.path) / "videos"
    directory = RunDirectory.open(run_dir)
    return directory.as_named(directory.videos_path)


def _load_exported(
    exported: ExportedPolicy, *, env: Callable[..., Any] | None, network: Network | None, trust: bool
) -> Policy:
    path, origin = exported.path, exported.origin
    config = origin.config
    check_parts_trusted({} if network else parts_of_policy(config.agent), path, trust=trust)
    check_network_is_given(network is not None, origin.has_own_network)
    source = _environment_of(config, path, origin.environment, env, trust=trust)
    used = _network_for(config, source, network)
    params = read_weights(used, exported.weights_path)
    label = params_label(origin.env_steps, origin.trained_seed)
    return Policy(source, masked(used, _spec_of(source)), params, label, exported.options, origin)


def _load_run(
    directory: RunDirectory,
    *,
    checkpoint: int | Literal["best"] | None,
    seed: int | None,
    env: Callable[..., Any] | None,
    network: Network | None,
    trust: bool,
) -> Policy:
    config = directory.config
    checkpoint, seed = check_checkpoint(checkpoint), to_plain(int | None, seed, "seed")
    index = 0 if seed is None else seed - config.seed
    if seed is not None:
        check_seed(config, seed)
    if config.has_seed_processes:
        directory = open_seed(directory, seed)
    kind: type[BestCheckpoint] | type[Checkpoints] = BestCheckpoint if checkpoint == "best" else Checkpoints
    with kind(directory.checkpoints_path, run_id=directory.run_id) as checkpoints:
        number = checkpoint if isinstance(checkpoint, int) else checkpoints.latest()
        if isinstance(checkpoints, BestCheckpoint):
            number = checkpoints.check_exists()
        if number is None:  # what needs trust is told first
            check_trusted(config.env, directory.path, trust=trust)
        check_parts_trusted({} if network else parts_of_policy(config.agent), directory.path, trust=trust)
        metadata = read_metadata(checkpoints, number, directory.config)
        check_network_is_given(network is not None, metadata["has_own_network"])
        source = _environment_of(directory.config, directory.path, metadata.get("environment"), env, trust=trust)
        if network is None:
            check_reads_the_same(directory, _spec_of(source))
        used = _network_for(directory.config, source, network)
        params = checkpoints.restore_item("learner", env_steps=number)["params"]
    if directory.config.num_seeds > 1:
        params = jax.tree.map(lambda x: x[index], params)
    origin = Origin(
        config=config.of_seed(config.seed + index),
        env_steps=metadata["counters"]["env_steps"],
        trained_seed=config.seed + index if config.num_seeds > 1 else None,
        environment=metadata.get("environment") or _record_of(source),
        has_own_network=network is not None,
    )
    return Policy(
        source,
        masked(used, _spec_of(source)),
        _params_of(used, params, _rule_of_params(config, source, network)),
        params_label(origin.env_steps, origin.trained_seed),
        _evaluation_options(config, metadata),
        origin,
    )


def _network_for(config: TrainConfig, source: _Env, network: Network | None) -> Network:
    """Returns the network of a policy, after checking it and getting ready to compile it."""
    spec = _spec_of(source)
    used = make_network(spec, config.agent, network)
    limit_cpu_threads(check_network(used, spec, config.agent))
    enable_compilation_cache()
    return used


def _environment_of(
    config: TrainConfig,
    path: Path,
    record: dict[str, Any] | None,
    env: Callable[..., Any] | None,
    *,
    trust: bool,
) -> _Env:
    """Returns what is recorded of an environment, or the environment if the caller gives it or there is no record.

    Args:
      config: config of the run.
      path: the folder that names the environment.
      record: the record, if there is one.
      env: the function that makes the environment, if the caller gives it.
      trust: whether modules that only the folder names may be imported.

    Raises:
      ConfigError: if the environment can't be made, has changed, or is in a module that isn't trusted.
    """
    if env is not None:
        remember_factory(config.env, env)

    def make() -> InGraphEnv | HostEnv:
        check_trusted(config.env, path, trust=trust)
        return make_env(config.env, **config.env_options)

    if record is None:
        return make()
    recorded = RecordedEnv(config.env, record, make)
    return recorded if env is None else recorded.make()


def _spec_of(source: _Env) -> EnvSpec:
    return source.interface.spec if isinstance(source, RecordedEnv) else source.spec


def _record_of(source: _Env) -> dict[str, Any] | None:
    return None if isinstance(source, RecordedEnv) else record_of(source)


def _evaluation_options(config: TrainConfig, metadata: dict[str, Any]) -> EvaluationOptions:
    """Returns how a run evaluated itself when it saved a checkpoint with this metadata."""
    limit = config.eval_max_episode_steps
    if limit is None:
        limit = metadata.get("evaluation_rounds", {}).get("newest", {}).get("eval_episode_limit")
    return EvaluationOptions(
        exploration=config.eval_exploration,
        max_episode_steps=limit,
        num_env_workers=config.topology.lane_options.num_env_workers,
        step_timeout_seconds=config.topology.lane_options.step_timeout_seconds,
    )


def _rule_of_params(config: TrainConfig, source: _Env, network: Network | None) -> str:
    """Returns the rule that is broken if the parameters in a checkpoint don't fit the network."""
    if network is not None:
        return "`network` must be the one that the run was trained with"
    spec = _spec_of(source)
    sizes = f"observations {list(spec.agent_observation_shape)} and {spec.num_actions} actions"
    if isinstance(source, RecordedEnv):
        return f"a checkpoint must hold the network for the environment that it records, which has {sizes}"
    return f"the environment {config.env} must be as it was in training; it has {sizes} now"


def _params_of(network: Network, stored: Any, rule: str) -> Params:
    """Returns a checkpoint's parameters, which are nested dictionaries, in the structure of `network`'s parameters.

    Raises:
      ConfigError: if they don't fit. The message begins with the rule that the user has broken.
    """

    def find(path: tuple, wanted: jax.ShapeDtypeStruct) -> Any:
        names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        leaf = functools.reduce(lambda node, name: node.get(name, {}) if isinstance(node, dict) else {}, names, stored)
        if getattr(leaf, "shape", None) != wanted.shape:
            got = "none" if not hasattr(leaf, "shape") else f"{list(leaf.shape)}"
            raise ConfigError(
                f"{rule}: params/{'/'.join(names)} should have shape {list(wanted.shape)}, and the checkpoint has "
                f"{got}; give what the run was trained with, or train anew"
            )
        return leaf

    return jax.tree.map_with_path(find, jax.eval_shape(network.init, key_shape()))
