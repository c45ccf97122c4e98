"""Actor-learner in a simulated world, with thousands of seeds."""

import pytest

pytest.importorskip("ray")

import small_fleets
from fleet_simulator import World
from simulated_replay import ActorLearnerRig
from simulated_rig import play_all

CONFIGS = [
    small_fleets.config_of(
        num_actors=num_actors, lanes_per_actor=1, num_replay_shards=num_shards, rows_per_chunk=4, batch_size=8,
        warmup_env_steps=16, n_step=1, env_steps_per_learner_step=ratio, env_steps=10**9, silence_seconds=10.0,
        max_restarts=10**6, learner_resources={"CPU": 1.0}, broadcast_period_learner_steps=4,
    )
    for num_actors, num_shards, ratio in ((1, 1, 4.0), (2, 1, 2.0), (3, 2, 4.0), (2, 2, 8.0))
]  # fmt: skip


def make_rig(world: World) -> ActorLearnerRig:
    return ActorLearnerRig(world, world.random.choice(CONFIGS))


def test_every_row_counts_once_and_the_ratio_is_kept_whatever_goes_wrong():
    play_all(make_rig)
