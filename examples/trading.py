"""Learns to trade one asset, in an environment of your own: a plain Gymnasium environment, registered in one line.

    python examples/trading.py [--env-steps N] [--run-dir DIR]

Prices are generated but look real: volatility comes in clusters, and prices are drawn back to a slowly moving mean. So
there is something to learn, and buying and holding is a fair opponent. This is not financial advice.
"""

import argparse
from typing import Any

import gymnasium
import numpy as np

import qfleet

WINDOW = 16  # daily returns that the agent sees
EPISODE_DAYS = 250
COST = 0.0005  # of trading, as a fraction of the amount traded


def generate_prices(rng: np.random.Generator, num_days: int) -> np.ndarray:
    """Returns daily prices, `[num_days]`: GARCH(1,1) volatility, and a pull towards an exponential moving average."""
    log_price, mean, variance, shock = np.zeros(num_days), 0.0, 1e-4, 0.0
    for day in range(1, num_days):
        variance = 2e-6 + 0.08 * shock**2 + 0.9 * variance
        shock = rng.standard_normal() * np.sqrt(variance)
        log_price[day] = log_price[day - 1] + 2e-4 + 0.15 * (mean - log_price[day - 1]) + shock
        mean += 0.1 * (log_price[day] - mean)
    return 100 * np.exp(log_price)


class TradingEnv(gymnasium.Env):
    """Each day: sell short, stay out, or hold. The reward is the log return of the day in percent, after costs."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (WINDOW + 2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts a year with new prices and without a position."""
        super().reset(seed=seed)
        self._log_prices = np.log(generate_prices(self.np_random, WINDOW + EPISODE_DAYS + 1))
        self._day, self._position = WINDOW, 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Holds the position `action - 1` for one day."""
        cost = COST * abs(int(action) - 1 - self._position)
        self._position = int(action) - 1
        self._day += 1
        change = self._log_prices[self._day] - self._log_prices[self._day - 1]
        is_last = self._day == WINDOW + EPISODE_DAYS
        # The year ends but the market doesn't. So the episode is truncated, and its last state still has a value.
        return self._observe(), 100 * (self._position * change - cost), False, is_last, {}

    def _observe(self) -> np.ndarray:
        recent = 100 * np.diff(self._log_prices[self._day - WINDOW : self._day + 1])
        return np.array([*recent, recent.sum() / 4, self._position], np.float32)


gymnasium.register("Trading-v0", TradingEnv)


def main() -> None:
    """Trains, then trades twenty years that the agent has never seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-steps", type=int, default=400_000)
    parser.add_argument("--run-dir")
    arguments = parser.parse_args()

    config = qfleet.make_config(
        "Trading-v0",
        "double_dqn",
        num_envs=16,
        n_step=3,
        discount=0.95,
        layer_norm=True,
        hidden_sizes=(64, 64),
        learning_rate=3e-4,
        warmup_env_steps=min(5_000, arguments.env_steps // 2),
        exploration_env_steps=100_000,
        env_steps=arguments.env_steps,
        eval_period_env_steps=min(50_000, arguments.env_steps),
        run_dir=arguments.run_dir,
    )
    run = qfleet.iterate(config)
    for progress in run:
        if progress.eval_return_mean is not None:
            print(f"{progress.env_steps:>8,} steps: {progress.eval_return_mean:+.1f} % a year")

    rng = np.random.default_rng(1)
    years = [np.log(generate_prices(rng, WINDOW + EPISODE_DAYS + 1)) for _ in range(200)]
    holding = np.mean([100 * (year[-1] - year[WINDOW]) for year in years])
    learned = qfleet.load(run.directory.path).evaluate(num_episodes=20).mean()
    print(f"learned: {learned:+.1f} % a year; buying and holding: {holding:+.1f} %")


if __name__ == "__main__":
    main()
