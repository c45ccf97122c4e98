"""What is measured beside an evaluation to tell what is wrong when a run doesn't learn.

Nothing here takes part in training: the numbers come from the evaluation's episodes and from copies of the parameters.
"""

import jax
import numpy as np

from qfleet.core.normalisation import learned
from qfleet.runtime.evaluation import Episodes
from qfleet.topologies.base import Topology
from qfleet.topologies.mesh import leaves_of


def episode_measures(episodes: Episodes) -> dict[str, float]:
    """Returns the measures of an evaluation's episodes by name; those that aren't known are absent.

    Returns:
      `eval_value_mean`: mean over episodes of the greatest Q-value of the first observation.
      `eval_discounted_return_mean`: mean of what these values should be; see `Episodes.discounted_returns`.
      `eval_truncated_fraction`: share of episodes that didn't terminate.
      `dead_units_fraction`: share of hidden units that are dormant over the observations of all episodes.
    """
    means = {
        "eval_value_mean": episodes.first_values,
        "eval_discounted_return_mean": episodes.discounted_returns,
        "eval_truncated_fraction": None if episodes.has_terminated is None else ~episodes.has_terminated,
        "dead_units_fraction": episodes.dormant_fractions,
    }
    found = {name: float(np.mean(values)) for name, values in means.items() if values is not None}
    return {name: value for name, value in found.items() if name != "dead_units_fraction" or not np.isnan(value)}


class UpdateSizes:
    """How far the parameters move. It keeps a copy of them on the host."""

    def __init__(self) -> None:
        self._params: list[np.ndarray] | None = None  # at the previous evaluation, or at the beginning
        self._learner_steps = 0

    def begin(self, topology: Topology) -> None:
        """Copies the parameters, unless there is a copy already."""
        if self._params is None:
            self._params, self._learner_steps = _params_of(topology), topology.learner_steps

    def measure(self, topology: Topology) -> dict[str, float]:
        """Returns how far the parameters have come since the last call, by name; nothing without a learner step.

        Returns:
          `update_ratio`: norm of the change of the parameters, divided by the number of learner steps and by the norm
            that the parameters had before. Steps that undo each other don't count, so this is less than the size of one
            step.
        """
        before, learner_steps = self._params or [], self._learner_steps
        self._params, self._learner_steps = _params_of(topology), topology.learner_steps
        num_steps, norm = self._learner_steps - learner_steps, _norm(before)
        if num_steps <= 0 or not norm:
            return {}
        change = _norm([new - old for new, old in zip(self._params, before, strict=True)])
        return {"update_ratio": change / norm / num_steps}


def _params_of(topology: Topology) -> list[np.ndarray]:
    """Returns copies of what is learned; none if it is divided among processes, none of which has all of it."""
    leaves = jax.tree.leaves(learned(topology.params))
    is_here = all(not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated for x in leaves)
    return leaves_of(leaves) if is_here else []


def _norm(leaves: list[np.ndarray]) -> float:
    """Returns the Euclidean norm of all numbers together."""
    return float(np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in leaves)))
