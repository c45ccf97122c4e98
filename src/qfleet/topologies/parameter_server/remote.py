"""The processes of the parameter server, as Ray runs them. Their methods take and return references to arrays.

The shards of a replay that the workers share are `fleet.remote.RemoteReplayShard`.
"""

from collections.abc import Sequence

import numpy as np

from qfleet.core.replay import SavedReplay
from qfleet.core.sharded_learner import StateLeaves
from qfleet.core.types import Transition
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess
from qfleet.topologies.fleet.replay_shard import ShardStats
from qfleet.topologies.parameter_server.requests import ChunkAnswer, GradientAnswer, PublishedAnswer, Pull
from qfleet.topologies.parameter_server.server_shard import PublishedParameters, ServerShard
from qfleet.topologies.parameter_server.worker import GradientReply, Worker

# --- Workers ---


class RemoteWorker(InRemoteProcess, Worker):
    """A worker in a process of its own."""

    def pull_and_act(self, pull: Pull, exploration: float) -> ChunkAnswer:
        """Pulls, and does what `act` does."""
        self._pull(pull)
        reply = self.act(exploration)
        chunk = None if reply.chunk is None else Reference(reply.chunk)
        return ChunkAnswer(reply.chunk_stats, reply.shard_stats, chunk)

    def pull_and_differentiate(self, pull: Pull, importance_exponent: float) -> GradientAnswer:
        """Pulls, and does what `compute_gradient` does."""
        self._pull(pull)
        return _referring(self.compute_gradient(importance_exponent))

    def pull_and_differentiate_batch(
        self, pull: Pull, places: Sequence[np.ndarray], shares: Sequence[Reference[Transition]]
    ) -> GradientAnswer:
        """Pulls, and does what `compute_gradient_of` does."""
        self._pull(pull)
        return _referring(self.compute_gradient_of(places, [share.value for share in shares]))

    def saved(self) -> Reference[SavedReplay]:
        """Does what `snapshot` does."""
        return Reference(self.snapshot())

    def go_on_from(self, saved: Reference[SavedReplay]) -> ShardStats:
        """Does what `restore` does."""
        return self.restore(saved.copy())

    def _pull(self, pull: Pull) -> None:
        if pull.version != self.version:
            params, target_params = ([piece.value for piece in pieces] for pieces in (pull.params, pull.target_params))
            self.pull(pull.version, params, target_params)


def _referring(reply: GradientReply) -> GradientAnswer:
    # As bytes, because arrays of bfloat16 would be copied more often on their way.
    pieces = tuple(Reference(piece.view(np.uint8)) for piece in reply.pieces)
    return GradientAnswer(reply.result, pieces, tuple(map(Reference, reply.priorities)))


# --- Shards of the server ---


class RemoteServerShard(InRemoteProcess, ServerShard):
    """A shard of the server in a process of its own."""

    def take_steps(self, gradients: Sequence[Reference[np.ndarray]]) -> PublishedAnswer:
        """Does what `apply_gradients` does."""
        return _published(self.apply_gradients(self._arrays(gradients)))

    def average(self, gradients: Sequence[Reference[np.ndarray]]) -> tuple[float, Reference[list[float]]]:
        """Does what `average_gradients` does."""
        norms = self.average_gradients(self._arrays(gradients))
        return norms.busy_seconds, Reference(norms.values)

    def take_clipped_steps(self, squared_norms: Sequence[Reference[list[float]]]) -> PublishedAnswer:
        """Does what `apply_averages` does."""
        return _published(self.apply_averages([values.value for values in squared_norms]))

    def publish_all(self) -> tuple[Reference[np.ndarray], Reference[np.ndarray]]:
        """Does what `publish` does."""
        published = self.publish()
        assert published.target_params is not None
        return Reference(published.params), Reference(published.target_params)

    def saved_params(self) -> Reference[np.ndarray]:
        """Returns the parameters that `publish` returns."""
        return Reference(self.publish().params)

    def saved(self) -> Reference[StateLeaves]:
        """Returns the leaves of `state`."""
        return Reference(self.state().leaves)

    def go_on_from(self, leaves: Reference[StateLeaves]) -> None:
        """Does what `restore` does."""
        self.restore(leaves.copy())

    def _arrays(self, gradients: Sequence[Reference[np.ndarray]]) -> list[np.ndarray]:
        return [gradient.value.view(self.gradient_dtype) for gradient in gradients]


def _published(published: PublishedParameters) -> PublishedAnswer:
    target = published.target_params
    return PublishedAnswer(
        published.busy_seconds, Reference(published.params), None if target is None else Reference(target)
    )
