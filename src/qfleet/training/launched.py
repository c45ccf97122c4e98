"""An all-reduce run, as seen by the process that launches the processes which train."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from qfleet.config import AllReduceConfig, ConfigError, TrainConfig
from qfleet.config.encoding import encode_topology
from qfleet.core.learner import make_optimiser
from qfleet.envs.first_step import check_works
from qfleet.envs.host import HostEnv
from qfleet.envs.recorded import check_as_recorded
from qfleet.envs.registry import backend_of, make_env
from qfleet.networks import check_network, check_own_parts, make_network
from qfleet.runtime.activity import announce
from qfleet.runtime.best_checkpoint import BestCheckpoint
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.devices import check_platforms_of_children
from qfleet.runtime.loggers import Logger
from qfleet.runtime.records import Progress, progress_from
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.signals import StopFlag
from qfleet.topologies.all_reduce.launcher import Launcher, check_places
from qfleet.topologies.all_reduce.processes import JoinInfo
from qfleet.training.callbacks import CallbackFailed
from qfleet.training.leaving import failure_of_loop
from qfleet.training.metadata import read_metadata
from qfleet.training.observers import Observers
from qfleet.training.outcome import Evaluations
from qfleet.training.resuming import check_goes_on, check_reads_the_same
from qfleet.training.shown import ShownRun


class LaunchedRun(ShownRun):
    """An all-reduce run under way, in processes of its own. Iterate over it as over a `Run`."""

    def __init__(
        self,
        config: TrainConfig,
        open_directory: Callable[[], RunDirectory],
        *,
        is_resumed: bool = False,
        checkpoint: int | Literal["best"] | None = None,
        callbacks: Sequence[Any] = (),
        loggers: Sequence[tuple[str, Logger]] = (),
    ) -> None:
        self._topology = config.topology_as(AllReduceConfig)
        self._began = time.monotonic()
        # Mistakes are found here, once, before the folder is touched. This process uses no device.
        check_places(self._topology)
        if self._topology.ray_address is None:
            check_platforms_of_children()
        env = make_env(config.env, **config.env_options)
        check_own_parts(env.spec, config.agent, computes=False)
        check_network(make_network(env.spec, config.agent), env.spec, config.agent)
        make_optimiser(config.agent)
        if isinstance(env, HostEnv):
            check_works(env, self._topology.lane_options)
        self.config = config
        self.backend = backend_of(config.env)
        """Backend that makes the environments, as named by `backend_of`."""
        self.directory = open_directory()
        """Folder of the run, which all its processes write to."""
        self._checkpoints = Checkpoints(
            self.directory.checkpoints_path, keep=config.checkpoints_kept, run_id=self.directory.run_id
        )
        best = BestCheckpoint(self.directory.checkpoints_path, run_id=self.directory.run_id)
        if is_resumed and (checkpoint is not None or self._checkpoints.latest() is not None):
            source, number = (best, None) if checkpoint == "best" else (self._checkpoints, checkpoint)
            metadata = read_metadata(source, number, config)
            check_as_recorded(env, metadata.get("environment"), config.env)
            check_reads_the_same(self.directory, env.spec)
            check_goes_on(metadata, config)
        self._lock = self.directory.lock() if self._topology.process_id in (None, 0) else None
        if is_resumed and checkpoint is not None and self._lock:
            number = best.promote() if checkpoint == "best" else checkpoint
            self._checkpoints.set_aside_after(number)
            best.set_aside_after(number)
        resumed_at = self._checkpoints.latest() or 0 if is_resumed else None
        self._observers = Observers(config, self.directory, callbacks, loggers, resumed_at)
        self.summary: dict[str, Any] = {}
        """Content of summary.json, once the run is over."""

    def __iter__(self) -> Iterator[Progress]:
        """Yields the progress of the first process, which stands for all; nothing if it runs on another host."""
        return self._shown(self._follow)

    def _follow(self) -> Generator[Progress, None, None]:
        launcher = Launcher(self._topology, self._command, self.directory.folder / "peers")
        before = self.directory.read_summary()
        announce("starting processes")
        failure: dict[str, Any] = {}
        try:
            with StopFlag() as stop:
                with (
                    contextlib.suppress(KeyboardInterrupt),  # a request to stop, while Ray starts the processes
                    # Whatever ends the loop, the processes are stopped before the summary that they write is read.
                    contextlib.closing(launcher.run(lambda: self._checkpoints.latest() or 0)) as messages,
                ):
                    for message in messages:
                        progress = progress_from(message)
                        try:
                            self._observers.tell(progress, self._checkpoints)
                            yield progress
                        except GeneratorExit:  # the caller has left the loop, and the processes are now stopped
                            if not stop.requested and (error := failure_of_loop()):
                                failure = {"stopped": "failed", "error": error}
                            raise
                        except CallbackFailed as error:
                            failure = self._observers.outcome(str(error))
                            raise
                        if failure := self._observers.outcome(""):
                            break
                is_unsaid = self.directory.read_summary() == before  # stopped while its processes (re)started
                if stop.requested and self._lock and is_unsaid and self._topology.coordinator is None:
                    now = {"stopped": "interrupted", "env_steps": self._checkpoints.latest() or 0}
                    self.directory.write_summary({**(before or self._summary_of_nothing()), **now})
        finally:
            try:
                self.summary = self.directory.read_summary() or {}
                if self._lock and self.summary:
                    self.summary["num_restarts"] = launcher.machine.num_restarts
                    self.summary["env_steps_repeated"] = launcher.machine.env_steps_repeated
                    if self.summary.get("stopped") == "interrupted":
                        self.summary |= failure
                    self.directory.write_summary(self.summary)
                self._observers.end(self.summary, self._checkpoints)
            finally:
                if self._lock:
                    self._lock.release()

    def _summary_of_nothing(self) -> dict[str, Any]:
        """Returns the summary of a run that was stopped before its processes had trained."""
        config, seconds = self.config, time.monotonic() - self._began
        names = ("env_steps", "learner_steps", "num_episodes", "num_env_failures", "num_videos", "num_video_failures")
        return {
            "env": config.env,
            "backend": self.backend,
            "preset": config.preset,
            "topology": config.topology.name,
            "seed": config.seed,
            "num_seeds": config.num_seeds,
            **dict.fromkeys(names, 0),
            "solved_at_env_steps": [None] * config.num_seeds,
            "wall_seconds": seconds,
            "time_shares": None,
            "eval_return_mean": None,
            "eval_returns": None,
            **Evaluations().summary(),
            "best_checkpoint": None,
            "newest_checkpoint": None,
            "warnings": [],
            "version": self.directory.version,
        }

    def _command(self, peer: JoinInfo) -> list[str]:
        topology = self._topology
        # A launcher of all processes notices a silent one by itself, and sooner than JAX. If there are several
        # launchers, JAX tells the other processes.
        times = 3 if topology.coordinator is None else 1
        arguments = {
            "process-id": peer.number,
            "topology": json.dumps(encode_topology(topology)),
            "coordinator": peer.coordinator,
            "timeout-seconds": times * topology.silence_seconds,
            "report-descriptor": peer.report_descriptor,
            "env-steps": self.config.env_steps,
            "stop-return": json.dumps(self.config.stop_return),
        }
        flags = [f"--{name}={value}" for name, value in arguments.items()]
        return [peer.python, "-P", "-m", "qfleet.cli.peer", str(self.directory.folder), *flags]


def directory_of_all(config: TrainConfig, base: Path) -> RunDirectory:
    """Makes the run's folder, or waits until the launcher of the first process, on another host, has made it.

    Args:
      config: the run's config.
      base: what a relative `config.run_dir` begins from.

    Raises:
      ConfigError: if the folder can't be made, doesn't appear in time, or belongs to a run with other settings.
    """
    topology = config.topology_as(AllReduceConfig)
    if topology.coordinator is not None and config.run_dir is None:
        raise ConfigError(
            f"processes started by hand must share a folder, got none with coordinator {topology.coordinator}; "
            f"give all of them the same --run-dir, on a file system that they share"
        )
    if topology.process_id in (None, 0):
        return RunDirectory.create(config.run_dir, config, base)
    assert config.run_dir is not None
    deadline = time.monotonic() + topology.silence_seconds
    while not (base / config.run_dir / "config.json").exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"the first process must make the run's folder, but {config.run_dir} has not appeared for "
                f"{topology.silence_seconds:g} s; start it with --process-id 0, and make sure that all share the folder"
            )
        time.sleep(0.1)
    directory = RunDirectory.open(base / config.run_dir)
    firsts = directory.config.topology
    mine, wanted = (dataclasses.replace(each, run_dir=None, topology=topology) for each in (config, directory.config))
    if mine != wanted or firsts != dataclasses.replace(topology, process_id=0):
        raise ConfigError(
            f"all processes must be started with the same settings, got {config} here and {directory.config} for the "
            f"first process"
        )
    return directory
