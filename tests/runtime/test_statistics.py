"""Statistics over seeds, against numbers of rliable 1.2.0 (50,000 resamples) and by hand."""

import numpy as np
import pytest

from qfleet.runtime.statistics import band_of, bootstrap_interval, interquartile_mean

FIVE = [296.7, 113.3, 57.4, 9.1, 39.0]
EIGHT = [98.8, 66.5, 32.1, 118.5, 161.7, 84.9, 123.7, 72.1]
TWENTY = [
    *(281.0, 68.6, 38.2, 154.3, 89.4, 35.5, 102.5, 57.8, 85.0, 211.0),
    *(96.5, 70.8, 127.0, 70.2, 99.0, 136.3, 16.0, 35.3, 138.0, 7.2),
]


@pytest.mark.parametrize(
    ("scores", "middle", "low", "high"),
    [(FIVE, 69.9, 19.0667, 235.5667), (EIGHT, 93.575, 65.3, 123.7), (TWENTY, 86.68, 60.6095, 114.71)],
)
def test_the_interquartile_mean_and_its_interval_are_those_of_rliable(
    scores: list[float], middle: float, low: float, high: float
) -> None:
    np.testing.assert_allclose(interquartile_mean(np.array(scores)), middle, rtol=1e-12)
    ours = bootstrap_interval(np.array([scores]), num_resamples=50_000)
    np.testing.assert_allclose(np.ravel(ours), [low, high], rtol=0.01)


def test_all_points_of_a_curve_use_the_same_resamples() -> None:
    low, high = bootstrap_interval(np.array([FIVE, FIVE, EIGHT[:5]]))
    assert (low[0], high[0]) == (low[1], high[1]) and low[2] != low[0]


def test_few_seeds_have_a_median_and_an_interquartile_range() -> None:
    band = band_of(np.array([[0.0, 4.0, 1.0], [5.0, 5.0, 5.0]]))
    assert band.kind == "median, interquartile range"
    np.testing.assert_allclose([band.middle, band.low, band.high], [[1, 5], [0.5, 5], [2.5, 5]])
    assert band_of(np.array([FIVE])).kind.startswith("interquartile mean, 95 %")
