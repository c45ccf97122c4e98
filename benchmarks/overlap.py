"""How much of the environments' time is hidden behind learning: wall time over the time of the slower of the two.

    python benchmarks/overlap.py

The learner steps of a row are timed first, and the environments then sleep for as long as they take. If nothing were
hidden, the ratio would be 2. It is about that in lock step, which is shown beside it.
"""

import time
from typing import Any

import common
import numpy as np

from qfleet.config import AgentConfig, OverlappedConfig, TrainConfig
from qfleet.core.types import EnvSpec
from qfleet.envs.host import HostEnv, HostLanes, HostStep, LaneOptions
from qfleet.networks import make_network
from qfleet.topologies.overlapped.topology import Overlapped

NUM_ENVS, TIMED = 8, 8 * 16 * 12
SPEC = EnvSpec(name="sleep", observation_shape=(32,), observation_dtype=np.dtype(np.float32), num_actions=4)
AGENT = AgentConfig(
    hidden_sizes=(512, 512),
    batch_size=256,
    env_steps_per_learner_step=4.0,
    warmup_env_steps=1_000,
    replay_capacity=50_000,
)


class SleepingLanes:
    """Lanes with random observations, in which each step of all lanes takes `step_seconds`."""

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self._rng = np.random.default_rng(0)
        self._nobody = np.zeros(NUM_ENVS, bool)

    def reset(self, seed: int) -> np.ndarray:
        """Starts all lanes."""
        return self._rng.random((NUM_ENVS, 32), np.float32)

    def send(self, action: np.ndarray) -> None:
        """Begins a step."""
        self._due = time.perf_counter() + self.step_seconds

    def recv(self) -> HostStep:
        """Sleeps until the step is over."""
        time.sleep(max(0.0, self._due - time.perf_counter()))
        reward = np.ones(NUM_ENVS, np.float32)
        return HostStep(self._rng.random((NUM_ENVS, 32), np.float32), reward, *(self._nobody,) * 3)

    def close(self) -> None:
        """Does nothing, because nothing needs to be closed."""


def main() -> None:
    """Prints the table."""
    learning = seconds_per_row(0.0, lock_step=True)
    results: list[dict[str, Any]] = []
    for lock_step in (True, False):
        whole = seconds_per_row(learning, lock_step)
        name = "lock step" if lock_step else "overlapped"
        row = {"mode": name, "slower_ms": 1e3 * learning, "row_ms": 1e3 * whole, "ratio": whole / learning}
        results.append(row)
    common.report("overlap", results)


def seconds_per_row(step_seconds: float, lock_step: bool) -> float:
    """Returns the wall time of a row of all lanes, once the learner learns."""
    lanes = SleepingLanes(0.0)

    def make_lanes(num_lanes: int, options: LaneOptions) -> HostLanes:
        return lanes

    topology = OverlappedConfig(num_envs=NUM_ENVS, lock_step=lock_step)
    config = TrainConfig(env="sleep", agent=AGENT, topology=topology)
    overlapped = Overlapped(config, HostEnv(SPEC, make_lanes, make_lanes), make_network(SPEC, AGENT))
    overlapped.start()
    while overlapped.env_steps < 2_000:
        overlapped.advance(2_000)
    lanes.step_seconds = step_seconds
    started, before = time.perf_counter(), overlapped.env_steps
    while overlapped.env_steps < before + TIMED:
        overlapped.advance(before + TIMED)
    return (time.perf_counter() - started) * NUM_ENVS / (overlapped.env_steps - before)


if __name__ == "__main__":
    main()
