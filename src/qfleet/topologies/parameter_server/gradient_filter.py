"""The decision which gradients the server applies and which it drops."""

import math
from typing import Literal

from qfleet.config import ParameterServerConfig

Decision = Literal["applied", "stale", "outlier"]

_LOSS_DECAY = 0.999
"""Decay of the running mean and variance of the loss, per gradient."""

_MIN_LOSSES = 100
"""Losses that must have been seen before their mean and variance are trusted."""


class GradientFilter:
    """Decides about gradients, one after the other, in the order in which they arrive.

    Source: Nair et al. 2015, arXiv 1507.04296, section 5.1: gradients are dropped if they are too old, or if their loss
    is too far above the running mean.
    """

    def __init__(self, config: ParameterServerConfig) -> None:
        """Has seen no losses yet."""
        self._max_staleness, self._max_deviations = config.max_staleness, config.max_loss_deviations
        self.oldest_version = 0
        """Oldest version of the parameters that still counts. When the server goes back, it disowns those before."""
        self._mean = self._variance = 0.0
        self._num_losses = 0

    def decision(self, version: int, newest_version: int, loss: float) -> Decision:
        """Returns what becomes of a gradient.

        Args:
          version: version of the parameters that the gradient was computed with.
          newest_version: version that the server has, or will have once it has applied all gradients before this one.
          loss: loss of the gradient's batch, without importance weights.
        """
        is_stale = version < self.oldest_version or newest_version - version > self._max_staleness
        is_outlier = self._is_outlier(loss)
        self._note(loss)
        if is_stale:
            return "stale"
        return "outlier" if is_outlier else "applied"

    def _is_outlier(self, loss: float) -> bool:
        # A loss that is not finite must end the run. If it were dropped, the run would go on and never learn again.
        if self._max_deviations is None or self._num_losses < _MIN_LOSSES or not math.isfinite(loss):
            return False
        return loss > self._mean + self._max_deviations * math.sqrt(self._variance)

    def _note(self, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self._num_losses += 1
        weight = max(1 - _LOSS_DECAY, 1 / self._num_losses)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
