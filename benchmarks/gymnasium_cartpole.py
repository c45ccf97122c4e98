"""Environment steps/s on Gymnasium's own vector CartPole, in eight lanes, against Stable-Baselines3.

    python benchmarks/gymnasium_cartpole.py [--peers-python PATH] [--repeats N]

Both sides have the same replay ratio and rl-zoo's settings: two layers of 256, and one update of 64 per two environment
steps. The sides alternate, and medians are shown.
"""

import argparse
import statistics

import common

import qfleet

WARMUP, TIMED = 4_000, 40_000


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=str(common.HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    ours, theirs = [], []
    for _ in range(arguments.repeats):
        ours.append(common.env_steps_per_second(config(), WARMUP))
        theirs.append(float(common.peer(arguments.peers_python, "sb3_cartpole.py")["env_steps_per_second"]))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    common.report(
        "gymnasium_cartpole", [{"sb3": statistics.median(theirs), "qfleet": statistics.median(ours), "ratio": ratio}]
    )


def config() -> qfleet.TrainConfig:
    """Returns the config of a run of a few seconds."""
    return qfleet.make_config(
        "gym:CartPole-v1",
        "dqn",
        num_envs=8,
        hidden_sizes=(256, 256),
        batch_size=64,
        learning_rate=2.3e-3,
        env_steps_per_learner_step=2.0,
        target_update_period=5,
        warmup_env_steps=1_000,
        env_steps=WARMUP + TIMED,
        eval_period_env_steps=1_000_000,
    )


if __name__ == "__main__":
    main()
