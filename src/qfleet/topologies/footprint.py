"""A run's memory on its devices, and whether it fits, from shapes alone: nothing is allocated or compiled.

Temporaries of a learner step (activations, gradients, a batch before it is divided over replicas) are not included.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qfleet.config import AgentConfig, ConfigError, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.player import Player
from qfleet.core.replay import ReplayState
from qfleet.core.types import Batch, EnvSpec, Regression, Sequences, Transition
from qfleet.envs.spec import InGraphEnv
from qfleet.networks.partition import MODEL_AXIS
from qfleet.runtime.devices import available_bytes, describe_memory
from qfleet.runtime.process import show_bytes
from qfleet.topologies.schedule import rows_per_iteration

HEADROOM = 0.1
"""Fraction of the memory left for the replay that a suggested capacity keeps free for temporaries."""

REPLAY_PARTS = ("replay", "priorities")
EVALUATION_PART = "evaluation"

Placed = tuple[Any, Any]
"""Shapes of one replica's arrays, and how they are divided: a tree of `PartitionSpec`s or a prefix of one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of arrays that a run keeps, such as parameters."""

    name: str
    total_bytes: int
    """Size of the whole arrays, however many devices have a copy."""
    bytes_per_device: int
    axis: str | None
    """The mesh axis that the arrays are divided over, as far as they can be; None if each device has all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Everything that a run keeps on its devices between steps and in an evaluation, and the batch it learns from."""

    axes: Mapping[str, int]
    """Number of devices along each axis of the mesh."""
    devices: tuple[Any, ...]
    """The devices of this process."""
    parts: tuple[Part, ...]

    @property
    def bytes_per_device(self) -> int:
        """The sum of its parts."""
        return sum(part.bytes_per_device for part in self.parts)

    def bytes_per_device_of(self, *names: str) -> int:
        """The sum of those of its parts that have these names."""
        return sum(part.bytes_per_device for part in self.parts if part.name in names)


def make_footprint(
    axes: Mapping[str, int],
    devices: tuple[Any, ...],
    *,
    learner: Placed,
    lanes: Placed,
    replay: Placed,
    batch: Placed,
    evaluation: Placed = ((), ()),
) -> Footprint:
    """Returns the footprint of a run.

    Args:
      axes: number of devices along each axis of the mesh.
      devices: the devices of this process.
      learner: a `LearnerState`.
      lanes: the arrays that lanes keep on the devices.
      replay: a `ReplayState`, or `()`.
      batch: the data of one learner step, or of one round of them.
      evaluation: the episodes that an evaluation plays at once; none if it plays them outside the compiled program.
    """
    (state, specs), (stored, stored_specs) = learner, replay
    placed = {
        "parameters": (state.params, specs.params),
        "target network": (state.target_params, specs.target_params),
        "optimiser state": _without_params(state, specs),
        "lanes": lanes,
        "replay": _without_tree(stored, stored_specs),
        "priorities": (stored.tree, stored_specs.tree) if isinstance(stored, ReplayState) else ((), ()),
        EVALUATION_PART: evaluation,
        "batch": batch,
    }
    parts = tuple(_part(name, axes, *each) for name, each in placed.items() if jax.tree.leaves(each[0]))
    return Footprint(axes=dict(axes), devices=devices, parts=parts)


def _without_params(state: LearnerState, specs: Any) -> Placed:
    return (state.optimiser_state, state.target_age), (specs.optimiser_state, specs.target_age)


def _without_tree(state: ReplayState | tuple[()], specs: Any) -> Placed:
    return (state._replace(tree=()), specs._replace(tree=())) if isinstance(state, ReplayState) else ((), ())


def _part(name: str, axes: Mapping[str, int], shapes: Any, specs: Any) -> Part:
    leaves = jax.tree.leaves(shapes)
    spread = jax.tree.leaves(jax.tree.broadcast(specs, shapes, is_leaf=_is_spec), is_leaf=_is_spec)
    total = per_device = 0
    used = set()
    for leaf, spec in zip(leaves, spread, strict=True):
        names = {name for name in spec if name is not None and axes[name] > 1}
        used |= names
        total += _num_bytes(leaf) * math.prod(axes[name] for name in names - {MODEL_AXIS})
        per_device += _num_bytes(leaf) // math.prod(axes[name] for name in names & {MODEL_AXIS})
    return Part(name=name, total_bytes=total, bytes_per_device=per_device, axis=" x ".join(sorted(used)) or None)


def _is_spec(tree: Any) -> bool:
    return isinstance(tree, PartitionSpec)


def _num_bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def batch_shapes(stored: EnvSpec, config: AgentConfig, num_lanes: int, num_replicas: int, carry: Any = ()) -> Batch:
    """Returns the shapes of one replica's share of a batch of transitions or sequences, or of a whole rollout.

    Args:
      stored: the spec of observations in the network's storage layout.
      config: the agent's config.
      num_lanes: number of lanes over all replicas.
      num_replicas: number of replicas.
      carry: shapes of what a recurrent network remembers of one replica's lanes; `()` for others.
    """
    has_replay = config.replay != "none"
    shape = (config.batch_size,) if has_replay else (rows_per_iteration(config), num_lanes)
    shape = (*shape[:-1], shape[-1] // num_replicas)

    def of(dtype: Any, *rest: int) -> Any:
        return jax.ShapeDtypeStruct((*shape, *rest), dtype)

    obs = of(stored.observation_dtype, *stored.agent_observation_shape)
    action, number = of(np.int32), of(np.float32)
    if config.learns_sequences:
        rows, learned = config.rows_after_start + 1, config.sequence_length
        return Sequences(
            obs=of(obs.dtype, rows, *stored.agent_observation_shape),
            is_first=of(np.bool_, rows),
            carry=jax.tree.map(lambda x: of(x.dtype, *x.shape[1:]), carry),
            action=of(np.int32, learned),
            reward=of(np.float32, learned),
            discount=of(np.float32, learned),
            num_steps=of(np.int32, learned),
            is_step=of(np.bool_, learned),
            weight=number,
        )
    if has_replay:
        return Transition(obs, action, number, number, obs, number)
    return Regression(obs, action, number, number, carry, of(np.bool_) if jax.tree.leaves(carry) else ())


def evaluation_shapes(env: InGraphEnv, player: Player, num_episodes: int) -> Any:
    """Returns the shapes of what an evaluation keeps of the episodes that it plays at once in a compiled program.

    Args:
      env: the environment.
      player: plays them.
      num_episodes: number of episodes of one replica.
    """
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_episodes))
    state, obs = jax.eval_shape(jax.vmap(env.reset), keys)
    memory = jax.eval_shape(player.begin, obs)
    has_ended, episode_return = (jax.ShapeDtypeStruct((num_episodes,), dtype) for dtype in (np.bool_, np.float32))
    return state, memory, has_ended, episode_return


def check_fits(config: TrainConfig, footprint: Footprint, footprint_of: Callable[[TrainConfig], Footprint]) -> None:
    """Checks that a run fits into the memory of its devices, if they report how much they have.

    Args:
      config: the run's config.
      footprint: the run's footprint.
      footprint_of: `footprint_of(config)` returns the footprint of another config; used to find one that fits.

    Raises:
      ConfigError: if the run doesn't fit.
    """
    limit = available_bytes(footprint.devices)
    if limit is None or footprint.bytes_per_device <= limit:
        return
    parts = sorted(footprint.parts, key=lambda part: -part.bytes_per_device)
    terms = " + ".join(f"{show_bytes(part.bytes_per_device)} {part.name}" for part in parts)
    raise ConfigError(
        f"a run must fit into memory, got {terms} = {show_bytes(footprint.bytes_per_device)} per device of "
        f"{show_bytes(limit)} ({describe_memory(footprint.devices)}); try "
        f"{_remedy(config, footprint, footprint_of, limit)}"
    )


def _remedy(
    config: TrainConfig, footprint: Footprint, footprint_of: Callable[[TrainConfig], Footprint], limit: int
) -> str:
    """Returns settings in words, each of which makes the run fit on its own."""

    def fits(other: TrainConfig) -> bool:
        found = footprint_of(other)
        most = available_bytes(found.devices)
        return most is None or found.bytes_per_device <= most

    remedies = []
    for name, others in (
        ("replay_capacity", _with_less_replay(config, footprint, limit)),
        ("eval_episodes", _with_fewer_episodes(config, footprint, limit)),
        ("mesh.data", _with_more_devices(config)),
    ):
        for value, make in others:
            try:
                if fits(make()):
                    remedies.append(f"{name} {value}")
                    break
            except ConfigError:  # this value doesn't go with the other settings
                continue
    if remedies:
        return " or ".join(remedies)
    sizes = ["hidden_sizes", "num_envs", "rollout_length" if config.agent.replay == "none" else "batch_size"]
    return f"a smaller {', '.join(['num_seeds', *sizes] if config.num_seeds > 1 else sizes[:-1])} or {sizes[-1]}"


_Others = list[tuple[int, Callable[[], TrainConfig]]]


def _with_less_replay(config: TrainConfig, footprint: Footprint, limit: int) -> _Others:
    share = _fitting_share(footprint, limit, *REPLAY_PARTS)
    capacity = _rounded_down(int(config.agent.replay_capacity * share))

    def make() -> TrainConfig:
        return dataclasses.replace(config, agent=dataclasses.replace(config.agent, replay_capacity=capacity))

    return [(capacity, make)] if share else []


def _with_fewer_episodes(config: TrainConfig, footprint: Footprint, limit: int) -> _Others:
    share = _fitting_share(footprint, limit, EVALUATION_PART)
    num_episodes = _rounded_down(int(config.eval_episodes * share))
    return [(num_episodes, lambda: dataclasses.replace(config, eval_episodes=num_episodes))] if share else []


def _fitting_share(footprint: Footprint, limit: int, *names: str) -> float:
    """Returns the fraction of these parts that would fit, or 0 if the others alone are too large."""
    size = footprint.bytes_per_device_of(*names)
    left = limit - (footprint.bytes_per_device - size)
    return (1 - HEADROOM) * left / size if size and left > 0 else 0.0


def _with_more_devices(config: TrainConfig) -> _Others:
    """Returns the config on larger meshes, if its mesh can be set, and if a larger one has more memory."""
    topology: Any = config.topology
    has_own_mesh = any(field.name == "mesh" for field in dataclasses.fields(topology))
    if not has_own_mesh or config.num_seeds > 1 or jax.default_backend() == "cpu":
        return []
    mesh = topology.mesh

    def make(data: int) -> TrainConfig:
        larger: Any = {"mesh": dataclasses.replace(mesh, data=data)}
        return dataclasses.replace(config, topology=dataclasses.replace(topology, **larger))

    sizes = range(mesh.data + 1, jax.device_count() // mesh.model + 1)
    return [(data, functools.partial(make, data)) for data in sizes]


def _rounded_down(number: int, num_digits: int = 2) -> int:
    unit = 10 ** max(0, len(str(number)) - num_digits)
    return number // unit * unit
