"""The program of `qfleet.topologies.fused` on devices: one learner on a mesh, or many seeds divided among devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qfleet.config import TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import make_learner
from qfleet.core.replay import partition_saved
from qfleet.core.replicas import ALONE
from qfleet.core.types import Network, stored_spec
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.devices import num_shards
from qfleet.topologies.footprint import Footprint, batch_shapes, make_footprint
from qfleet.topologies.fused.program import FusedState, Program, make_program, partition_state
from qfleet.topologies.mesh import DATA_AXIS, REPLICATED, Placement

OVER_SEEDS = PartitionSpec("seeds")


def _is_spec(tree: Any) -> bool:
    return isinstance(tree, PartitionSpec)


class ProgramOnDevices:
    """The program of a run, each device having its share of the lanes, or of the seeds if there are many."""

    def __init__(
        self,
        config: TrainConfig,
        env: InGraphEnv,
        network: Network,
        optimiser: optax.GradientTransformation | None,
    ) -> None:
        """Checks the sizes; nothing is compiled.

        Raises:
          ConfigError: if the sizes in `config` don't fit each other, or its optimiser isn't known.
        """
        agent = self._agent = make_agent(network, config.agent, env.spec.frame_stack)
        self._config = config
        self._placement = Placement(config.topology.mesh, network)
        self._stored_spec = stored_spec(env.spec, network.to_storage_layout)
        self._make_program = functools.partial(
            make_program, config, env, agent, make_learner(agent, config.agent, optimiser)
        )
        self._program = self._make_program(self._placement.replicas)

    @functools.cached_property
    def seeds(self) -> Any:
        """The seed, `[]` uint32, or with many of them `[num_seeds]`, divided among the devices."""
        if self._config.num_seeds == 1:
            return np.uint32(self._config.seed)
        seeds = np.uint32(self._config.seed + np.arange(self._config.num_seeds))
        return jax.device_put(seeds, self.sharding_of_seeds)

    def jitted(self) -> Any:
        """Returns the program, as a `Program` of functions that are jitted for the devices."""
        return self._over_seeds() if self._config.num_seeds > 1 else self._on_mesh()

    def _on_mesh(self) -> Any:
        """Returns the jitted program of one seed, in which each device of the mesh has its share of the lanes."""
        placement, (shapes, state) = self._placement, self._shapes_and_specs
        learner = state.learner
        saved = shapes.replay and partition_saved(shapes.replay, DATA_AXIS)
        program, whole, divided = self._program, REPLICATED, PartitionSpec(DATA_AXIS)
        return Program(
            init=placement.jit(program.init, (whole,), state),
            run=placement.jit(program.run, (state, whole, whole), (state, whole), donate_argnums=(0,)),
            begin_episodes=placement.jit(program.begin_episodes, (whole,) * 3, divided),
            play_episodes=placement.jit(
                program.play_episodes, (learner.params, whole, whole, whole, divided, whole, whole), (divided, whole)
            ),
            replay_leaves=placement.jit(program.replay_leaves, (state.replay,), saved and saved.leaves),
            restore_replay=placement.jit(program.restore_replay, (saved,), state.replay),
        )

    def _over_seeds(self) -> Any:
        """Returns the jitted program of many seeds. Each device trains its share of them, several as one batch."""
        mesh, split, whole = self._mesh_of_seeds, OVER_SEEDS, REPLICATED
        over_share = _over_one if self._config.num_seeds == mesh.size else jax.vmap

        def over_seeds(function: Callable, *in_specs: Any, donate_argnums: tuple[int, ...] = ()) -> Any:
            in_axes = jax.tree.map(lambda spec: 0 if spec == split else None, in_specs, is_leaf=_is_spec)
            batched = over_share(function, in_axes)
            mapped = jax.shard_map(batched, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)
            return jax.jit(mapped, donate_argnums=donate_argnums)

        program, plan = self._of_one_seed
        return Program(
            init=over_seeds(program.init, split),
            run=over_seeds(program.run, split, plan, whole, donate_argnums=(0,)),
            begin_episodes=over_seeds(program.begin_episodes, split, whole, whole),
            play_episodes=over_seeds(program.play_episodes, split, split, whole, whole, split, whole, whole),
            replay_leaves=over_seeds(program.replay_leaves, split),
            restore_replay=over_seeds(program.restore_replay, split),
        )

    @property
    def _of_one_seed(self) -> tuple[Program, Any]:
        """The program of each of many seeds, and how the plans of all of them are divided, as `PartitionSpec`s."""
        return self._program, REPLICATED

    def footprint(self) -> Footprint:
        """Returns what it keeps on which devices, before or after `start`."""
        mesh, (shapes, specs) = self._placement.mesh, self._shapes_and_specs
        batch = batch_shapes(
            self._stored_spec,
            self._config.agent,
            self._config.topology.num_envs,
            mesh.shape[DATA_AXIS],
            shapes.actor.memory.carry,
        )
        episodes = jax.eval_shape(self._first_program.begin_episodes, np.uint32(0), np.uint32(0), np.int32(0))
        axes, devices, batch_specs = mesh.shape, mesh.local_devices, PartitionSpec(DATA_AXIS)
        if self._config.num_seeds > 1:
            devices = self._devices_of_seeds
            axes, share, split = {"seeds": len(devices)}, self._config.num_seeds // len(devices), OVER_SEEDS
            shapes, batch, episodes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((share, *x.shape), x.dtype), (shapes, batch, episodes)
            )
            specs, batch_specs = jax.tree.map(lambda x: split, shapes), split
        return make_footprint(
            axes,
            tuple(devices),
            learner=(shapes.learner, specs.learner),
            lanes=(shapes.actor, specs.actor),
            replay=(shapes.replay, specs.replay),
            batch=(batch, batch_specs),
            evaluation=(episodes, batch_specs),
        )

    @property
    def _devices_of_seeds(self) -> list[jax.Device]:
        return jax.local_devices()[: num_shards(self._config.num_seeds, jax.local_device_count())]

    @property
    def sharding_of_seeds(self) -> NamedSharding:
        """How arrays with a leading axis `[seeds]` are divided among the devices."""
        return NamedSharding(self._mesh_of_seeds, OVER_SEEDS)

    @functools.cached_property
    def _mesh_of_seeds(self) -> jax.sharding.Mesh:
        devices = self._devices_of_seeds
        return jax.make_mesh((len(devices),), ("seeds",), axis_types=(AxisType.Auto,), devices=devices)

    @functools.cached_property
    def _first_program(self) -> Program:
        """The program of the first replica, outside the mesh. A single learner's is its own, so it is traced once."""
        replicas = self._placement.replicas
        return self._program if replicas is ALONE else self._make_program(ALONE._replace(size=replicas.size))

    @functools.cached_property
    def _shapes_and_specs(self) -> tuple[FusedState, Any]:
        """The shapes of the first replica's state, and how the whole state is spread, as `PartitionSpec`s."""
        shapes = jax.eval_shape(self._first_program.init, np.uint32(0))
        learner = self._placement.partition_learner(shapes.learner)
        return shapes, partition_state(shapes, DATA_AXIS)._replace(learner=learner)


def _over_one(function: Callable, in_axes: Any) -> Callable:
    """Returns what `jax.vmap` would, for a batch of one.

    Batching makes both branches of a `jax.lax.cond` run at each learner step, so the target network would be copied
    each time. Here only the branch that is due runs.
    """

    def own_of(axis: int | None, batch: Any) -> Any:
        return batch if axis is None else jax.tree.map(lambda x: x[0], batch)

    def over_one(*arguments: Any) -> Any:
        own = jax.tree.map(own_of, in_axes, arguments, is_leaf=lambda axis: axis is None)
        return jax.tree.map(lambda x: x[None], function(*own))

    return over_one
