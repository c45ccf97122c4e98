"""The replay: pure functions over one ring, uniform or with a sum tree of priorities beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

import qfleet.core.replay.priorities as priorities
from qfleet.config import AgentConfig, ConfigError
from qfleet.core.replay import ring as rings
from qfleet.core.replay import sampling
from qfleet.core.replay.ring import NO_STEP, Ring, Row, is_overwritten, later_slot, take
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
    """`[segments]` int32, those of them that the segment's next row will make undrawable. Counted a row ahead: to read
    leaves that are about to change, XLA would copy all of them."""


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
    """`[segments]` uint32, `Ring.insertions` when it was drawn."""


class DrawShare(NamedTuple):
    """Some draws of a batch that is drawn from several replays as if they were one."""

    num_draws: Array
    """`[]` int32, that fall to this replay."""
    probability: Array
    """`[]` float32, of each draw of the batch to fall to it."""
    num_transitions: Array
    """`[]` float32, that may be drawn, in all of the replays."""


class Replay(NamedTuple):
    """The pure functions of a replay. States may be donated: every function writes in place then."""

    init: Callable[[], ReplayState]
    insert: Callable[..., ReplayState]
    """`insert(state, row, segment=0, td_error=None) -> state`: one step of all lanes of a segment. This completes the
    transitions that started n rows before: they enter with the priority of `td_error`, `[lanes]` float32, or with the
    greatest so far where that is NaN, or None."""
    seal: Callable[..., ReplayState]
    """`seal(state, lanes, segment=0)`: in these lanes of a segment, `[lanes]` bool, what was inserted last has no
    future but its next observation; insert that one with `NO_STEP`."""
    cut: Callable[[ReplayState, Array], ReplayState]
    """`cut(state, segment)`: nothing that is inserted later goes on where this segment is now."""
    sample: Callable[[ReplayState, Array, Array], Sample]
    """`sample(state, key, importance_exponent) -> sample`, once n_step + 1 rows are in. Uniform sampling ignores the
    exponent: its weights are 1."""
    sample_share: Callable[[ReplayState, Array, Array, DrawShare, Array, int], Sample]
    """`sample_share(state, key, importance_exponent, share, first, size) -> sample` of `size` draws of the share, from
    its `first` on; those beyond `share.num_draws` don't count. Of prioritised replay only, and of one that isn't divided
    over replicas."""
    set_priorities: Callable[[ReplayState, Sample, Array], ReplayState]
    """`set_priorities(state, sample, td_error) -> state`, with the errors of `sample.transition`; those of overwritten
    rows change nothing."""
    leaves: Callable[[ReplayState], Array | tuple[()]]
    """`leaves(state)`, what `SavedReplay` holds of the tree; the rest of it is the state's own."""
    restore: Callable[[SavedReplay], ReplayState]
    """`restore(saved) -> state`."""


def partition(state: ReplayState, axis: str) -> Any:
    """Returns how the state's arrays are spread over the replicas along a mesh axis, as `PartitionSpec`s."""
    mine, replicated = cast(Any, PartitionSpec(axis)), cast(Any, PartitionSpec())
    return ReplayState(
        ring=_partition_ring(axis),
        tree=jax.tree.map(lambda level: mine, state.tree),
        max_priority=replicated,
        num_transitions=mine,
        num_expiring=mine,
    )


def partition_saved(state: ReplayState, axis: str) -> Any:
    """Returns the same of what is saved of it."""
    leaves = cast(Any, PartitionSpec(None, axis)) if state.tree else ()
    return SavedReplay(_partition_ring(axis), leaves, cast(Any, PartitionSpec()))


def _partition_ring(axis: str) -> Any:
    lanes, replicated = cast(Any, PartitionSpec(None, axis)), cast(Any, PartitionSpec())
    return Ring(Row(lanes, lanes, lanes, lanes), replicated, replicated, replicated)


def make_replay(
    spec: EnvSpec, config: AgentConfig, num_lanes: int, replicas: Replicas = ALONE, num_segments: int = 1
) -> Replay:
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
            ring=rings.init_ring(num_rows, num_lanes, spec.observation_shape, spec.observation_dtype, num_segments),
            tree=priorities.init_tree(num_slots) if is_prioritised else (),
            max_priority=jnp.float32(1.0),
            num_transitions=jnp.zeros(1, jnp.int32),
            num_expiring=jnp.zeros(num_segments, jnp.int32),
        )

    def insert(state: ReplayState, row: Row, segment: Array | int = 0, td_error: Array | None = None) -> ReplayState:
        if not isinstance(state.tree, priorities.SumTree):
            return state._replace(ring=rings.insert_row(state.ring, row, segment))
        # This row completes the window of the one n steps before it, and overwrites the last frame of a stack.
        cursor = state.ring.cursor[segment]
        completed = (cursor - config.n_step) % num_rows
        broken = (cursor + spec.frame_stack - 1) % num_rows
        is_complete = state.ring.size[segment] >= config.n_step
        # Before its outcomes are read: the other way round XLA copies them all.
        ring = rings.insert_row(state.ring, row, segment)
        can_start = (rings.outcomes_at(ring, completed, segment) != NO_STEP) & is_complete
        lanes = segment * ring.lanes_per_segment + jnp.arange(ring.lanes_per_segment)
        priority, max_priority = state.max_priority, state.max_priority
        if td_error is not None:
            is_known = can_start & ~jnp.isnan(td_error)
            priority = jnp.where(is_known, priority_of(td_error), max_priority)
            max_priority = jnp.maximum(max_priority, jnp.max(jnp.where(is_known, priority, 0.0)))
        tree = priorities.set_leaves(
            state.tree,
            jnp.concatenate([broken * num_lanes + lanes, completed * num_lanes + lanes]),
            jnp.concatenate([jnp.zeros(len(lanes)), jnp.where(can_start, priority, 0.0)]),
        )
        expiring = priorities.get_leaves(tree, (broken + 1) % num_rows * num_lanes + lanes) > 0
        num_new = jnp.sum(can_start, dtype=jnp.int32) - state.num_expiring[segment]
        is_written = jnp.arange(num_segments) == segment
        return ReplayState(
            ring=ring,
            tree=tree,
            max_priority=max_priority,
            num_transitions=state.num_transitions + num_new,
            num_expiring=jnp.where(is_written, jnp.sum(expiring, dtype=jnp.int32), state.num_expiring),
        )

    def priority_of(td_error: Array) -> Array:
        return (jnp.abs(td_error) + MIN_PRIORITY) ** config.priority_exponent

    def seal(state: ReplayState, lanes: Array, segment: Array | int = 0) -> ReplayState:
        return state._replace(ring=rings.seal(state.ring, lanes, segment))

    def cut(state: ReplayState, segment: Array) -> ReplayState:
        return state._replace(ring=rings.cut(state.ring, segment))

    def sample(state: ReplayState, key: Array, importance_exponent: Array) -> Sample:
        if isinstance(state.tree, priorities.SumTree):
            slot, is_mine, weight = draw_by_priority(state, state.tree, key, importance_exponent)
        else:
            slot, is_mine, weight = sampling.draw_uniformly(
                state.ring, key, config.batch_size, config.n_step, spec.frame_stack, replicas
            )
        transition = transitions(state.ring, slot, weight)
        return Sample(replicas.deal(transition, is_mine), slot, is_mine, state.ring.insertions)

    def sample_share(
        state: ReplayState, key: Array, importance_exponent: Array, share: DrawShare, first: Array, size: int
    ) -> Sample:
        assert isinstance(state.tree, priorities.SumTree)
        uniforms, total = jax.random.uniform(key, (size,)), priorities.total(state.tree)
        slot, _, probability = priorities.sample_leaves(
            state.tree, uniforms, total[None], jnp.uint32(0), share.num_draws, first
        )
        weight = (share.num_transitions * share.probability * probability) ** -importance_exponent
        counts = first + jnp.arange(size) < share.num_draws
        return Sample(transitions(state.ring, slot, weight), slot, counts, state.ring.insertions)

    def transitions(ring: Ring, slot: Array, weight: Array) -> Transition:
        n_step_return, discount, num_steps = sampling.n_step_returns(ring, slot, config.n_step, config.discount)
        return Transition(
            obs=sampling.stacked_observations(ring, slot, spec.frame_stack),
            action=take(ring.rows.action, slot),
            reward=n_step_return,
            discount=discount,
            next_obs=sampling.stacked_observations(ring, later_slot(ring, slot, num_steps), spec.frame_stack),
            weight=weight,
        )

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
        priority = priority_of(replicas.gather(td_error).reshape(-1))
        # Also late: a slot whose oldest stacked frame is gone, for it can't be drawn any more.
        oldest = later_slot(state.ring, sample.slot, num_rows - spec.frame_stack + 1)
        is_late = is_overwritten(state.ring, oldest, sample.insertions)
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
        next_broken = jnp.repeat((saved.ring.cursor + spec.frame_stack - 1) % num_rows, saved.ring.lanes_per_segment)
        expiring = saved.leaves[next_broken, jnp.arange(num_lanes)] > 0
        return state._replace(
            tree=priorities.tree_of(saved.leaves.reshape(-1)),
            num_transitions=jnp.sum(saved.leaves > 0, dtype=jnp.int32)[None],
            num_expiring=jnp.sum(expiring.reshape(num_segments, -1), axis=1, dtype=jnp.int32),
        )

    return Replay(init, insert, seal, cut, sample, sample_share, set_priorities, leaves, restore)
