"""Which gradients the server of `qfleet.topologies.parameter_server` applies, and which it drops."""

import math
from typing import Literal

from qfleet.config import ParameterServerConfig

Verdict = Literal["applied", "stale", "outlier"]

_MEMORY = 0.999
"""Decay of the running mean and variance of the loss, per gradient."""

_TRUSTED_AFTER = 100
"""Gradients after which these are believed."""


class Gate:
    """Judges gradients in the order in which they come.

    Source: Nair et al. 2015, arXiv 1507.04296, section 5.1: gradients that are too old, or whose loss is too far above
    the running mean, are left out.
    """

    def __init__(self, config: ParameterServerConfig) -> None:
        self._max_staleness, self._max_deviations = config.max_staleness, config.max_loss_deviations
        self.oldest_version = 0
        """Of parameters that count: the server has gone back behind those before."""
        self._mean = self._variance = 0.0
        self._num_losses = 0

    def verdict(self, version: int, newest_version: int, loss: float) -> Verdict:
        """Returns what becomes of a gradient.

        Args:
          version: of the parameters that it was computed with.
          newest_version: that the server has, or will have once it has applied all that came before.
          loss: of its batch.
        """
        is_stale = version < self.oldest_version or newest_version - version > self._max_staleness
        is_outlier = self._is_outlier(loss)
        self._note(loss)
        if is_stale:
            return "stale"
        return "outlier" if is_outlier else "applied"

    def _is_outlier(self, loss: float) -> bool:
        if self._max_deviations is None or self._num_losses < _TRUSTED_AFTER or not math.isfinite(loss):
            return False  # of a loss that isn't finite the run must fail, and not go on without ever learning
        return loss > self._mean + self._max_deviations * math.sqrt(self._variance)

    def _note(self, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self._num_losses += 1
        weight = max(1 - _MEMORY, 1 / self._num_losses)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
