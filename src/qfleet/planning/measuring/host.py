"""The parts of a run that steps environments outside the compiled program, in the order in which the run takes them.

The parts are timed where they stand in a row, because a part takes longer with the caches that another one has left.
"""

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qfleet.config import OverlappedConfig, TrainConfig
from qfleet.core.types import Network
from qfleet.envs.host import HostEnv
from qfleet.planning.costs import Cost, cost_of
from qfleet.planning.in_step import BESIDE_UPDATES
from qfleet.planning.measuring.timing import time_snapshots
from qfleet.runtime.host_acting import HostActing
from qfleet.runtime.workarounds.glibc_malloc import reuse_freed_memory
from qfleet.topologies.overlapped.programs import HostRow, RandomInputs
from qfleet.topologies.overlapped.programs_on_mesh import ProgramsOnMesh
from qfleet.topologies.overlapped.topology import RowsStats
from qfleet.topologies.schedule import Plan, make_plan, rows_per_iteration

_NUM_ITERATIONS = 15
"""Iterations that are timed, after one that isn't."""


def measure_host_parts(config: TrainConfig, env: HostEnv, network: Network) -> dict[str, Cost]:
    """Returns the costs of the parts of an overlapped run.

    They are `act` (choosing actions and bringing them here), `environment` (a step of all lanes), `draw` (the plan and
    the random numbers of an iteration), `insert` (storing a row, or keeping it for the rollout), `learn` (a learner
    step), `snapshot` (a copy of the parameters on the host), and with a replay `environment beside learning` (a step
    of all lanes, while a row is stored and `BESIDE_UPDATES` learner steps are taken).
    """
    if jax.default_backend() == "cpu":
        reuse_freed_memory()
    parts = _Parts(config, env, network)
    try:
        return parts.measure()
    finally:
        parts.close()


class _Times:
    """The times of parts, by name."""

    def __init__(self) -> None:
        self._work: dict[str, list[float]] = collections.defaultdict(list)
        self._wall: dict[str, list[float]] = collections.defaultdict(list)
        self.is_counting = False

    def of(self, name: str, part: Callable[[], Any]) -> Any:
        """Carries out a part, times it, and returns what it returns."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = part()
        if self.is_counting:
            self._wall[name].append(time.perf_counter() - wall)
            self._work[name].append(time.process_time() - cpu)
        return result

    def cost(self, name: str) -> Cost:
        """Returns the cost of a part."""
        return cost_of(self._work[name], self._wall[name], is_coupled=jax.process_count() > 1)


class _Parts:
    """The compiled programs of an overlapped run, its lanes, and the state that they work on."""

    def __init__(self, config: TrainConfig, env: HostEnv, network: Network) -> None:
        topology = config.topology_as(OverlappedConfig)
        self._config, self._num_envs = config.agent, topology.num_envs
        self._num_lanes = topology.num_envs // jax.process_count()
        self._on_mesh = ProgramsOnMesh(config, topology.mesh, env.spec, network, None)
        jitted = self._on_mesh.jitted()
        self._learner, self._replay, self._key = jitted.init(np.uint32(config.seed))
        self._lanes = env.make_lanes(self._num_lanes, topology.lane_options)
        self._acting = HostActing(self._lanes, config.seed, self._on_mesh.copy_to_devices)
        self._memory = self._on_mesh.blank_memory()
        number = np.zeros(self._num_lanes, np.float32)
        is_first, uniform = self._on_mesh.lanes_to_devices((self._acting.is_first, number))
        noise_key = self._key if self._on_mesh.agent.acts_with_keys else ()
        self._programs = self._on_mesh.compile(
            jitted, self._key,
            (self._learner.params, self._memory, self._acting.obs, is_first, np.float32(0), uniform, noise_key),
            self._on_mesh.learn_arguments(self._learner, self._replay, self._key, self._acting.obs, self._memory), None,
        )  # fmt: skip
        self._times, self._stats = _Times(), RowsStats()

    def close(self) -> None:
        """Ends the environments."""
        self._lanes.close()

    def measure(self) -> dict[str, Cost]:
        """Takes some iterations, and returns the costs of their parts."""
        iterate = self._with_replay if self._on_mesh.has_replay else self._with_rollout
        num_before = 1 + 2 * (self._config.rows_after_start + 2) // rows_per_iteration(self._config)
        for i in range(num_before + _NUM_ITERATIONS):
            self._times.is_counting = i >= num_before
            iterate(num_updates=0 if i < num_before or i % 3 == 0 else BESIDE_UPDATES, at_once=i % 3 == 2)
        cost, names = self._times.cost, ("act", "environment", "draw", "insert")
        found = {name: cost(name) for name in (*names, *(["environment beside learning"] * self._on_mesh.has_replay))}
        return {**found, "learn": self._learn_cost(found["insert"]), "snapshot": time_snapshots(self._learner.params)}

    def _learn_cost(self, insert: Cost) -> Cost:
        if not self._on_mesh.has_replay:
            num_steps = self._config.num_epochs * self._config.num_minibatches
            return self._times.cost("learn from rollout").times(1 / num_steps)
        both = self._times.cost("insert and learn")
        return Cost(
            max(1e-7, both.cpu_seconds - insert.cpu_seconds) / BESIDE_UPDATES,
            both.width,
            max(0.0, both.wait_seconds - insert.wait_seconds) / BESIDE_UPDATES,
        )

    # --- One iteration, as `Overlapped` takes it ---

    def _draw(self) -> tuple[Plan, np.ndarray, list[Any], RandomInputs]:
        plan = make_plan(self._config, self._num_envs, 1, 10**6, 0)
        self._key, inputs = self._programs.draw(self._key)
        uniforms = self._on_mesh.copy_to_host(inputs.uniforms)[:, : self._num_lanes]
        return plan, uniforms, list(inputs.noise_keys) or [()] * len(uniforms), inputs

    def _act(self, exploration: Any, uniform: Any, noise_key: Any) -> tuple[Any, Any, Any]:
        is_first, uniform = self._on_mesh.lanes_to_devices((self._acting.is_first, uniform))
        self._memory, action, q_max, carry = self._programs.act(
            self._learner.params, self._memory, self._acting.obs, is_first, exploration, uniform, noise_key
        )
        return self._on_mesh.copy_to_host(action), q_max, carry

    def _step(self, action: Any, q_max: Any, carry: Any, beside: Callable[[], None] = lambda: None) -> HostRow:
        obs = self._acting.obs
        self._acting.send(action)
        beside()
        received = self._acting.receive()
        self._stats.add(received, self._on_mesh.copy_to_host(q_max), 0)
        return HostRow(
            obs, action, received.reward, received.terminated, received.truncated, received.no_step, carry=carry
        )

    def _with_replay(self, num_updates: int, *, at_once: bool) -> None:
        def draw() -> tuple:
            plan, uniforms, noise_keys, inputs = self._draw()
            return plan, uniforms, noise_keys, list(inputs.learn_keys)

        plan, uniforms, noise_keys, learn_keys = self._times.of("draw", draw)
        name = "insert and learn" if num_updates else "insert"
        row: HostRow | None = None
        for i in range(len(uniforms)):
            exploration, exponent = plan.exploration[0, i], plan.importance_exponent[0, i]
            acted = self._times.of("act", functools.partial(self._act, exploration, uniforms[i], noise_keys[i]))
            start = functools.partial(self._start_learning, learn_keys[i], exponent, num_updates)
            if at_once and row is not None:
                row = self._times.of("environment beside learning", functools.partial(self._both, row, start, acted))
                continue
            row = self._times.of("environment", functools.partial(self._step, *acted))
            if not at_once:
                self._times.of(name, functools.partial(_wait_for, start, row))

    def _start_learning(self, key: Any, exponent: Any, num_updates: int, row: HostRow) -> Any:
        """Starts to store a row and to learn, and returns what can be waited for."""
        from_host = self._on_mesh.lanes_to_devices(row._replace(obs=(), carry=()))
        row = from_host._replace(obs=row.obs, carry=row.carry)
        self._learner, self._replay, losses = self._programs.learn(
            self._learner, self._replay, row, key, exponent, np.int32(num_updates)
        )
        return self._replay, losses

    def _both(self, row: HostRow, start: Callable[[HostRow], Any], acted: tuple[Any, Any, Any]) -> HostRow:
        """Takes a step while the row before it is learned from, and waits for both."""
        learned = []
        following = self._step(*acted, beside=lambda: learned.append(start(row)))
        jax.block_until_ready(learned)
        return following

    def _with_rollout(self, num_updates: int, *, at_once: bool) -> None:
        plan, uniforms, noise_keys, inputs = self._times.of("draw", self._draw)
        rows, memories, q_maxes, carries = [], [], [], []
        for i in range(len(uniforms)):
            exploration = plan.exploration[0, i]
            acted = self._times.of("act", functools.partial(self._act, exploration, uniforms[i], noise_keys[i]))
            row = self._times.of("environment", functools.partial(self._step, *acted))

            def keep(row: HostRow = row, q_max: Any = acted[1]) -> None:
                carries.append(row.carry)
                rows.append(row._replace(obs=(), carry=()))
                memories.append(self._memory)
                q_maxes.append(q_max)

            self._times.of("insert", keep)

        def learn() -> None:
            stacked = self._on_mesh.rollout_to_devices(rows)
            is_first = self._on_mesh.lanes_to_devices(self._acting.is_first)
            rollout = (stacked, tuple(memories), tuple(q_maxes), carries[0], self._acting.obs, is_first)
            self._learner, losses = self._programs.learn(self._learner, *rollout, inputs.learn_keys)
            jax.block_until_ready((self._learner, losses))

        self._times.of("learn from rollout", learn)


def _wait_for(start: Callable[[HostRow], Any], row: HostRow) -> None:
    jax.block_until_ready(start(row))
