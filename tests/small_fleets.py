"""Settings of small runs with the actor-learner topology."""

import qfleet
from qfleet.config import TrainConfig

BATCH = 64


def config_of(env: str = "CartPole-v1", **settings) -> TrainConfig:
    sizes = {
        "num_actors": 4, "lanes_per_actor": 2, "num_replay_shards": 2, "rows_per_chunk": 8, "hidden_sizes": (16,),
        "batch_size": BATCH, "replay_capacity": 512, "warmup_env_steps": 64, "n_step": 3, "replay": "prioritised",
        "env_steps_per_learner_step": 4.0,
    }  # fmt: skip
    return qfleet.make_config(env, "dqn", "actor-learner", **{**sizes, **settings})
