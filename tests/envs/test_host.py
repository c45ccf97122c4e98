"""Options of lanes."""

import math
from typing import Any

import pytest

from qfleet.config import ConfigError
from qfleet.envs.host import LaneOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_env_workers": -1}, "num_env_workers must be a whole number, at least 0, got -1"),
        ({"max_failures": -1}, "max_failures must be a whole number, at least 0, got -1"),
        ({"step_timeout_seconds": 0.0}, "step_timeout_seconds must be positive, got 0.0"),
        ({"step_timeout_seconds": math.nan}, "step_timeout_seconds must be finite, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaneOptions(**options)
