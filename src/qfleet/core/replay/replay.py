"""The replay: pure functions over one ring, with uniform sampling, or with a sum tree of priorities beside the ring.

What is said here of transitions holds for sequences too, which agents with a memory learn from.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

import qfleet.core.replay.priorities as priorities
from qfleet.config import AgentConfig, ConfigError
from qfleet.core.numbers import Numbers, numbers_of
from qfleet.core.replay import ring as rings
from qfleet.core.replay import sampling
from qfleet.core.replay.importance import are_normalised, normalise_weights
from qfleet.core.replay.ring import Ring, Row, is_overwritten, later_slot, take
from qfleet.core.replay.sequences import sequences
from qfleet.core.replay.window import Window, num_ring_rows, window_of
from qfleet.core.replicas import ALONE, Replicas
from qfleet.core.types import EnvSpec, Sequences, Transition

MIN_PRIORITY = 1e-6
"""Added to the absolute TD error, so that every transition can still be drawn (Schaul et al. 2016, section 3.3)."""


class ReplayState(NamedTuple):
    """Everything that a replay keeps."""

    ring: Ring
    tree: priorities.SumTree | tuple[()]
    """The leaf of a slot is the priority of the transition that starts there, to the power alpha. It is 0 where no
    transition can start. The tree is `()` when sampling is uniform."""
    max_priority: Array
    """`[]` float32, the greatest leaf ever set. New transitions enter with it."""
    num_transitions: Array
    """`[1]` int32, number of leaves above 0: the transitions that can be drawn by priority."""
    num_expiring: Array
    """`[segments]` int32, how many of these transitions the next row of each segment will make impossible to draw. They
    are counted one row ahead because XLA would copy the whole tree to read leaves that are about to change."""


class SavedReplay(NamedTuple):
    """What a replay must save to continue as if it had never stopped. It doesn't depend on the number of replicas."""

    ring: Ring
    leaves: Array | tuple[()]
    """`[rows, lanes]` float32, the leaves of the tree."""
    max_priority: Array
    """`[]` float32."""


class Sample(NamedTuple):
    """A batch, and where it came from."""

    transition: Transition | Sequences
    """This replica's share of the batch: transitions, or sequences if the agent has a memory."""
    slot: Array
    """`[batch]` uint32, the slot where each sample of the whole batch starts: `row * lanes + lane`."""
    is_mine: Array
    """`[batch]` bool, whether that slot is in this replica's ring."""
    insertions: Array
    """`[segments]` uint32, `Ring.insertions` at the time of the draw."""


class DrawShare(NamedTuple):
    """One replay's share of a batch that is drawn from several replays as if they were one."""

    num_draws: Array
    """`[]` int32, number of draws from this replay."""
    probability: Array
    """`[]` float32, probability that a draw of the batch is from this replay."""
    num_transitions: Array
    """`[]` float32, number of transitions that can be drawn, over all the replays."""


class Replay(NamedTuple):
    """The pure functions of a replay. If a state is donated, they change it in place."""

    init: Callable[[], ReplayState]
    """`init() -> state`, an empty replay."""
    insert: Callable[..., ReplayState]
    """`insert(state, row, segment=0, td_error=None) -> state` stores one step of all lanes of a segment.

    The row completes the transitions that started n rows earlier. They enter with the priority of `td_error`,
    `[lanes]` float32, or with the greatest priority so far where `td_error` is NaN or if it is None."""
    seal: Callable[..., ReplayState]
    """`seal(state, lanes, segment=0) -> state` cuts the newest step short in some lanes of a segment, `[lanes]` bool.
    The next row must hold the observation that this step led to, with the outcome `NO_STEP`."""
    cut: Callable[[ReplayState, Array], ReplayState]
    """`cut(state, segment) -> state` closes a segment: nothing that is inserted later continues its episodes."""
    sample: Callable[[ReplayState, Array, Array], Sample]
    """`sample(state, key, importance_exponent) -> sample`, once n_step + 1 rows are in the ring. Uniform sampling
    ignores the exponent: its weights are 1."""
    sample_share: Callable[[ReplayState, Array, Array, DrawShare, Array, int], Sample]
    """`sample_share(state, key, importance_exponent, share, first, size) -> sample` makes `size` draws of the share,
    beginning with draw `first`. Draws beyond `share.num_draws` don't count: `is_mine` is False for them. Weights are
    not normalised, because the rest of the batch is drawn elsewhere: `normalise_weights` does it for the whole batch.

    It needs prioritised replay, without replicas."""
    set_priorities: Callable[[ReplayState, Sample, Array], ReplayState]
    """`set_priorities(state, sample, priority) -> state`, with what the loss says of `sample.transition`, such as its
    TD errors, of which the absolute value counts; or of the whole batch, if the replicas have exchanged it already.
    Rows that have been overwritten since the draw are left as they are."""
    leaves: Callable[[ReplayState], Array | tuple[()]]
    """`leaves(state)` returns `SavedReplay.leaves`. The other fields of `SavedReplay` are in the state as they are."""
    restore: Callable[[SavedReplay], ReplayState]
    """`restore(saved) -> state`."""


def partition(state: ReplayState, axis: str) -> Any:
    """Returns how the state's arrays are spread over the replicas along a mesh axis, as `PartitionSpec`s."""
    mine, replicated = cast(Any, PartitionSpec(axis)), cast(Any, PartitionSpec())
    return ReplayState(
        ring=_partition_ring(state.ring, axis),
        tree=jax.tree.map(lambda level: mine, state.tree),
        max_priority=replicated,
        num_transitions=mine,
        num_expiring=mine,
    )


def partition_saved(state: ReplayState, axis: str) -> Any:
    """Returns how the arrays of a `SavedReplay` are spread over the replicas along a mesh axis, as `PartitionSpec`s."""
    leaves = cast(Any, PartitionSpec(None, axis)) if state.tree else ()
    return SavedReplay(_partition_ring(state.ring, axis), leaves, cast(Any, PartitionSpec()))


def _partition_ring(ring: Ring, axis: str) -> Any:
    lanes, replicated = cast(Any, PartitionSpec(None, axis)), cast(Any, PartitionSpec())
    return Ring(jax.tree.map(lambda rows: lanes, ring.rows), replicated, replicated, replicated)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What all functions of one replay know."""

    config: AgentConfig
    spec: EnvSpec
    """Shapes of the stored observations."""
    replicas: Replicas
    num_rows: int
    num_lanes: int
    """Lanes of this replica."""
    num_segments: int
    carry_size: int
    window: Window
    numbers: Numbers

    @property
    def num_slots(self) -> int:
        return self.num_rows * self.num_lanes


def make_replay(
    spec: EnvSpec,
    config: AgentConfig,
    num_lanes: int,
    replicas: Replicas = ALONE,
    num_segments: int = 1,
    carry_size: int = 0,
    numbers: Numbers | None = None,
) -> Replay:
    """Returns the replay that `config` describes, for `num_lanes` lanes of `spec`'s environment.

    With replicas, each replica has an equal share of the lanes, and keeps what its lanes produce. All replicas must
    call the functions together. They draw from all of their rings as if these were one: each transition has the
    probability and the weight that it would have there.

    Args:
      spec: shapes of the stored observations.
      config: what is drawn, and how.
      num_lanes: lanes over all replicas.
      replicas: the replicas.
      num_segments: segments that are written each at its own pace.
      carry_size: numbers that the network remembers of each lane, and that are stored with each row; 0 without memory.
      numbers: replace those of `config`.

    Raises:
      ConfigError: if the capacity is too small for one window of each lane.
    """
    num_rows, window = num_ring_rows(config, num_lanes), window_of(config, spec.frame_stack)
    _check_capacity(config, num_rows, num_lanes, window)
    numbers = numbers_of(config) if numbers is None else numbers
    num_own = num_lanes // replicas.size
    settings = _Settings(config, spec, replicas, num_rows, num_own, num_segments, carry_size, window, numbers)
    return Replay(
        init=functools.partial(_init, settings),
        insert=functools.partial(_insert, settings),
        seal=_seal,
        cut=_cut,
        sample=functools.partial(_sample, settings),
        sample_share=functools.partial(_sample_share, settings),
        set_priorities=functools.partial(_set_priorities, settings),
        leaves=functools.partial(_leaves, settings),
        restore=functools.partial(_restore, settings),
    )


def _check_capacity(config: AgentConfig, num_rows: int, num_lanes: int, window: Window) -> None:
    terms = {"n_step": config.n_step, "frame_stack": window.frame_stack}
    if config.learns_sequences:
        lengths = {"burn_in": config.burn_in, "sequence_length": config.sequence_length}
        terms = {**lengths, **terms, "sequence_period": window.period}
    one_more = 0 if config.learns_sequences else 1
    fewest_rows = sum(terms.values()) + one_more
    if num_rows < fewest_rows:
        *found, last = (f"{name}={value}" for name, value in terms.items())
        raise ConfigError(
            f"replay_capacity must hold at least {' + '.join(terms)}{' + 1' * one_more} steps of each lane, got "
            f"replay_capacity={config.replay_capacity} for {num_lanes} lanes, {', '.join(found)} and {last}; "
            f"try {-(-fewest_rows // window.period) * window.period * num_lanes}"
        )


def _init(settings: _Settings) -> ReplayState:
    spec, num_segments = settings.spec, settings.num_segments
    return ReplayState(
        ring=rings.init_ring(
            settings.num_rows,
            settings.num_lanes,
            spec.observation_shape,
            spec.observation_dtype,
            num_segments,
            settings.carry_size,
        ),
        tree=priorities.init_tree(settings.num_slots) if settings.config.replay == "prioritised" else (),
        max_priority=jnp.float32(1.0),
        num_transitions=jnp.zeros(1, jnp.int32),
        num_expiring=jnp.zeros(num_segments, jnp.int32),
    )


def _insert(
    settings: _Settings, state: ReplayState, row: Row, segment: Array | int = 0, td_error: Array | None = None
) -> ReplayState:
    if not isinstance(state.tree, priorities.SumTree):
        return state._replace(ring=rings.insert_row(state.ring, row, segment))
    num_rows, num_lanes, window = settings.num_rows, settings.num_lanes, settings.window
    # The row completes the window of one older row, and overwrites the oldest stacked frame of another, which expires.
    cursor = state.ring.cursor[segment]
    completed = (cursor - window.num_after) % num_rows
    expired = (cursor + settings.spec.frame_stack - 1) % num_rows
    is_complete = state.ring.size[segment] >= window.num_after
    # The row is inserted before any outcome is read: in the other order XLA copies all outcomes.
    ring = rings.insert_row(state.ring, row, segment)
    learned = (completed + window.first_learned) % num_rows if window.first_learned else completed
    can_start = rings.hold_a_step(ring, learned, window.num_learned, segment) & is_complete
    if window.period > 1:
        can_start &= completed % window.period == 0
    lanes = segment * ring.lanes_per_segment + jnp.arange(ring.lanes_per_segment)
    priority, max_priority = _entry_priority(settings, state.max_priority, can_start, td_error)
    tree = priorities.set_leaves(
        state.tree,
        jnp.concatenate([expired * num_lanes + lanes, completed * num_lanes + lanes]),
        jnp.concatenate([jnp.zeros(len(lanes)), jnp.where(can_start, priority, 0.0)]),
    )
    is_expiring = priorities.get_leaves(tree, (expired + 1) % num_rows * num_lanes + lanes) > 0
    num_new = jnp.sum(can_start, dtype=jnp.int32) - state.num_expiring[segment]
    is_written = jnp.arange(settings.num_segments) == segment
    return ReplayState(
        ring=ring,
        tree=tree,
        max_priority=max_priority,
        num_transitions=state.num_transitions + num_new,
        num_expiring=jnp.where(is_written, jnp.sum(is_expiring, dtype=jnp.int32), state.num_expiring),
    )


def _entry_priority(
    settings: _Settings, max_priority: Array, can_start: Array, td_error: Array | None
) -> tuple[Array, Array]:
    """Returns the priority with which each lane's transition enters, `[lanes]` or `[]`, and the greatest so far."""
    if td_error is None:
        return max_priority, max_priority
    is_known = can_start & ~jnp.isnan(td_error)
    priority = jnp.where(is_known, _priority_of(settings, td_error), max_priority)
    return priority, jnp.maximum(max_priority, jnp.max(jnp.where(is_known, priority, 0.0)))


def _priority_of(settings: _Settings, priority: Array) -> Array:
    """Returns the leaf of a transition."""
    return (jnp.abs(priority) + MIN_PRIORITY) ** settings.numbers.priority_exponent


def _seal(state: ReplayState, lanes: Array, segment: Array | int = 0) -> ReplayState:
    return state._replace(ring=rings.seal(state.ring, lanes, segment))


def _cut(state: ReplayState, segment: Array) -> ReplayState:
    return state._replace(ring=rings.cut(state.ring, segment))


def _sample(settings: _Settings, state: ReplayState, key: Array, importance_exponent: Array) -> Sample:
    config, replicas = settings.config, settings.replicas
    if isinstance(state.tree, priorities.SumTree):
        slot, is_mine, weight = _draw_by_priority(settings, state, state.tree, key, importance_exponent)
    else:
        slot, is_mine, weight = sampling.draw_uniformly(state.ring, key, config.batch_size, settings.window, replicas)
    transition = _samples(settings, state.ring, slot, weight)
    if not are_normalised(config):
        share, _ = replicas.deal(transition, is_mine, ())
        return Sample(share, slot, is_mine, state.ring.insertions)
    share, weights = replicas.deal(transition, is_mine, transition.weight)
    share = normalise_weights(share, config, weights=weights)
    return Sample(share, slot, is_mine, state.ring.insertions)


def _draw_by_priority(
    settings: _Settings, state: ReplayState, tree: priorities.SumTree, key: Array, importance_exponent: Array
) -> tuple[Array, Array, Array]:
    """Returns slots, whether each is in this replica's ring, and importance weights before they are normalised.

    Each is `[batch]`.
    """
    replicas = settings.replicas
    uniforms = jax.random.uniform(key, (settings.config.batch_size,))
    shares = replicas.gather(jnp.stack([priorities.total(tree), state.num_transitions[0].astype(jnp.float32)]))
    slot, is_mine, probability = priorities.sample_leaves(tree, uniforms, shares[:, 0], replicas.rank())
    return slot, is_mine, (jnp.sum(shares[:, 1]) * probability) ** -importance_exponent


def _sample_share(
    settings: _Settings,
    state: ReplayState,
    key: Array,
    importance_exponent: Array,
    share: DrawShare,
    first: Array,
    size: int,
) -> Sample:
    assert isinstance(state.tree, priorities.SumTree)
    uniforms, total = jax.random.uniform(key, (size,)), priorities.total(state.tree)
    slot, _, probability = priorities.sample_leaves(
        state.tree, uniforms, total[None], jnp.uint32(0), share.num_draws, first
    )
    weight = (share.num_transitions * share.probability * probability) ** -importance_exponent
    counts = first + jnp.arange(size) < share.num_draws
    return Sample(_samples(settings, state.ring, slot, weight), slot, counts, state.ring.insertions)


def _samples(settings: _Settings, ring: Ring, slot: Array, weight: Array) -> Transition | Sequences:
    """Returns what starts at these slots, `[batch]`, with these importance weights."""
    config, frame_stack, discount = settings.config, settings.spec.frame_stack, settings.numbers.discount
    if config.learns_sequences:
        return sequences(ring, slot, weight, config, discount, frame_stack)
    n_step_return, discount, num_steps = sampling.n_step_returns(ring, slot, config.n_step, discount)
    return Transition(
        obs=sampling.stacked_observations(ring, slot, frame_stack),
        action=take(ring.rows.action, slot),
        reward=n_step_return,
        discount=discount,
        next_obs=sampling.stacked_observations(ring, later_slot(ring, slot, num_steps), frame_stack),
        weight=weight,
    )


def _set_priorities(settings: _Settings, state: ReplayState, sample: Sample, priority: Array) -> ReplayState:
    if not isinstance(state.tree, priorities.SumTree):
        return state
    if len(priority) < len(sample.slot):
        priority = settings.replicas.gather(priority).reshape(-1)
    value = _priority_of(settings, priority)
    # A transition whose oldest stacked frame has been overwritten can't be drawn any more, so it must keep priority 0.
    oldest = later_slot(state.ring, sample.slot, settings.num_rows - settings.spec.frame_stack + 1)
    is_late = is_overwritten(state.ring, oldest, sample.insertions)
    leaf = jnp.where(is_late | ~sample.is_mine, jnp.uint32(settings.num_slots), sample.slot)
    return state._replace(
        tree=priorities.set_leaves(state.tree, leaf, value),
        max_priority=jnp.maximum(state.max_priority, jnp.max(value)),
    )


def _leaves(settings: _Settings, state: ReplayState) -> Array | tuple[()]:
    if not isinstance(state.tree, priorities.SumTree):
        return ()
    return state.tree.levels[0][: settings.num_slots].reshape(settings.num_rows, settings.num_lanes)


def _restore(settings: _Settings, saved: SavedReplay) -> ReplayState:
    state = _init(settings)._replace(ring=saved.ring, max_priority=saved.max_priority)
    if isinstance(saved.leaves, tuple):
        return state
    next_expired = (saved.ring.cursor + settings.spec.frame_stack - 1) % settings.num_rows
    is_expiring = (
        saved.leaves[jnp.repeat(next_expired, saved.ring.lanes_per_segment), jnp.arange(settings.num_lanes)] > 0
    )
    return state._replace(
        tree=priorities.tree_of(saved.leaves.reshape(-1)),
        num_transitions=jnp.sum(saved.leaves > 0, dtype=jnp.int32)[None],
        num_expiring=jnp.sum(is_expiring.reshape(settings.num_segments, -1), axis=1, dtype=jnp.int32),
    )
