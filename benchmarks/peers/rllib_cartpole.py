"""RLlib's DQN on CartPole with two environment runners, on RLlib's new API stack; runs in the peers' environment.

    python rllib_cartpole.py speed [--settings example] [--seconds 60]
    python rllib_cartpole.py solve [--settings example] [--seed 0] [--timeout-seconds 600]

`speed` prints environment steps/s once RLlib learns, and transitions trained per environment step, both from RLlib's
own counters. `solve` prints the seconds from the start of this process until 20 greedy episodes have a mean return of
475 and 100 fresh ones confirm it. The episodes are played after each of RLlib's iterations, every 1,000 environment
steps, and the seconds that they take aren't counted.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

NUM_ENV_RUNNERS = 2
WARMUP = 2_000  # environment steps; learning begins after 1,000
SOLVED = 475


def main() -> None:
    """Measures what the command line says on a Ray cluster of its own, and prints one JSON line once Ray has ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "solve"))
    parser.add_argument("--settings", choices=("default", "example"), default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="least time to measure speed for")
    parser.add_argument("--timeout-seconds", type=float, default=600.0, help="time after which solve gives up")
    parser.add_argument("--torch-threads", type=int, default=0, help="threads of the learner; with 0, PyTorch chooses")
    arguments = parser.parse_args()
    if arguments.torch_threads:
        torch.set_num_threads(arguments.torch_threads)
    config = make_config(arguments.settings, arguments.seed)
    # Each runner asks for a CPU. Without "local", an address in an environment variable would make it join another Ray.
    ray.init("local", num_cpus=NUM_ENV_RUNNERS + 1, include_dashboard=False, log_to_driver=False)
    try:
        algorithm = config.build_algo()
        try:
            if arguments.what == "speed":
                result = speed(algorithm, config, arguments.seconds)
            else:
                result = solve(algorithm, arguments.timeout_seconds)
        finally:
            algorithm.stop()
    finally:
        ray.shutdown()
    print(json.dumps({**result, "torch_threads": torch.get_num_threads()}))


def make_config(settings: str, seed: int) -> DQNConfig:
    """Returns RLlib's defaults, or the settings of RLlib's example for CartPole, which isn't part of its package."""
    config = DQNConfig().environment("CartPole-v1").env_runners(num_env_runners=NUM_ENV_RUNNERS)
    config.debugging(seed=seed, log_level="ERROR")
    if settings == "example":  # rllib/examples/algorithms/dqn/cartpole_dqn.py, where it differs from the defaults
        config.training(n_step=(2, 5), epsilon=[(0, 1.0), (10_000, 0.02)])
        config.rl_module(
            model_config=DefaultModelConfig(
                fcnet_hiddens=[256],
                fcnet_activation="tanh",
                fcnet_bias_initializer="zeros_",
                head_fcnet_hiddens=[256],
                head_fcnet_bias_initializer="zeros_",
            )
        )
    return config


def speed(algorithm: Algorithm, config: DQNConfig, seconds: float) -> dict[str, Any]:
    """Returns RLlib's speed, measured over whole iterations for at least the given time."""
    while (start := counters(algorithm.train()))[0] < WARMUP:
        pass
    started, spent = time.perf_counter(), 0.0
    while spent < seconds:
        end = counters(algorithm.train())
        spent = time.perf_counter() - started
    env_steps, transitions = (int(b - a) for a, b in zip(start, end, strict=True))
    return {
        "env_steps_per_second": env_steps / spent,
        "learner_steps_per_second": transitions / config.total_train_batch_size / spent,
        "replay_ratio": transitions / env_steps,
        "batch_size": config.total_train_batch_size,
        "env_steps": env_steps,
        "seconds": spent,
    }


def counters(result: dict[str, Any]) -> tuple[float, float]:
    """Returns the environment steps taken and the transitions trained since the beginning."""
    trained = result.get("learners", {}).get("__all_modules__", {}).get("num_env_steps_trained_lifetime", 0)
    return float(result["env_runners"]["num_env_steps_sampled_lifetime"]), float(trained)


def solve(algorithm: Algorithm, timeout_seconds: float) -> dict[str, Any]:
    """Returns when CartPole was solved, or how far training got."""
    evaluating, best, is_solved, wall_seconds = 0.0, 0.0, False, 0.0
    while not is_solved and wall_seconds < timeout_seconds:
        result = algorithm.train()
        stopped_training = seconds_since_process_start()
        wall_seconds = stopped_training - evaluating
        greedy_return = play(algorithm, num_episodes=20, seed=0)
        best = max(best, greedy_return)
        is_solved = greedy_return >= SOLVED and play(algorithm, num_episodes=100, seed=1) >= SOLVED
        evaluating += seconds_since_process_start() - stopped_training
    return {
        "solved": int(is_solved),
        "wall_seconds": wall_seconds,
        "env_steps": int(counters(result)[0]),
        "greedy_return": greedy_return,
        "best_greedy_return": best,
        "training_return": float(result["env_runners"].get("episode_return_mean", np.nan)),
        "evaluation_seconds": evaluating,
    }


def play(algorithm: Algorithm, num_episodes: int, seed: int) -> float:
    """Returns the mean greedy return of one episode in each of `num_episodes` lanes."""
    module = algorithm.get_module()
    envs = gymnasium.make_vec("CartPole-v1", num_envs=num_episodes, vectorization_mode="vector_entry_point")
    obs, _ = envs.reset(seed=seed)
    returns, has_ended = np.zeros(num_episodes), np.zeros(num_episodes, bool)
    with torch.no_grad():
        while not has_ended.all():
            actions = module.forward_inference({"obs": torch.as_tensor(obs, dtype=torch.float32)})["actions"]
            obs, reward, terminated, truncated, _ = envs.step(actions.numpy())
            returns += np.where(has_ended, 0.0, reward)
            has_ended |= terminated | truncated
    return float(returns.mean())


def seconds_since_process_start() -> float:
    """Returns the seconds since this process started, according to Linux, so that imports count."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
