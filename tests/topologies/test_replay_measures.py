"""What a replay tells about itself and about the episodes in it: numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core.replay import CONTINUED, NO_STEP, TERMINATED, TRUNCATED, Replay, ReplayState, Row, make_replay
from qfleet.core.types import EnvSpec
from qfleet.topologies.replay_measures import ReplayMeasures

SPEC = EnvSpec(name="rows", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2)


def make(replay: str = "uniform") -> Replay:
    return make_replay(SPEC, AgentConfig(replay=replay, replay_capacity=10), 2)  # type: ignore[arg-type]


def insert(replay: Replay, state: ReplayState, rewards: list[float], outcomes: list[np.uint8]) -> ReplayState:
    row = Row(jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32), jnp.array(rewards), jnp.array(outcomes))
    return jax.jit(replay.insert)(state, row)


def test_an_empty_replay_has_a_size_and_nothing_else() -> None:
    assert ReplayMeasures().read(make().init()) == {"replay_size": 0.0, "replay_age_mean": 0.0}


def test_steps_ages_rewards_and_ends_are_counted() -> None:
    """Three rows of two lanes: ages 0, 2 and 4 steps. Two episodes end, one of them at its time limit."""
    replay = make()
    state = insert(replay, replay.init(), [0.5, -3.0], [CONTINUED, TERMINATED])
    state = insert(replay, state, [1.0, 99.0], [TRUNCATED, NO_STEP])
    state = insert(replay, state, [99.0, 0.0], [NO_STEP, CONTINUED])
    assert ReplayMeasures().read(state) == {
        "replay_size": 6.0, "replay_age_mean": 2.0, "reward_abs_max": 3.0, "truncated_fraction": 0.5
    }  # fmt: skip


def test_each_row_is_read_once_also_where_the_ring_begins_again() -> None:
    """The ring has five rows. The second reading is of rows 4 and 0, the last of all that are left."""
    replay, measures = make(), ReplayMeasures()
    state = replay.init()
    for reward in (9.0, 1.0, 1.0, 1.0):
        state = insert(replay, state, [reward, 0.0], [CONTINUED, CONTINUED])
    assert measures.read(state)["reward_abs_max"] == 9.0
    for reward in (2.0, 3.0):
        state = insert(replay, state, [reward, 0.0], [CONTINUED, CONTINUED])
    assert measures.read(state)["reward_abs_max"] == 3.0
    assert "reward_abs_max" not in measures.read(state)
    for reward in (8.0, 4.0, 5.0, 6.0, 7.0, 4.0):
        state = insert(replay, state, [reward, 0.0], [CONTINUED, CONTINUED])
    assert measures.read(state) == {"replay_size": 10.0, "replay_age_mean": 4.0, "reward_abs_max": 7.0}


def test_priorities_are_those_of_the_transitions_that_can_be_drawn() -> None:
    replay = make("prioritised")
    state = replay.init()
    for _ in range(3):
        state = insert(replay, state, [0.0, 0.0], [CONTINUED, CONTINUED])
    measures = ReplayMeasures().read(state)
    assert (measures["priority_mean"], measures["priority_max"]) == (1.0, 1.0)  # all with the one of new transitions
    sample = replay.sample(state, jnp.zeros(2, jnp.uint32), jnp.float32(1))._replace(
        slot=jnp.array([0], jnp.uint32), is_mine=jnp.array([True])
    )
    state = replay.set_priorities(state, sample, jnp.array([32.0]))
    measures = ReplayMeasures().read(state)
    assert measures["priority_max"] == pytest.approx(32.0**0.6, rel=1e-3)
    assert measures["priority_mean"] == pytest.approx((32.0**0.6 + 3) / 4, rel=1e-3)
