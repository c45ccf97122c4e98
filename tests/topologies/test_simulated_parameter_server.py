"""The parameter server in a simulated world, with thousands of seeds."""

import pytest

pytest.importorskip("ray")

import small_servers
from fleet_simulator import World
from simulated_rig import play, play_all
from simulated_server import ServerRig

CONFIGS = [
    small_servers.config_of(
        num_workers=num_workers, lanes_per_worker=1, num_server_shards=num_shards, num_replay_shards=num_replay_shards,
        rows_per_chunk=4, batch_size=8, warmup_env_steps=16, n_step=1, env_steps_per_learner_step=ratio,
        env_steps=10**9, silence_seconds=10.0, max_restarts=10**6, target_update_period=3, max_gradient_norm=norm,
        gradients_per_learner_step=num_gradients, max_staleness=staleness, snapshot_period_learner_steps=5,
    )
    for num_workers, num_shards, num_replay_shards, ratio, norm, num_gradients, staleness in (
        (1, 1, 0, 4.0, None, 1, 8), (3, 2, 0, 2.0, 10.0, 1, 2), (2, 2, 0, 4.0, None, 2, 0), (2, 1, 2, 4.0, None, 1, 8),
        (3, 2, 1, 4.0, 10.0, 1, 4), (2, 2, 1, 2.0, None, 1, 8),
    )
]  # fmt: skip


def make_rig(world: World) -> ServerRig:
    return ServerRig(world, world.random.choice(CONFIGS))


def test_all_shards_take_the_same_steps_and_none_of_before_a_rollback_whatever_goes_wrong():
    play_all(make_rig)


@pytest.mark.parametrize("seed", [1018, 1539])
def test_a_checkpoint_counts_the_steps_that_it_holds_though_a_shard_is_lost_meanwhile(seed):
    """In the first of these the shard is lost just after its reply, in the second its state on the way to it."""
    play(make_rig, seed)
