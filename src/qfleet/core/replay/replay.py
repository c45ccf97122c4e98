"""The replay: pure functions over one ring, uniform or with a sum tree of priorities beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

import qfleet.core.replay.priorities as priorities
from qfleet.config import AgentConfig, ConfigError
from qfleet.core.replay import sampling
from qfleet.core.replay.ring import NO_STEP, Ring, Row, init_ring, insert_row, is_overwritten, later_slot, take
from qfleet.core.replay.ring import seal as seal_ring
from qfleet.core.replicas import ALONE, Replicas
from qfleet.core.types import EnvSpec, Transition

MIN_PRIORITY = 1e-6
"""Added to every TD error, so that no transition is lost for good (Schaul et al. 2016, section 3.3)."""


class ReplayState(NamedTuple):
    """All that a replay keeps."""

    ring: Ring
    tree: priorities.SumTree | tuple[()]
    """A slot's leaf is the priority of the transition that starts there, to the power alpha; 0 where none can. `()`
    when sampling is uniform."""
    max_priority: Array
    """`[]` float32, the greatest leaf ever set: what new transitions enter with."""
    num_transitions: Array
    """`[1]` int32, leaves above 0: transitions that may be drawn by priority."""
    num_expiring: Array
    """`[1]` int32, those of them that the next row will make undrawable. Counted a row ahead: to read leaves that are
    about to change, XLA would copy all of them."""


class SavedReplay(NamedTuple):
    """What a replay must keep to go on as if never stopped, in a form that any number of replicas can share anew."""

    ring: Ring
    leaves: Array | tuple[()]
    """`[rows, lanes]` float32, those of the tree."""
    max_priority: Array


class Sample(NamedTuple):
    """A batch, and where it came from."""

    transition: Transition
    """This replica's share of the batch."""
    slot: Array
    """`[batch]` uint32, where each transition of the whole batch starts: `row * lanes + lane`."""
    is_mine: Array
    """`[batch]` bool, whether that is in this replica's ring."""
    insertions: Array
    """`[]` uint32, `Ring.insertions` when it was drawn."""


class Replay(NamedTuple):
    """The pure functions of a replay. States may be donated: every function writes in place then."""

    init: Callable[[], ReplayState]
    insert: Callable[[ReplayState, Row], ReplayState]
    """`insert(state, row) -> state`: one step of all lanes."""
    seal: Callable[[ReplayState, Array], ReplayState]
    """`seal(state, lanes)`: in these lanes, `[lanes]` bool, what was inserted last has no future but its next
    observation; insert that one with `NO_STEP`."""
    sample: Callable[[ReplayState, Array, Array], Sample]
    """`sample(state, key, importance_exponent) -> sample`, once n_step + 1 rows are in. Uniform sampling ignores the
    exponent: its weights are 1."""
    set_priorities: Callable[[ReplayState, Sample, Array], ReplayState]
    """`set_priorities(state, sample, td_error) -> state`, with the errors of `sample.transition`; those of overwritten
    rows change nothing."""
    leaves: Callable[[ReplayState], Array | tuple[()]]
    """`leaves(state)`, what `SavedReplay` holds of the tree; the rest of it is the state's own."""
    restore: Callable[[SavedReplay], ReplayState]
    """`restore(saved) -> state`."""


def partition(state: ReplayState, axis: str) -> Any:
    """Returns how the state's arrays are spread over the replicas along a mesh axis, as `PartitionSpec`s."""
    mine, everybodys = cast(Any, PartitionSpec(axis)), cast(Any, PartitionSpec())
    return ReplayState(
        ring=_partition_ring(axis),
        tree=jax.tree.map(lambda level: mine, state.tree),
        max_priority=everybodys,
        num_transitions=mine,
        num_expiring=mine,
    )


def partition_saved(state: ReplayState, axis: str) -> Any:
    """Returns the same of what is saved of it."""
    leaves = cast(Any, PartitionSpec(None, axis)) if state.tree else ()
    return SavedReplay(_partition_ring(axis), leaves, cast(Any, PartitionSpec()))


def _partition_ring(axis: str) -> Any:
    lanes, everybodys = cast(Any, PartitionSpec(None, axis)), cast(Any, PartitionSpec())
    return Ring(Row(lanes, lanes, lanes, lanes), everybodys, everybodys, everybodys)


def make_replay(spec: EnvSpec, config: AgentConfig, num_lanes: int, replicas: Replicas = ALONE) -> Replay:
    """Returns the replay that `config` describes, for `num_lanes` lanes of `spec`'s environment.

    With replicas, each has an equal share of the lanes and keeps what they produce, and its functions are to be called
    by all of them together. They draw from all of it as if it were one: each transition with the probability and the
    weight that it would have there.

    Raises:
      ConfigError: if the capacity is too small for one window of each lane.
    """
    num_rows = config.replay_capacity // num_lanes
    fewest_rows = config.n_step + spec.frame_stack + 1
    if num_rows < fewest_rows:
        raise ConfigError(
            f"replay_capacity must hold at least n_step + frame_stack + 1 steps of each lane, got replay_capacity="
            f"{config.replay_capacity} for {num_lanes} lanes, n_step={config.n_step} and frame_stack="
            f"{spec.frame_stack}; try {fewest_rows * num_lanes}"
        )
    num_lanes //= replicas.size  # from here on this replica's
    is_prioritised = config.replay == "prioritised"
    num_slots = num_rows * num_lanes

    def init() -> ReplayState:
        return ReplayState(
            ring=init_ring(num_rows, num_lanes, spec.observation_shape, spec.observation_dtype),
            tree=priorities.init_tree(num_slots) if is_prioritised else (),
            max_priority=jnp.float32(1.0),
            num_transitions=jnp.zeros(1, jnp.int32),
            num_expiring=jnp.zeros(1, jnp.int32),
        )

    def insert(state: ReplayState, row: Row) -> ReplayState:
        if not isinstance(state.tree, priorities.SumTree):
            return state._replace(ring=insert_row(state.ring, row))
        # This row completes the window of the one n steps before it, and overwrites the last frame of a stack.
        completed = (state.ring.cursor - config.n_step) % num_rows
        broken = (state.ring.cursor + spec.frame_stack - 1) % num_rows
        is_complete = state.ring.size >= config.n_step
        ring = insert_row(state.ring, row)  # before its outcomes are read: the other way round XLA copies them all
        outcome = jax.lax.dynamic_index_in_dim(ring.rows.outcome, completed, keepdims=False)
        can_start = (outcome != NO_STEP) & is_complete
        lanes = jnp.arange(num_lanes)
        tree = priorities.set_leaves(
            state.tree,
            jnp.concatenate([broken * num_lanes + lanes, completed * num_lanes + lanes]),
            jnp.concatenate([jnp.zeros(num_lanes), jnp.where(can_start, state.max_priority, 0.0)]),
        )
        expiring = priorities.get_leaves(tree, (broken + 1) % num_rows * num_lanes + lanes) > 0
        return state._replace(
            ring=ring,
            tree=tree,
            num_transitions=state.num_transitions - state.num_expiring + jnp.sum(can_start, dtype=jnp.int32),
            num_expiring=jnp.sum(expiring, dtype=jnp.int32)[None],
        )

    def seal(state: ReplayState, lanes: Array) -> ReplayState:
        return state._replace(ring=seal_ring(state.ring, lanes))

    def sample(state: ReplayState, key: Array, importance_exponent: Array) -> Sample:
        ring = state.ring
        if isinstance(state.tree, priorities.SumTree):
            slot, is_mine, weight = draw_by_priority(state, state.tree, key, importance_exponent)
        else:
            slot, is_mine, weight = sampling.draw_uniformly(
                ring, key, config.batch_size, config.n_step, spec.frame_stack, replicas
            )
        n_step_return, discount, num_steps = sampling.n_step_returns(ring, slot, config.n_step, config.discount)
        transition = Transition(
            obs=sampling.stacked_observations(ring, slot, spec.frame_stack),
            action=take(ring.rows.action, slot),
            reward=n_step_return,
            discount=discount,
            next_obs=sampling.stacked_observations(ring, later_slot(ring, slot, num_steps), spec.frame_stack),
            weight=weight,
        )
        return Sample(replicas.deal(transition, is_mine), slot, is_mine, ring.insertions)

    def draw_by_priority(
        state: ReplayState, tree: priorities.SumTree, key: Array, importance_exponent: Array
    ) -> tuple[Array, Array, Array]:
        uniforms = jax.random.uniform(key, (config.batch_size,))
        shares = replicas.gather(jnp.stack([priorities.total(tree), state.num_transitions[0].astype(jnp.float32)]))
        slot, is_mine, probability = priorities.sample_leaves(tree, uniforms, shares[:, 0], replicas.rank())
        num_transitions = jnp.sum(shares[:, 1])
        # Not divided by the batch's greatest weight, as is often done: that would make a transition's weight
        # depend on its companions, and two half batches differ from the whole.
        return slot, is_mine, (num_transitions * probability) ** -importance_exponent

    def set_priorities(state: ReplayState, sample: Sample, td_error: Array) -> ReplayState:
        if not isinstance(state.tree, priorities.SumTree):
            return state
        priority = (jnp.abs(replicas.gather(td_error).reshape(-1)) + MIN_PRIORITY) ** config.priority_exponent
        # Also late: a slot whose oldest stacked frame is gone, for it can't be drawn any more.
        oldest = later_slot(state.ring, sample.slot, num_rows - spec.frame_stack + 1)
        is_late = is_overwritten(state.ring, oldest // jnp.uint32(num_lanes), sample.insertions)
        leaf = jnp.where(is_late | ~sample.is_mine, jnp.uint32(num_slots), sample.slot)
        return state._replace(
            tree=priorities.set_leaves(state.tree, leaf, priority),
            max_priority=jnp.maximum(state.max_priority, jnp.max(priority)),
        )

    def leaves(state: ReplayState) -> Array | tuple[()]:
        if not isinstance(state.tree, priorities.SumTree):
            return ()
        return state.tree.levels[0][:num_slots].reshape(num_rows, num_lanes)

    def restore(saved: SavedReplay) -> ReplayState:
        state = init()._replace(ring=saved.ring, max_priority=saved.max_priority)
        if isinstance(saved.leaves, tuple):
            return state
        expiring = saved.leaves[(saved.ring.cursor + spec.frame_stack - 1) % num_rows] > 0
        return state._replace(
            tree=priorities.tree_of(saved.leaves.reshape(-1)),
            num_transitions=jnp.sum(saved.leaves > 0, dtype=jnp.int32)[None],
            num_expiring=jnp.sum(expiring, dtype=jnp.int32)[None],
        )

    return Replay(init, insert, seal, sample, set_priorities, leaves, restore)
