"""Environment steps/s of rejax's PQN on CartPole, with rejax's settings for it; runs in the peers' environment."""

from typing import Any

from rejax import get_algo
from speed import print_speed

SETTINGS: dict[str, Any] = {  # from rejax's configs/gymnax/cartpole.yaml
    "env": "CartPole-v1",
    "num_envs": 16,
    "num_steps": 128,
    "num_minibatches": 16,
    "num_epochs": 5,
    "max_grad_norm": 10,
    "learning_rate": 0.0003,
    "total_timesteps": 524_288,
    "eval_freq": 524_288,
    "skip_initial_evaluation": True,
    "eps_start": 1,
    "eps_end": 0.05,
    "exploration_fraction": 0.5,
    "gamma": 0.99,
    "td_lambda": 0.9,
    "normalize_observations": False,
}

algorithm = get_algo("pqn").create(**SETTINGS)
# No evaluation, because our side is timed without it too.
algorithm = algorithm.replace(eval_callback=lambda algorithm, state, key: ())
print_speed(algorithm.train, SETTINGS["total_timesteps"])
