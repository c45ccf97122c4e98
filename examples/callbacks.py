"""Steers a run by callbacks: stops it early, stops it after a time, and tells of what happens. Each takes three lines.

    python examples/callbacks.py [--patience N] [--seconds S] [--env-steps N] [--run-dir DIR]

A callback is any object with some of the methods on_progress, on_evaluation, on_checkpoint and on_end.
"""

import argparse
import time

import qfleet


class EarlyStopping:
    """Stops a run that hasn't been better for a number of evaluations."""

    def __init__(self, patience: int) -> None:
        self.patience, self.returns = patience, []

    def on_evaluation(self, control, progress):
        """Compares the newest evaluations with the ones before."""
        self.returns.append(progress.eval_return_mean)
        if max(self.returns) not in self.returns[-self.patience :]:
            control.stop(f"no better for {self.patience} evaluations")


class TimeLimit:
    """Stops a run after so many seconds of training."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()

    def on_progress(self, control, progress):
        """Looks at the clock."""
        if time.monotonic() - self.began > self.seconds:
            control.stop(f"{self.seconds:g} s are over")


class Notify:
    """Tells what happens. Send a mail or a message here instead."""

    def on_evaluation(self, control, progress):
        """Tells of an evaluation."""
        print(f"{progress.env_steps:>9,} steps: mean greedy return {progress.eval_return_mean:.1f}")

    def on_checkpoint(self, control, checkpoint):
        """Tells of a checkpoint."""
        print(f"{checkpoint.env_steps:>9,} steps: saved {checkpoint.path}{' (the best)' if checkpoint.is_best else ''}")

    def on_end(self, control, summary):
        """Tells how the run has ended, also if it has failed."""
        reason = summary.get("stop_reason") or summary["stopped"]
        print(f"{control.path}: ended after {summary['env_steps']:,} steps, {reason}")


def main() -> None:
    """Trains CartPole until one of the callbacks stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patience", type=int, default=10, help="evaluations")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--env-steps", type=int, default=500_000)
    parser.add_argument("--run-dir")
    arguments = parser.parse_args()

    config = qfleet.make_config(
        "CartPole-v1",
        env_steps=arguments.env_steps,
        eval_period_env_steps=min(10_000, arguments.env_steps),
        run_dir=arguments.run_dir,
    )
    qfleet.train(config, callbacks=[EarlyStopping(arguments.patience), TimeLimit(arguments.seconds), Notify()])


if __name__ == "__main__":
    main()
