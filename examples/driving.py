"""Learns to drive on a motorway: overtake, keep right, don't crash. The actions are highway-env's five manoeuvres.

    pip install 'qfleet[driving]'
    python examples/driving.py [--num-env-workers N] [--env-steps N] [--eval-max-episode-steps N] [--run-dir DIR]

highway-env is slow (some 80 steps/s on a core), so worker processes are worth their cost. EnvPool has the same road and
is a hundred times faster: `pip install 'qfleet[envpool]'` and `--env envpool:highway-fast-v0`.
"""

import argparse

import qfleet


def main() -> None:
    """Trains and prints the mean return. A perfect drive of 30 s returns 30."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="highway_env:highway-fast-v0")
    parser.add_argument("--num-env-workers", type=int, default=2)
    parser.add_argument("--env-steps", type=int, default=60_000)
    parser.add_argument("--eval-max-episode-steps", type=int, help="cut evaluations short, for a quick try")
    parser.add_argument("--run-dir")
    arguments = parser.parse_args()

    config = qfleet.make_config(
        arguments.env,
        "double_dqn",
        num_envs=8,
        num_env_workers=0 if arguments.env.startswith("envpool:") else arguments.num_env_workers,
        n_step=3,
        discount=0.9,
        layer_norm=True,
        learning_rate=5e-4,
        replay_capacity=20_000,
        warmup_env_steps=min(1_000, arguments.env_steps // 2),
        env_steps_per_learner_step=2.0,
        exploration_env_steps=15_000,
        target_update_period=100,
        env_steps=arguments.env_steps,
        eval_period_env_steps=min(5_000, arguments.env_steps),
        eval_episodes=8,
        eval_max_episode_steps=arguments.eval_max_episode_steps,
        run_dir=arguments.run_dir,
    )
    for progress in qfleet.iterate(config):
        if progress.eval_return_mean is not None:
            print(f"{progress.env_steps:>7,} steps: mean greedy return {progress.eval_return_mean:.1f}")


if __name__ == "__main__":  # workers import this file too, and without this line they would train as well
    main()
