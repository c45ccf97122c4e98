"""Functions that train, and that use what a run leaves: `train`, `iterate`, `resume`, `load`, `watch`."""

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qfleet.config import ConfigError, TopologyConfig, TrainConfig
from qfleet.config.checks import check_checkpoint
from qfleet.config.new_run import check_new_run
from qfleet.config.values import show
from qfleet.core.types import Network
from qfleet.envs.factory import name_of_factory, remember_factory
from qfleet.runtime.devices import clear_platform_errors
from qfleet.runtime.notebook import shown_while_starting
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.signals import StopFlag
from qfleet.training.assembly import check_is_built_in
from qfleet.training.callbacks import check_observers
from qfleet.training.resuming import (
    check_address_trusted,
    check_run_trusted,
    check_same_place_for_seeds,
    config_to_resume,
)
from qfleet.training.seed_places import check_num_at_once

if TYPE_CHECKING:
    import optax

    from qfleet.policy import Policy
    from qfleet.runtime.loggers import Logger
    from qfleet.runtime.video import Video
    from qfleet.training.launched import LaunchedRun
    from qfleet.training.run import Run
    from qfleet.training.seeds import SeedsRun

# What trains and what plays is imported only where it is used, because no command needs both.


def train(
    config: TrainConfig,
    *,
    env: Callable[..., Any] | None = None,
    network: Network | None = None,
    optimiser: "optax.GradientTransformation | None" = None,
    callbacks: Sequence[Any] = (),
    loggers: "Sequence[str | Logger]" = (),
    num_seeds_at_once: int | None = None,
) -> dict[str, Any]:
    """Trains until the run ends as `config` says, and returns the content of summary.json.

    Args:
      config: what to learn, where to run it, and when to stop; `qfleet.make_config` makes one from a preset.
      env: a function or class that makes the environment, in place of the one that `config` names: a new
        `gymnasium.Env` each time, an `InGraphEnv` or a `HostEnv`. `make_config` takes it too. In another process,
        `load`, `resume` and `watch` then need it as well.
      network: replaces the network that `config.agent` describes. Any pair of functions, or a Flax NNX module converted
        by `qfleet.from_nnx`. `load` and `resume` then need it too.
      optimiser: replaces the optimiser that `config.agent` names. `resume` then needs it too.
      callbacks: objects with any of the methods `on_progress`, `on_evaluation`, `on_checkpoint` and `on_end`, which are
        told how the run goes and may stop it, evaluate, save, or change the exploration and other settings by the
        `RunControl` that they get. If one raises, the run ends as if the loop over it had: saved, and "failed".
      loggers: where the numbers of metrics.jsonl go, too: "wandb", "mlflow", or objects with the methods of `Logger`.
        If one fails, that costs a warning. Like callbacks, they aren't part of the config: `resume` needs them again.
      num_seeds_at_once: how many seeds are trained at the same time, if each has a process of its own
        (`config.has_seed_processes`). By default as many as the cores, the memory and the GPUs of this machine allow.

    Raises:
      ConfigError: on bad input, before any work starts.
      RunFailed: if the run can't go on; its checkpoints are kept, and what is sound has been saved.
      KeyboardInterrupt: after a signal (INT, TERM or HUP) has stopped the run, once its checkpoint is written. So a
        loop over several runs ends too.
    """
    with StopFlag() as stop:
        run = iterate(
            config,
            env=env,
            network=network,
            optimiser=optimiser,
            callbacks=callbacks,
            loggers=loggers,
            num_seeds_at_once=num_seeds_at_once,
        )
        for _ in run:
            pass
        if stop.requested:
            path = shlex.quote(str(run.directory.path))
            raise KeyboardInterrupt(f"a signal has stopped the run; `qfleet resume {path}` goes on")
    return run.summary


@clear_platform_errors()
@shown_while_starting()
def iterate(
    config: TrainConfig,
    *,
    env: Callable[..., Any] | None = None,
    network: Network | None = None,
    optimiser: "optax.GradientTransformation | None" = None,
    callbacks: Sequence[Any] = (),
    loggers: "Sequence[str | Logger]" = (),
    num_seeds_at_once: int | None = None,
) -> "Run | LaunchedRun | SeedsRun":
    """Returns a run to iterate over. Each item is the `Progress` of one chunk; leaving the loop stops the run cleanly.

    A signal (INT, TERM or HUP) ends the loop as if the run were over, and the summary says "interrupted". So it does if
    you leave the loop. If an exception leaves it, the run is saved too, and the summary says "failed", and where.

    Args and Raises: as for `train`.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"`config` must be a TrainConfig, got {show(config)}; make one, as in "
            f"qfleet.train(qfleet.make_config('CartPole-v1'))"
        )
    if env is not None:
        config = dataclasses.replace(config, env=name_of_factory(env))
    check_new_run(config)
    config = config.with_schedule_lengths()
    base = Path.cwd()  # now, because an environment may change the current folder once it is made
    create = functools.partial(RunDirectory.create, config.run_dir, config, base)
    check_is_built_in(config, network, optimiser)
    observers = check_observers(callbacks, loggers)
    num_seeds_at_once = check_num_at_once(config, num_seeds_at_once)
    if config.has_seed_processes:
        from qfleet.training.seeds import SeedsRun

        return SeedsRun(config, create, num_at_once=num_seeds_at_once, **observers)
    if config.topology.runs_in == "joined processes":
        from qfleet.training.launched import LaunchedRun, directory_of_all

        return LaunchedRun(config, lambda: directory_of_all(config, base), **observers)
    from qfleet.training.run import Run

    return Run(config, create, network, optimiser, **observers)


@clear_platform_errors()
@shown_while_starting()
def resume(
    run_dir: str | os.PathLike[str],
    *,
    env_steps: int | None = None,
    stop_return: float | Literal["none"] | None = None,
    checkpoint: int | Literal["best"] | None = None,
    topology: TopologyConfig | None = None,
    num_processes: int | None = None,
    coordinator: str | None = None,
    process_id: int | None = None,
    ray_address: str | None = None,
    env: Callable[..., Any] | None = None,
    network: Network | None = None,
    optimiser: "optax.GradientTransformation | None" = None,
    callbacks: Sequence[Any] = (),
    loggers: "Sequence[str | Logger]" = (),
    trust: bool = False,
    num_seeds_at_once: int | None = None,
) -> "Run | LaunchedRun | SeedsRun":
    """Returns the run in `run_dir`, to iterate over from its newest checkpoint as if it had never stopped.

    Args:
      run_dir: a run's folder. If it has no checkpoint yet, the run starts from the beginning.
      env_steps: environment step at which the run ends, instead of the one in its config.
      stop_return: return at which the run ends, instead of the one in its config; "none" for no such return. A run that
        has reached its return already goes on to `env_steps`.
      checkpoint: environment step of the checkpoint to continue from, instead of the newest. Newer ones are set aside,
        by renaming. "best" is that of the best evaluation. It holds the learner alone, so the run warms up again.
      topology: where the run continues, if that is another topology or another size. Its lanes begin new episodes, and
        the replay is divided anew over them. So a run that began on a laptop can continue as a fleet, or the other way
        round. The run's folder keeps the config that the run began with, so give this argument each time.
      num_processes: number of processes that an all-reduce or gossip run continues with. This argument and the next
        three default to what the run began with.
      coordinator: HOST:PORT of the first process of an all-reduce run, to start each by hand; `local` starts all here.
      process_id: number of the process to start here, if each is started by hand. Start the others with otherwise the
        same arguments. Only the first one locks the folder, sets checkpoints aside, and returns progress.
      ray_address: address of the Ray cluster that the processes run on.
      env: the function that made the environment, if the run began with one.
      network: the network that `train` was given, if any.
      optimiser: the optimiser that `train` was given, if any.
      callbacks, loggers: as for `train`.
      trust: whether to run modules, of the environment or of parts of the agent (`MODULE:NAME`), that only the run's
        folder names. It isn't asked for if an environment's module has been imported, or a part used, already.
      num_seeds_at_once: as for `train`. Of a run whose seeds have processes of their own, only those seeds go on that
        have not come to their end.

    Raises:
      ConfigError: if `run_dir` isn't a run or names a module that isn't trusted, its checkpoint is damaged, its
        environment has changed, the run has ended already, or another process is training it. Also if an earlier
        version of qfleet began it, whose networks read such observations otherwise.
    """
    observers = check_observers(callbacks, loggers)
    directory = RunDirectory.open(run_dir)
    checkpoint = check_checkpoint(checkpoint)
    if env is not None:
        remember_factory(directory.config.env, env)
    check_run_trusted(directory, trust=trust)
    config = config_to_resume(
        directory.config,
        env_steps=env_steps,
        stop_return=stop_return,
        topology=topology,
        num_processes=num_processes,
        coordinator=coordinator,
        process_id=process_id,
        ray_address=ray_address,
    )
    check_address_trusted(directory, config, ray_address, trust=trust)
    check_is_built_in(config, network, optimiser)
    num_seeds_at_once = check_num_at_once(config, num_seeds_at_once)
    check_same_place_for_seeds(directory.config, config, checkpoint)
    if config.has_seed_processes:
        from qfleet.training.seeds import SeedsRun

        return SeedsRun(config, lambda: directory, is_resumed=True, num_at_once=num_seeds_at_once, **observers)
    if config.topology.runs_in == "joined processes":
        from qfleet.training.launched import LaunchedRun

        return LaunchedRun(config, lambda: directory, is_resumed=True, checkpoint=checkpoint, **observers)
    from qfleet.training.run import Run

    return Run(config, lambda: directory, network, optimiser, is_resumed=True, checkpoint=checkpoint, **observers)


@clear_platform_errors()
def load(
    run_dir: str | os.PathLike[str],
    *,
    checkpoint: int | Literal["best"] | None = None,
    seed: int | None = None,
    env: Callable[..., Any] | None = None,
    network: Network | None = None,
    trust: bool = False,
) -> "Policy":
    """Returns the greedy policy of a run, or of a folder that `Policy.export` or `qfleet export` has written.

    Acting and Q-values need only what the checkpoint records of the environment, so the environment isn't made, nor its
    module imported, until it is needed: to evaluate or to film. It is made at once if `env` is given, or if the
    checkpoint is of an older version, which recorded nothing.

    Args:
      run_dir: a run's folder, or that of a policy exported as safetensors, which is one checkpoint of one seed. Or an
        agent that comes with qfleet, as "zoo:cartpole".
      checkpoint: environment step of the checkpoint to load, or "best" for that of the best evaluation. The default is
        the newest one.
      seed: seed to load, of a run with several seeds. The default is the first one.
      env: the function that made the environment, if the run began with one.
      network: the network that `train` was given, if any.
      trust: as for `resume`.

    Raises:
      ConfigError: if `run_dir` isn't a run, or its checkpoint is missing or damaged. Also if an earlier version of
        qfleet began it, whose networks read such observations otherwise. The policy raises it once it makes the
        environment, if that has changed or is in a module that isn't trusted.
    """
    from qfleet.loading import load_policy

    return load_policy(run_dir, checkpoint=checkpoint, seed=seed, env=env, network=network, trust=trust)


def watch(
    run_dir: str | os.PathLike[str],
    *,
    num_episodes: int = 1,
    checkpoint: int | Literal["best"] | None = None,
    train_seed: int | None = None,
    seed: int = 0,
    out_dir: str | os.PathLike[str] | None = None,
    frames_per_second: int = 30,
    env: Callable[..., Any] | None = None,
    network: Network | None = None,
    trust: bool = False,
) -> "list[Video]":
    """Writes videos of what a run has learned, and returns their files with the returns of the episodes.

    Args:
      run_dir, checkpoint, env, network, trust: as for `load`.
      train_seed: seed to watch, of a run with several seeds. The default is the first one.
      out_dir: folder for the videos. The default is `videos` in the folder of the run or the exported policy, or in
        zoo/NAME for an agent of the zoo.
      num_episodes, seed, frames_per_second: as for `Policy.film`.

    Raises:
      ConfigError, RunFailed: under the same conditions as `load` and `Policy.film`.
    """
    from qfleet.loading import videos_folder

    policy = load(run_dir, checkpoint=checkpoint, seed=train_seed, env=env, network=network, trust=trust)
    out_dir = videos_folder(run_dir) if out_dir is None else out_dir
    return list(policy.film(out_dir, num_episodes, seed, frames_per_second))
