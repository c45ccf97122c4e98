"""The overlapped topology: environments outside the compiled program step while the learner learns.

Each row goes: act, let the environments step, store, learn. With replay, what a row brought is stored and learned from
while the environments take the next step; `lock_step` waits instead, and is deterministic if the environments are.
Without replay a rollout and learning from it take turns. `profile` is `lock_step` in parts, each of them timed.
"""

import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec

from qfleet.config import ConfigError, OverlappedConfig, TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.exploration import greedy
from qfleet.core.learner import LearnerState, make_learner
from qfleet.core.replay import Replay, ReplayState, SavedReplay, make_replay, partition, partition_saved
from qfleet.core.replicas import ALONE, Replicas
from qfleet.core.types import Network, Params, stored_spec
from qfleet.core.updates import Losses
from qfleet.envs.host import HostEnv, HostLanes, seed_of
from qfleet.runtime import peers
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.devices import reuse_freed_memory
from qfleet.runtime.evaluation import host_greedy_returns
from qfleet.runtime.records import Progress, mean
from qfleet.runtime.stopwatch import OTHER, Stopwatch
from qfleet.topologies.acting import Episodes
from qfleet.topologies.base import OwnLearner, check_loss, read_as
from qfleet.topologies.footprint import Footprint, batch_shapes, make_footprint
from qfleet.topologies.mesh import DATA_AXIS, REPLICATED, Placement
from qfleet.topologies.overlapped import profile as overlapped_profile
from qfleet.topologies.overlapped.programs import Draws, HostRow, Programs, make_programs
from qfleet.topologies.overlapped.tally import Tally
from qfleet.topologies.schedule import Plan, make_plan, rows_per_iteration
from qfleet.topologies.schedule import learner_steps as planned_learner_steps

CHUNK_SECONDS = 0.5
"""What a chunk should take at most, where one iteration is shorter: it is how long Ctrl-C waits."""

_TRAINING, _EVALUATION = 0, 1
"""What a seed's random numbers are for: evaluation must not see training's."""


class Overlapped(OwnLearner):
    """One learner, and environments that step while it learns; `advance` trains a chunk further."""

    def __init__(
        self,
        config: TrainConfig,
        env: HostEnv,
        network: Network,
        optimiser: optax.GradientTransformation | None = None,
    ) -> None:
        """Checks the sizes; `start` does the work.

        Raises:
          ConfigError: if the sizes in `config` don't fit each other, its optimiser isn't known, or it has many seeds.
        """
        if config.num_seeds > 1:
            raise ConfigError(
                f"num_seeds must be 1 with environments outside the compiled program, got num_seeds={config.num_seeds} "
                f"for {config.env}; start one run for each seed"
            )
        self._config, self._env, self._topology = config, env, config.topology_as(OverlappedConfig)
        self._agent = make_agent(network, config.agent)
        self._learner_functions = make_learner(self._agent, config.agent, optimiser)
        self._has_replay = config.agent.replay != "none"
        self._stored_spec = stored_spec(env.spec, network.to_storage_layout)
        self._placement = Placement(self._topology.mesh, network)
        self._num_lanes = self._topology.num_envs // jax.process_count()
        """Of this process."""
        self._replay_functions, self._programs = self._make_programs(self._placement.replicas)
        self._stopwatch = Stopwatch(overlapped_profile.parts_of(config.agent))
        self._to_host: Callable[[Any], Any] = self._placement.to_host
        self._all_to_host: Callable[[Any], Any] = jax.device_get
        self._to_device: Callable[[Any], Any] = self._copy_to_device
        self._options = self._topology.lane_options
        self.env_steps = 0
        """Taken so far, over all lanes."""
        self.learner_steps = 0
        """Taken so far."""
        self._replay_starts_at = 0  # environment steps when the replay was last empty
        self._seconds_per_iteration = CHUNK_SECONDS  # not known yet: the first chunk is one iteration
        self._lanes: Any = None
        self._eval_lanes: HostLanes | None = None
        self._pending: _Pending | None = None  # a row that is not stored and learned from yet
        self._losses: list[tuple[Losses, int]] = []  # and the learner steps they are of

    def start(self) -> float:
        """Starts the environments, compiles the programs, and returns the wall time that took, in seconds."""
        started = time.perf_counter()
        if jax.default_backend() == "cpu":
            reuse_freed_memory()
        programs = self._jitted()
        self._learner, self._replay, self._key = programs.init(np.uint32(self._config.seed))
        self._lanes = self._env.make_lanes(self._num_lanes, self._options)
        self._begin_episodes()
        with ThreadPoolExecutor() as pool:  # XLA compiles one program while Python traces the next
            if self._topology.profile:
                compiling = pool.submit(self._compile_learn_in_parts)
            else:
                learn = programs.learn.lower(*self._arguments_to_learn())
                compiling = pool.submit(learn.compile)
            is_first, zeros = self._over_lanes((self._is_first, np.zeros(self._num_lanes, np.float32)))
            act = programs.act.lower(self.params, self._view, self._obs, is_first, np.float32(0), zeros)
            self._act: Callable[..., Any] = act.compile()
            self._draw: Callable[..., Any] = programs.draw.lower(self._key).compile()
            self._learn: Callable[..., tuple] = compiling.result()
        self._leaves, self._restore = programs.leaves, programs.restore
        self._greedy = jax.jit(lambda params, view: greedy(self._agent.q_values(params, view)))
        if self._topology.profile:
            self._time_parts()
        return time.perf_counter() - started

    def _make_programs(self, replicas: Replicas) -> tuple[Replay | None, Programs]:
        config, num_lanes = self._config.agent, self._topology.num_envs
        replay = make_replay(self._stored_spec, config, num_lanes, replicas) if self._has_replay else None
        return replay, make_programs(
            config, num_lanes, self._env.spec, self._agent, self._learner_functions, replay, replicas
        )

    def _jitted(self) -> Any:
        """Returns the programs, jitted: each device of the mesh has its share of the lanes."""
        placement, programs, shapes = self._placement, self._programs, self._shapes
        learner, whole, lanes = placement.partition_learner(shapes[0]), REPLICATED, PartitionSpec(DATA_AXIS)
        replay = shapes[1] and partition(shapes[1], DATA_AXIS)
        saved = shapes[1] and partition_saved(shapes[1], DATA_AXIS)
        if self._has_replay:
            learn = placement.jit(
                programs.learn, (learner, replay, lanes, whole, whole, whole), (learner, replay, whole), (0, 1)
            )
        else:
            rows = PartitionSpec(None, DATA_AXIS)
            learn = placement.jit(
                programs.learn, (learner, rows, lanes, lanes, lanes, lanes, whole), (learner, whole), (0,)
            )
        is_view_donated = (1,) if self._has_replay else ()
        return programs._replace(
            init=placement.jit(programs.init, (whole,), (learner, replay, whole)),
            draw=placement.jit(programs.draw, (whole,), whole),
            act=placement.jit(
                programs.act, (learner.params, lanes, lanes, lanes, whole, lanes), lanes, is_view_donated
            ),
            learn=learn,
            leaves=placement.jit(programs.leaves, (replay,), saved and saved.leaves),
            restore=placement.jit(programs.restore, (saved,), replay),
        )

    @functools.cached_property
    def _shapes(self) -> tuple[LearnerState, ReplayState | tuple[()], jax.Array]:
        """Of the learner, the replay and the key, as the first replica has them."""
        first = ALONE._replace(size=self._placement.replicas.size)  # its share, outside of the mesh
        return jax.eval_shape(self._make_programs(first)[1].init, np.uint32(0))

    def footprint(self) -> Footprint:
        """Returns what it keeps on which devices, before or after `start`; environments are elsewhere."""
        mesh, spec, over_data = self._placement.mesh, self._env.spec, PartitionSpec(DATA_AXIS)
        learner, replay, _ = self._shapes
        num_replicas, num_envs = mesh.shape[DATA_AXIS], self._topology.num_envs
        obs = (spec.observation_shape, spec.observation_dtype)
        view = (self._stored_spec.agent_observation_shape, self._stored_spec.observation_dtype)
        lanes = [jax.ShapeDtypeStruct((num_envs // num_replicas, *shape), dtype) for shape, dtype in (obs, view)]
        return make_footprint(
            mesh.shape,
            tuple(mesh.local_devices),
            learner=(learner, self._placement.partition_learner(learner)),
            lanes=(lanes, over_data),
            replay=(replay, replay and partition(replay, DATA_AXIS)),
            batch=(batch_shapes(self._stored_spec, self._config.agent, num_envs, num_replicas), over_data),
        )

    def _over_lanes(self, share: Any) -> Any:
        return self._placement.to_devices(share, PartitionSpec(DATA_AXIS))

    def _compile_learn_in_parts(self) -> Callable[..., tuple]:
        learner, replay, config = self._learner_functions, self._replay_functions, self._config.agent
        if replay is None:
            return overlapped_profile.timed_learn_without_replay(
                learner, self._programs, config, self._stopwatch, self._arguments_to_learn()
            )
        return overlapped_profile.timed_learn_with_replay(
            learner, replay, self._programs, config, self._stopwatch, self._arguments_to_learn()
        )

    def _time_parts(self) -> None:
        """Has the stopwatch time whatever isn't learning."""
        timed = self._stopwatch.timed
        self._lanes = overlapped_profile.timed_lanes(self._lanes, self._stopwatch)
        number = np.zeros(self._num_lanes, np.float32)
        self._act = overlapped_profile.timed_act(self._act, self._stopwatch, (self._is_first, np.float32(0), number))
        self._draw = timed(OTHER, self._draw)
        self._to_host, self._all_to_host, self._to_device = (
            timed("transfer", function) for function in (self._to_host, self._all_to_host, self._to_device)
        )

    def _arguments_to_learn(self) -> tuple[Any, ...]:
        """Returns arguments of the shapes that the program for learning takes."""
        flag, number = np.zeros(self._num_lanes, bool), np.zeros(self._num_lanes, np.float32)
        row = HostRow((), np.zeros(self._num_lanes, np.int32), number, flag, flag, flag)
        if self._has_replay:
            row = self._over_lanes(row)._replace(obs=self._obs)
            return self._learner, self._replay, row, self._key, np.float32(0), np.int32(0)
        num_rows = rows_per_iteration(self._config.agent)
        rows = self._rows_over_lanes([row] * num_rows)
        views, q_max = (self._view,) * num_rows, (self._to_device(number),) * num_rows
        return self._learner, rows, views, q_max, self._obs, self._over_lanes(flag), self._key

    def _rows_over_lanes(self, rows: list[HostRow]) -> HostRow:
        stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
        return self._placement.to_devices(stacked, PartitionSpec(None, DATA_AXIS))

    def _copy_to_device(self, share: np.ndarray) -> jax.Array:
        """Begins to copy this process's share of an array over lanes to the devices that want it."""
        if jax.process_count() > 1:
            return self._over_lanes(share)
        sharding = None if self._placement.is_one_device else self._placement.shardings(PartitionSpec(DATA_AXIS))
        return jax.device_put(share, sharding)

    def _begin_episodes(self) -> None:
        num_lanes, spec = self._num_lanes, self._stored_spec
        seed = seed_of(self._config.seed, _TRAINING, self.env_steps, jax.process_index())
        self._obs = self._to_device(self._lanes.reset(seed))
        self._view = self._to_device(np.zeros((num_lanes, *spec.agent_observation_shape), spec.observation_dtype))
        self._is_first, self._is_final = np.ones(num_lanes, bool), np.zeros(num_lanes, bool)
        self._episodes = Episodes(num_lanes)

    @property
    def env_steps_per_iteration(self) -> int:
        """Over all lanes: runs stop at multiples of it."""
        return self._topology.num_envs * rows_per_iteration(self._config.agent)

    @property
    def learner(self) -> LearnerState:
        """The newest, which still lacks what the row that is under way will teach it."""
        return self._learner

    def set_learner(self, learner: LearnerState) -> None:
        """Has it go on with another, whose arrays lie where its own do, and are for nobody else."""
        self._learner = learner

    @property
    def params(self) -> Params:
        """The newest parameters."""
        return self._learner.params

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out."""
        self._learn_pending()
        state = {"learner": self._learner, "key": self._key, "observation": self._obs}
        if self._has_replay and self._config.checkpoint_replay:
            replay = self._replay
            state["replay"] = SavedReplay(replay.ring, self._leaves(replay), replay.max_priority)
        return state

    def advance(self, until_env_steps: int) -> Progress:
        """Trains one chunk further, up to the first iteration that reaches `until_env_steps`.

        Raises:
          RunFailed: if the loss isn't finite, or too many environments have failed.
        """
        started = time.perf_counter()
        self._stopwatch.start()
        env_steps, learner_steps = self.env_steps, self.learner_steps
        tally = Tally(self._episodes)
        num_iterations = math.ceil((until_env_steps - self.env_steps) / self.env_steps_per_iteration)
        wanted = peers.firsts(CHUNK_SECONDS / self._seconds_per_iteration)
        num_iterations = max(1, min(num_iterations, math.ceil(wanted)))
        for _ in range(num_iterations):
            plan = make_plan(self._config.agent, self._topology.num_envs, 1, self.env_steps, self._replay_starts_at)
            self._iterate(plan, tally)
            self.env_steps += self.env_steps_per_iteration
            self.learner_steps += planned_learner_steps(self._config.agent, plan, 1)
        loss, td_error = self._mean_losses()
        seconds = time.perf_counter() - started
        self._seconds_per_iteration = seconds / num_iterations
        return Progress(
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            train_seconds=seconds,
            new_env_steps=self.env_steps - env_steps,
            new_learner_steps=self.learner_steps - learner_steps,
            num_episodes=len(tally.returns),
            episode_return_mean=mean(tally.returns),
            episode_length_mean=mean(tally.lengths),
            q_mean=float(np.mean(tally.q_max)),
            loss=loss,
            td_error_mean=td_error,
            exploration=float(plan.exploration[-1, -1]),
            staleness=float(np.mean(tally.staleness)),
            num_env_failures=tally.num_failures,
            part_seconds=self._stopwatch.split(seconds) if self._topology.profile else None,
        )

    def _iterate(self, plan: Plan, tally: Tally) -> None:
        self._key, draws = self._draw(self._key)
        if self._has_replay:
            self._rows_with_replay(plan, draws, tally)
        else:
            self._rollout(plan, draws, tally)

    def _rows_with_replay(self, plan: Plan, draws: Draws, tally: Tally) -> None:
        uniforms, learn_keys = self._own_uniforms(draws), list(draws.learn_keys)
        for i in range(len(uniforms)):
            tally.staleness.append(self._pending.num_updates if self._pending else 0)
            row, _ = self._row(self._learner.params, plan.exploration[0, i], uniforms[i], tally)
            num_updates, exponent = int(plan.num_updates[0, i]), plan.importance_exponent[0, i]
            self._pending = _Pending(row, learn_keys[i], exponent, num_updates)
            if self._topology.lock_step or self._topology.profile:
                self._learn_pending()

    def _own_uniforms(self, draws: Draws) -> np.ndarray:
        """Returns the random numbers of this process's lanes, `[rows, lanes]`."""
        first = jax.process_index() * self._num_lanes
        return self._to_host(draws.uniforms)[:, first : first + self._num_lanes]

    def _row(self, params: Params, exploration: Any, uniform: Any, tally: Tally) -> tuple[HostRow, jax.Array]:
        """Takes a step of all lanes; meanwhile the learner gets the row before, if that is still to be learned from.

        Returns:
          The row, and the greatest value of each lane's observation.
        """
        obs = self._obs
        is_first, uniform = self._over_lanes((self._is_first, uniform))
        self._view, action, q_max = self._act(params, self._view, obs, is_first, exploration, uniform)
        action = self._to_host(action)  # waits for the learner steps under way, if it is their result that acts
        self._lanes.send(action)
        self._learn_pending()
        step = self._lanes.recv()
        self._obs = self._to_device(step.observation)
        no_step = self._is_final | step.failed
        row = HostRow(obs, action, step.reward, step.terminated, step.truncated, no_step)
        self._is_first, self._is_final = no_step, (step.terminated | step.truncated) & ~no_step
        tally.add(row, self._to_host(q_max), self._is_final, step.failed)
        return row, q_max

    def _learn_pending(self) -> None:
        """Has the learner store the pending row and learn, which goes on after this returns."""
        if self._pending is None:
            return
        row, key, exponent, num_updates = self._pending
        self._pending = None
        row = self._over_lanes(row._replace(obs=()))._replace(obs=row.obs)
        self._learner, self._replay, losses = self._learn(
            self._learner, self._replay, row, key, exponent, np.int32(num_updates)
        )
        self._losses.append((losses, num_updates))

    def _rollout(self, plan: Plan, draws: Draws, tally: Tally) -> None:
        """Takes a rollout and has the learner learn from it.

        Nothing overlaps: the next action waits for what was learned, behind which it would have to queue anyway.
        """
        uniforms = self._own_uniforms(draws)
        rows, views, q_max = [], [], []
        for i in range(len(uniforms)):
            tally.staleness.append(0)
            row, row_q_max = self._row(self._learner.params, plan.exploration[0, i], uniforms[i], tally)
            rows.append(row._replace(obs=()))
            views.append(self._view)
            q_max.append(row_q_max)
        stacked, is_first = self._rows_over_lanes(rows), self._over_lanes(self._is_first)
        self._learner, losses = self._learn(
            self._learner, stacked, tuple(views), tuple(q_max), self._obs, is_first, draws.learn_keys
        )
        self._losses.append((losses, planned_learner_steps(self._config.agent, plan, 1)))

    def _mean_losses(self) -> tuple[float | None, float | None]:
        """Returns the mean loss and TD error of the learner steps since the last call, None if there were none."""
        losses, self._losses = self._losses, []
        num_updates = sum(n for _, n in losses)
        if not num_updates:
            return None, None
        sums = self._all_to_host([each for each, _ in losses])
        loss, td_error = (float(np.sum(values)) / num_updates for values in zip(*sums, strict=True))
        check_loss(loss, self.learner_steps, self._config.agent)
        return loss, td_error

    def evaluate(self, num_episodes: int, batch: int = 0) -> np.ndarray:
        """Returns greedy returns of the newest parameters, `[1, num_episodes]`.

        Args:
          num_episodes: played in lanes of their own.
          batch: evaluations of the same parameters with different numbers see different episodes.
        """
        if self._eval_lanes is None:
            self._eval_lanes = self._env.make_eval_lanes(self._num_eval_lanes, self._options)
        seed = seed_of(self._config.seed, _EVALUATION, self.env_steps, batch, jax.process_index())
        params, num_processes = self._placement.own_copy(self.params), jax.process_count()
        num_own = -(-num_episodes // num_processes)
        returns = host_greedy_returns(
            self._eval_lanes,
            self._env.spec,
            lambda view: self._greedy(params, view),
            num_own,
            seed,
            self._agent.to_storage_layout,
        )
        if num_processes > 1:
            replicated = peers.gather(np.pad(returns, (0, num_own - len(returns)), constant_values=np.nan))
            returns = replicated[np.isfinite(replicated)][:num_episodes]
        return returns[None]

    @property
    def _num_eval_lanes(self) -> int:
        return min(self._num_lanes, self._config.eval_episodes)

    @property
    def layout(self) -> str:
        """What a checkpoint must have been saved by to hold the very arrays of this one."""
        return f"overlapped, {self._topology.num_envs} lanes"

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds; of another topology or size it has no random key."""
        return read_as(self, checkpoints, checkpoint, metadata, self._config.agent, self._stored_spec.frame_stack)

    def restore(self, state: dict[str, Any], counters: dict[str, int]) -> None:
        """Goes on from a checkpoint; where it has no replay, from an empty one, after a new warm-up.

        Environments can't be saved: every lane starts a new episode, and what the replay holds of the old ones ends
        with the observation they had come to.
        """
        self._learner = state["learner"]
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        # Without one of its own: another than that of the beginning, which was used before.
        self._key = state.get("key", jax.random.fold_in(self._key, np.uint32(self.env_steps % 2**32)))
        self._replay_starts_at = counters["replay_starts_at"] if "replay" in state else self.env_steps
        if self._has_replay and "replay" in state:
            self._replay = self._restore(state["replay"])
        if self._has_replay and "replay" in state and "observation" in state:  # else its episodes are closed already
            num_lanes = self._num_lanes
            nobody, everybody = np.zeros(num_lanes, bool), np.ones(num_lanes, bool)
            nothing, reward = np.zeros(num_lanes, np.int32), np.zeros(num_lanes, np.float32)
            row = HostRow(state["observation"], nothing, reward, nobody, nobody, everybody)
            self._pending = _Pending(row, self._key, np.float32(1), 0)  # no learner step, so no use of the key
            self._learn_pending()
        self._begin_episodes()

    def close(self) -> None:
        """Ends the environments; may be called twice, and before `start`."""
        for lanes in (self._lanes, self._eval_lanes):
            if lanes is not None:
                lanes.close()


class _Pending(NamedTuple):
    """A row that the learner is still to store, and the learner steps that are due then."""

    row: HostRow
    key: jax.Array
    importance_exponent: Any
    num_updates: int
