"""Statistics over seeds: the middle of several curves, and how far it can be trusted.

Source: Agarwal et al. 2021, arXiv 2108.13264 ("Deep reinforcement learning at the edge of the statistical precipice"),
sections 4.1 and 4.3, and their library rliable, whose numbers the tests check these functions against.
"""

from typing import NamedTuple

import numpy as np

FEWEST_SEEDS_OF_INTERVAL = 5
"""Fewest seeds whose bootstrap interval is worth anything. With fewer, a band is the interquartile range."""

NUM_RESAMPLES = 1_000
"""Resamples of a bootstrap. With more, the ends of a 95 % interval move by some percent of its width."""


class Band(NamedTuple):
    """The middle of several seeds, and a band around it, `[points]` each."""

    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray
    kind: str
    """What middle and band are, in words."""


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Returns the mean of the middle half of the seeds, `[...]`.

    A quarter of the seeds, rounded down, is left out at each end, as `scipy.stats.trim_mean` and rliable do.

    Args:
      scores: `[..., seeds]` float.
    """
    num_cut = scores.shape[-1] // 4
    ordered = np.sort(scores, axis=-1)
    middle: np.ndarray = ordered[..., num_cut : scores.shape[-1] - num_cut].mean(axis=-1)
    return middle


def bootstrap_interval(
    scores: np.ndarray, confidence: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of the percentile bootstrap interval of the interquartile mean of one task.

    Each resample draws as many seeds as there are, with replacement; all points of a curve use the same resamples.

    Args:
      scores: `[points, seeds]` float.
      confidence: probability that the interval is to have.
      num_resamples: number of resamples.
      seed: seed of the resampling.

    Returns:
      `[points]` float, twice.
    """
    num_seeds = scores.shape[-1]
    drawn = np.random.default_rng(seed).integers(num_seeds, size=(num_resamples, num_seeds))
    tail = (1 - confidence) / 2
    ends = [np.quantile(interquartile_mean(point[drawn]), [tail, 1 - tail]) for point in scores]
    low, high = np.array(ends).reshape(-1, 2).T
    return low, high


def band_of(scores: np.ndarray) -> Band:
    """Returns the middle of seeds and its band: from five on a bootstrap interval, below the interquartile range.

    Args:
      scores: `[points, seeds]` float, of two seeds or more.
    """
    if scores.shape[-1] >= FEWEST_SEEDS_OF_INTERVAL:
        kind = "interquartile mean, 95 % bootstrap interval"
        return Band(interquartile_mean(scores), *bootstrap_interval(scores), kind)
    low, median, high = np.quantile(scores, [0.25, 0.5, 0.75], axis=-1)
    return Band(median, low, high, "median, interquartile range")
