"""Learns to land on the moon: Gymnasium's LunarLander-v3, until a mean greedy return of 220 is confirmed.

    pip install 'qfleet[box2d]'
    python examples/lunar_lander.py [--env-steps N] [--run-dir DIR]

It takes about a minute on two cores. The settings are the tuned ones of `double_dqn`. Sixteen landers step while the
learner learns.
"""

import argparse

import qfleet


def main() -> None:
    """Trains, then evaluates the policy that was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-steps", type=int, default=1_500_000)
    parser.add_argument("--run-dir")
    arguments = parser.parse_args()

    config = qfleet.make_config(
        "LunarLander-v3",
        "double_dqn",
        warmup_env_steps=min(5_000, arguments.env_steps // 2),
        stop_return=220,
        env_steps=arguments.env_steps,
        run_dir=arguments.run_dir,
    )
    run = qfleet.iterate(config)
    for progress in run:
        if progress.eval_return_mean is not None:
            print(f"{progress.env_steps:>9,} steps: mean greedy return {progress.eval_return_mean:.0f}")

    returns = qfleet.load(run.directory.path).evaluate(num_episodes=20)
    print(f"landed with a mean return of {returns.mean():.0f} over {len(returns)} episodes; see {run.directory.path}")


if __name__ == "__main__":
    main()
