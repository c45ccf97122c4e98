"""Learns Pong from pixels, by the standard protocol: four frames a step, 84x84 grey, and sticky actions if wanted.

    pip install 'qfleet[atari]'
    python examples/atari_pong.py [--sticky] [--env-steps N] [--eval-max-episode-steps N] [--run-dir DIR]

It takes a day on two cores and less than an hour on a GPU. Interrupt it with Ctrl-C and continue with `qfleet resume`.
"""

import argparse

import qfleet


def main() -> None:
    """Trains until the agent wins by 18 points on average."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sticky", action="store_true", help="repeat the last action with probability 0.25")
    parser.add_argument("--env-steps", type=int, default=10_000_000)
    parser.add_argument("--replay-capacity", type=int, default=200_000, help="frames; each takes 7 kB")
    parser.add_argument("--eval-max-episode-steps", type=int, help="cut evaluations short, for a quick try")
    parser.add_argument("--run-dir")
    arguments = parser.parse_args()

    config = qfleet.make_config(
        "ale:Pong",
        "atari_dqn",
        env_options={"repeat_action_probability": 0.25 if arguments.sticky else 0.0},
        double=True,
        replay_capacity=arguments.replay_capacity,
        warmup_env_steps=min(20_000, arguments.env_steps // 2),
        # Pong needs no more exploration than this, and Adam learns it sooner than the published RMSProp.
        exploration_end=0.01,
        exploration_env_steps=200_000,
        optimiser="adam",
        optimiser_options={"eps": 1.5e-4},
        learning_rate=1e-4,
        stop_return=18.0,
        env_steps=arguments.env_steps,
        eval_period_env_steps=min(100_000, arguments.env_steps),
        eval_episodes=4,
        eval_max_episode_steps=arguments.eval_max_episode_steps,
        run_dir=arguments.run_dir,
    )
    for progress in qfleet.iterate(config):
        points = "" if progress.eval_return_mean is None else f", greedy {progress.eval_return_mean:+.0f} points"
        print(f"{progress.env_steps:>10,} steps, {progress.new_env_steps / progress.train_seconds:,.0f}/s{points}")


if __name__ == "__main__":
    main()
