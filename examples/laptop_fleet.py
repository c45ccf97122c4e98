"""Trains with a fleet on one machine: Ray starts actors, a replay and a learner, each in a process of its own.

    pip install 'qfleet[ray]'
    python examples/laptop_fleet.py [--num-actors N] [--env-steps N] [--ray-address auto] [--run-dir DIR]

This is for trying out a fleet. The topology `fused` trains CartPole several times as fast, because nothing there leaves
the program. On a machine of a Ray cluster, `--ray-address auto` makes the same script train on the whole cluster.
docs/fleet.md explains the waiting times that it prints.
"""

import argparse

import qfleet


def main() -> None:
    """Trains, and prints how much of their time actors and learner spend waiting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-actors", type=int, default=2)
    parser.add_argument("--env-steps", type=int, default=60_000)
    parser.add_argument("--ray-address", default="local")
    parser.add_argument("--run-dir")
    arguments = parser.parse_args()

    config = qfleet.make_config(
        "CartPole-v1",
        "rainbow_lite",
        "actor-learner",
        num_actors=arguments.num_actors,
        lanes_per_actor=8,
        broadcast_period_learner_steps=50,
        actor_epsilon_exponent=3.0,  # of the paper's 7 with two actors, only one would explore
        ray_address=arguments.ray_address,
        env_steps=arguments.env_steps,
        stop_return=475,
        eval_period_env_steps=min(5_000, arguments.env_steps),
        run_dir=arguments.run_dir,
    )
    for progress in qfleet.iterate(config):
        if progress.eval_return_mean is not None and progress.fleet is not None:
            waiting = ", ".join(f"{name} {progress.fleet[f'{name}_waiting']:.0%}" for name in ("actors", "learner"))
            print(
                f"{progress.env_steps:>7,} steps: mean greedy return {progress.eval_return_mean:.1f}; "
                f"staleness {progress.staleness:.0f}; waiting: {waiting}"
            )


if __name__ == "__main__":
    main()
