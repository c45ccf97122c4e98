"""What each process of an all-reduce run does."""

import dataclasses
import os

from qfleet.config import AllReduceConfig
from qfleet.runtime import peers
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.run_directory import RunDirectory
from qfleet.training.run import Run


def run_peer(
    run_dir: str | os.PathLike[str],
    *,
    topology: AllReduceConfig,
    process_id: int,
    coordinator: str,
    timeout_seconds: float,
    env_steps: int,
    stop_return: float | None,
    reporter: peers.Reporter,
) -> None:
    """Trains a run to its end as one of equal processes, which a launcher has started.

    Args:
      run_dir: the run's folder, which all processes share.
      topology: where the run continues, which may differ from where it began.
      process_id: number of this process, from 0.
      coordinator: HOST:PORT of the first process.
      timeout_seconds: silence after which JAX tells the other processes that one is lost.
      env_steps: environment step at which the run ends.
      stop_return: mean greedy return at which the run ends.
      reporter: where the first process reports its progress.

    Raises:
      ConfigError, RunFailed: as `train` does.
    """
    directory = RunDirectory.open(run_dir)
    config = dataclasses.replace(directory.config, env_steps=env_steps, stop_return=stop_return, topology=topology)
    peers.join(coordinator, topology.num_processes, process_id, topology.devices_per_process, timeout_seconds)
    if topology.num_processes > 1:
        # Each launcher has its own flags and, if a flag is wrong or the file system slow, its own view of the folder.
        newest = Checkpoints(directory.checkpoints_path, run_id=directory.run_id).latest()
        peers.check_agreed({"env_steps": config.env_steps, "newest checkpoint": newest or 0})
    run = Run(config, lambda: directory, None, None, is_resumed=True)
    for progress in run:
        if process_id == 0:
            reporter.tell("progress", **dataclasses.asdict(progress))
