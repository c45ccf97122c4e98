"""The programs of `qfleet.topologies.overlapped` on a mesh: compiling them, and bringing arrays to their devices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec

from qfleet.config import MeshConfig, TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import LearnerState, make_learner
from qfleet.core.memory import MemoryState, memory_shapes
from qfleet.core.replay import Replay, ReplayState, make_replay, partition, partition_saved
from qfleet.core.replicas import ALONE, Replicas
from qfleet.core.types import EnvSpec, Network, stored_spec
from qfleet.runtime.compiling import compilers
from qfleet.runtime.stopwatch import Stopwatch
from qfleet.topologies.footprint import Footprint, batch_shapes, make_footprint
from qfleet.topologies.mesh import DATA_AXIS, REPLICATED, Placement
from qfleet.topologies.overlapped.profile import timed_learn
from qfleet.topologies.overlapped.programs import HostRow, Programs, make_programs
from qfleet.topologies.schedule import rows_per_iteration

_OVER_LANES = PartitionSpec(DATA_AXIS)
_OVER_LANES_OF_ROWS = PartitionSpec(None, DATA_AXIS)


class CompiledPrograms(NamedTuple):
    """The programs that run in every row or iteration, compiled. See `Programs`."""

    draw: Callable[..., Any]
    act: Callable[..., Any]
    learn: Callable[..., tuple]


class ProgramsOnMesh:
    """The programs of a run, each device of the mesh having its share of the lanes."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: MeshConfig,
        spec: EnvSpec,
        network: Network,
        optimiser: optax.GradientTransformation | None,
    ) -> None:
        """Checks the sizes; nothing is compiled.

        Raises:
          ConfigError: if the sizes in `config` don't fit each other, or its optimiser isn't known.
        """
        self._config, self._spec, self._num_envs = config.agent, spec, config.topology.num_envs
        self.agent = make_agent(network, config.agent, spec.frame_stack)
        """The functions that act."""
        self.has_replay = config.agent.replay != "none"
        """Whether the agent learns from a replay; otherwise it learns from rollouts."""
        self.stored_spec = stored_spec(spec, network.to_storage_layout)
        """The spec of observations in their storage layout."""
        self.num_lanes = self._num_envs // jax.process_count()
        """Lanes of this process."""
        self._learner = make_learner(self.agent, config.agent, optimiser)
        self._placement = Placement(mesh, network)
        self._replay, self.programs = self._make_programs(self._placement.replicas)

    def _make_programs(self, replicas: Replicas) -> tuple[Replay | None, Programs]:
        config, num_envs = self._config, self._num_envs
        make = functools.partial(make_replay, self.stored_spec, config, num_envs, replicas)
        replay = make(carry_size=self.agent.carry_size) if self.has_replay else None
        return replay, make_programs(config, num_envs, self.agent, self._learner, replay, replicas)

    def jitted(self) -> Any:
        """Returns the programs, as a `Programs` of functions that are jitted for the mesh."""
        placement, programs, shapes = self._placement, self.programs, self._shapes
        learner, whole, lanes = placement.partition_learner(shapes[0]), REPLICATED, _OVER_LANES
        replay = shapes[1] and partition(shapes[1], DATA_AXIS)
        saved = shapes[1] and partition_saved(shapes[1], DATA_AXIS)
        if self.has_replay:
            learn = placement.jit(
                programs.learn, (learner, replay, lanes, whole, whole, whole), (learner, replay, whole), (0, 1)
            )
        else:
            learn = placement.jit(
                programs.learn,
                (learner, _OVER_LANES_OF_ROWS, lanes, lanes, lanes, lanes, lanes, whole),
                (learner, whole),
                (0,),
            )
        donated_by_act = (1,) if self.has_replay else ()  # the memory; a rollout's memories are still needed by `learn`
        return programs._replace(
            init=placement.jit(programs.init, (whole,), (learner, replay, whole)),
            draw=placement.jit(programs.draw, (whole,), whole),
            act=placement.jit(
                programs.act, (learner.params, lanes, lanes, lanes, whole, lanes, whole), lanes, donated_by_act
            ),
            learn=learn,
            replay_leaves=placement.jit(programs.replay_leaves, (replay,), saved and saved.leaves),
            restore_replay=placement.jit(programs.restore_replay, (saved,), replay),
        )

    def compile(
        self,
        jitted: Any,
        key: jax.Array,
        act_arguments: tuple[Any, ...],
        learn_arguments: tuple[Any, ...],
        stopwatch: Stopwatch | None,
    ) -> CompiledPrograms:
        """Returns the programs compiled for arguments of these shapes.

        Args:
          jitted: the result of `jitted`.
          key: the argument of `draw`.
          act_arguments: arguments of `act`.
          learn_arguments: arguments of `learn`.
          stopwatch: if given, `learn` is compiled in parts, each of which the stopwatch times.
        """
        with compilers() as pool:  # XLA compiles one program while Python traces the next
            if stopwatch:
                learn = pool.submit(
                    timed_learn, self._learner, self._replay, self.programs, self._config, stopwatch, learn_arguments
                )
            else:
                learn = pool.submit(jitted.learn.lower(*learn_arguments).compile)
            act = pool.submit(jitted.act.lower(*act_arguments).compile)
            draw = pool.submit(jitted.draw.lower(key).compile)
            return CompiledPrograms(draw.result(), act.result(), learn.result())

    @functools.cached_property
    def _shapes(self) -> tuple[LearnerState, ReplayState | tuple[()], jax.Array]:
        """The shapes of the learner, the replay and the key, as the first replica has them."""
        first = ALONE._replace(size=self._placement.replicas.size)  # stands for one replica's share, outside the mesh
        return jax.eval_shape(self._make_programs(first)[1].init, np.uint32(0))

    def footprint(self) -> Footprint:
        """Returns what a run keeps on which devices. The environments run elsewhere, and are not in it."""
        mesh, spec, stored = self._placement.mesh, self._spec, self.stored_spec
        learner, replay, _ = self._shapes
        num_replicas = mesh.shape[DATA_AXIS]
        num_lanes = self._num_envs // num_replicas
        obs = jax.ShapeDtypeStruct((num_lanes, *spec.lane_shape), spec.observation_dtype)
        memory = memory_shapes(self.agent.memory, stored, num_lanes)
        return make_footprint(
            mesh.shape,
            tuple(mesh.local_devices),
            learner=(learner, self._placement.partition_learner(learner)),
            lanes=((obs, memory), _OVER_LANES),
            replay=(replay, replay and partition(replay, DATA_AXIS)),
            batch=(batch_shapes(stored, self._config, self._num_envs, num_replicas, memory.carry), _OVER_LANES),
        )

    def learn_arguments(
        self,
        learner: LearnerState,
        replay: ReplayState | tuple[()],
        key: jax.Array,
        obs: jax.Array,
        memory: MemoryState,
    ) -> tuple[Any, ...]:
        """Returns arguments of the shapes that `Programs.learn` takes, to compile it for."""
        flag, number = np.zeros(self.num_lanes, bool), np.zeros(self.num_lanes, np.float32)
        row = HostRow((), np.zeros(self.num_lanes, np.int32), number, flag, flag, flag)
        if self.has_replay:
            row = self.lanes_to_devices(row)._replace(obs=obs, carry=memory.carry)
            return learner, replay, row, key, np.float32(0), np.int32(0)
        num_rows = rows_per_iteration(self._config)
        rows, next_is_first = self.rollout_to_devices([row] * num_rows), self.lanes_to_devices(flag)
        memories, q_max = (memory,) * num_rows, (self.copy_to_devices(number),) * num_rows
        return learner, rows, memories, q_max, memory.carry, obs, next_is_first, key

    def blank_memory(self) -> MemoryState:
        """Returns a memory of this process's lanes that all `act` with before their first episodes start."""
        shapes = memory_shapes(self.agent.memory, self.stored_spec, self.num_lanes)
        return jax.tree.map(lambda x: self.copy_to_devices(np.zeros(x.shape, x.dtype)), shapes)

    def lanes_to_devices(self, share: Any) -> Any:
        """Returns this process's arrays over lanes, `[lanes, ...]`, as a program takes them."""
        return self._placement.to_devices(share, _OVER_LANES)

    def rollout_to_devices(self, rows: list[HostRow]) -> HostRow:
        """Returns this process's rows of one rollout, stacked, as a program takes them."""
        return self._placement.to_devices(jax.tree.map(lambda *x: np.stack(x), *rows), _OVER_LANES_OF_ROWS)

    def copy_to_devices(self, share: np.ndarray) -> jax.Array:
        """Starts to copy this process's share of an array over lanes to its devices, and returns at once."""
        if jax.process_count() > 1:
            return self.lanes_to_devices(share)
        return jax.device_put(share, None if self._placement.is_one_device else self._placement.shardings(_OVER_LANES))

    def copy_to_host(self, array: jax.Array) -> np.ndarray:
        """Returns this process's share of an array over lanes, `[lanes, ...]`, or all of a replicated one."""
        return self._placement.to_host(array)

    def own_copy(self, params: Any) -> Any:
        """Returns parameters for programs of this process alone."""
        return self._placement.own_copy(params)
