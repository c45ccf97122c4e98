"""The parameter server: how many gradients it applies, how soon CartPole is solved, and how much memory it takes.

python benchmarks/parameter_server.py throughput  gradients of the Nature network, from workers that compute nothing
python benchmarks/parameter_server.py cartpole    five seeds, until a mean greedy return of 475
python benchmarks/parameter_server.py soak        the memory of every process and of the object store

`benchmarks/fleet_faults.py --topology parameter-server` measures which faults it survives.
"""

import argparse
import collections
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import fleet_limits
import jax.numpy as jnp
import numpy as np

import qfleet
from qfleet.config import ParameterServerConfig
from qfleet.topologies.fleet.actor import ChunkStats
from qfleet.topologies.fleet.messages import ProcessId
from qfleet.topologies.fleet.replay_shard import ShardStats
from qfleet.topologies.parameter_server import director as director_module
from qfleet.topologies.parameter_server.remote import RemoteWorker, gradient_answer
from qfleet.topologies.parameter_server.requests import ActAnswer, GradientAnswer, Pull
from qfleet.topologies.parameter_server.worker import GradientReply, GradientStats

CHUNK = ChunkStats([], [], 0.0, 0, 0.0, 0)


class StubWorker(RemoteWorker):
    """A worker that returns the same gradient again and again, but pulls parameters as others do."""

    def __init__(self, variables: Any, config: qfleet.TrainConfig, number: int) -> None:
        """Makes the gradient."""
        super().__init__(variables, config, number)
        dtype = jnp.dtype(config.topology_as(ParameterServerConfig).gradient_dtype)
        self._pulls: collections.deque[float] = collections.deque(maxlen=1000)
        self._pieces = [np.full(end - start, 1e-3, dtype) for start, end in self._worker._learner.piece_bounds]

    def act(self, pull: Pull, exploration: float) -> ActAnswer:
        """Returns a chunk that took no time."""
        self._pull(pull)
        return ActAnswer(CHUNK, ShardStats(1.0, 10**6, 0.0), None)

    def compute_gradient(self, pull: Pull, importance_exponent: float) -> GradientAnswer:
        """Returns a gradient that took no time."""
        self._pull(pull)
        return gradient_answer(GradientReply(GradientStats(1.0, 1.0, 1.0, 0.0), self._pieces, []))

    def _pull(self, pull: Pull) -> None:
        """Notes how many seconds it takes until the parameters can be used."""
        is_new, started = pull.version != self._worker.version, time.perf_counter()
        super()._pull(pull)
        if is_new:
            self._pulls.append(time.perf_counter() - started)

    def pull_seconds(self) -> float:
        """Returns the median of the seconds that `_pull` has noted."""
        return statistics.median(self._pulls)


def main() -> None:
    """Runs the measurement that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("throughput", "cartpole", "soak"))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--shards", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.part == "throughput":
        rows = [throughput(arguments, dtype) for dtype in ("float32", "bfloat16")]
        common.report("parameter server throughput", rows)
    elif arguments.part == "cartpole":
        common.report("parameter server cartpole", list(cartpole(arguments.seeds, arguments.workers)))
    else:
        config = qfleet.make_config(
            "CartPole-v1", "rainbow_lite", "parameter-server", num_workers=arguments.workers,
            num_server_shards=arguments.shards, env_steps=10**9,
        )  # fmt: skip
        common.report(
            "parameter server soak", list(fleet_limits.growth(fleet_limits.topology_of(config), arguments.seconds))
        )


def throughput(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Returns how many gradients of 1.7 million parameters the server applies per second, and how long a pull takes."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    setattr(director_module, "RemoteWorker", StubWorker)  # noqa: B010, the module imports this name from another
    config = qfleet.make_config(
        "ale:Pong", "atari_dqn", "parameter-server", num_workers=arguments.workers, num_server_shards=arguments.shards,
        lanes_per_worker=1, rows_per_chunk=1, env_steps=10**6, warmup_env_steps=1, env_steps_per_learner_step=1e-3,
        replay_capacity=1000, gradient_dtype=dtype, max_loss_deviations=None,
    )  # fmt: skip
    server = fleet_limits.topology_of(config)
    try:
        server.start()
        director = server._director
        director.machine.is_warm = lambda worker: True  # the workers' replays stay empty
        director.machine.actors.env_steps = config.env_steps  # so that no worker is asked to act
        fleet_limits.run_for(server, 5.0)
        taken = [server.advance(10**9) for _ in range(round(arguments.seconds / 0.5))]
        seconds = sum(progress.train_seconds for progress in taken)
        staleness = statistics.mean(progress.staleness for progress in taken)
        director.quiesce()
        pull = director._answer_of(director._processes[ProcessId("worker", 0)], StubWorker.pull_seconds)
    finally:
        server.close()
    return {
        "workers": arguments.workers,
        "shards": arguments.shards,
        "dtype": dtype,
        "megabytes": 4 * server._learner.num_params / 1e6,
        "gradients_per_second": sum(progress.new_learner_steps for progress in taken) / seconds,
        "staleness": staleness,
        "pull_milliseconds": 1000 * pull,
    }


def cartpole(num_seeds: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """Yields how soon each seed solves CartPole."""
    for seed in range(num_seeds):
        with common.scratch() as folder:
            flags = ("--preset", "rainbow_lite", "--topology", "parameter-server", "--num-workers", str(num_workers),
                     "--stop-return", "475", "--env-steps", "300000", "--seed", str(seed))  # fmt: skip
            summary = common.train(Path(folder) / "run", "CartPole-v1", *flags)
        yield {
            "seed": seed,
            "stopped": summary["stopped"],
            "env_steps": summary["env_steps"],
            "learner_steps": summary["learner_steps"],
            "wall_seconds": summary["wall_seconds"],
        }


if __name__ == "__main__":
    main()
