"""The filter: which gradients are applied, and which are dropped."""

import numpy as np

from qfleet.config import ParameterServerConfig
from qfleet.topologies.parameter_server.gradient_filter import GradientFilter


def test_stale_gradients_are_dropped_and_those_of_before_a_step_back():
    filter_ = GradientFilter(ParameterServerConfig(max_staleness=2))
    assert [filter_.decision(v, 10, 1.0) for v in (10, 8, 7)] == ["applied", "applied", "stale"]
    filter_.oldest_version = 10
    assert [filter_.decision(v, 10, 1.0) for v in (10, 9)] == ["applied", "stale"]


def test_gradients_of_unusual_loss_are_dropped_until_it_is_usual():
    filter_ = GradientFilter(ParameterServerConfig(max_loss_deviations=5.0))
    random = np.random.default_rng(0)
    assert filter_.decision(0, 0, 1e6) == "applied", "nothing is known yet"
    filter_ = GradientFilter(ParameterServerConfig(max_loss_deviations=5.0))
    losses = 1 + 0.1 * random.normal(size=500)
    assert {filter_.decision(0, 0, loss) for loss in losses} == {"applied"}
    assert filter_.decision(0, 0, 2.0) == "outlier"  # ten deviations
    assert filter_.decision(0, 0, 0.0) == "applied", "a small loss harms nobody"
    decisions = [filter_.decision(0, 0, 2.0) for _ in range(100)]
    assert decisions[0] == "outlier" and decisions[-1] == "applied", "and no loss is unusual for good"
    assert {filter_.decision(0, 0, loss) for loss in (np.inf, np.nan)} == {"applied"}, "the run fails of it"
    keeps_all = GradientFilter(ParameterServerConfig(max_loss_deviations=None))
    assert {keeps_all.decision(0, 0, loss) for loss in [*losses, 1e6]} == {"applied"}
