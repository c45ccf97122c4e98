"""Environment steps/s of octax's own PQN in a game of octax; runs in the peers' environment.

Its arguments are the game and the number of lanes.
"""

import sys
from typing import Any

from octax.agents import PQNOctax
from octax.environments import create_environment
from octax.wrappers import OctaxGymnaxWrapper
from speed import print_speed

name, num_lanes = sys.argv[1], int(sys.argv[2])
rollout = num_lanes * 32
SETTINGS: dict[str, Any] = {  # from octax's conf/config.yaml, but for the numbers of lanes and steps
    "num_envs": num_lanes,
    "num_steps": 32,
    "num_epochs": 4,
    "num_minibatches": rollout // 512,
    "learning_rate": 5e-4,
    "total_timesteps": rollout,  # one rollout and what is learned from it
    "eval_freq": rollout,
    "skip_initial_evaluation": True,
}

game, _ = create_environment(name)
env = OctaxGymnaxWrapper(game)
agent = PQNOctax.create_agent({}, env, env.default_params)
# No evaluation, because our side is timed without it too.
algorithm = PQNOctax(
    env=env, env_params=env.default_params, agent=agent, eval_callback=lambda algorithm, state, key: (), **SETTINGS
)
print_speed(algorithm.train, rollout, num_repeats=1)
