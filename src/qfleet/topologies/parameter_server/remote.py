"""The processes of the parameter server, as Ray runs them.

Each holds a plain `Worker` or `ServerShard`, and a method calls the plain object's method of the same name, after
`Worker.pull` if the worker lacks parameters. The plain method returns arrays; the method here returns references to
them, such as a `...Answer` in place of a `...Reply`. The shards of a replay that the workers share are
`fleet.remote.RemoteReplayShard`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qfleet.config import TrainConfig
from qfleet.core.replay import SavedReplay
from qfleet.core.sharded_learner import StateLeaves
from qfleet.core.types import Transition
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess
from qfleet.topologies.fleet.replay_shard import ShardStats
from qfleet.topologies.parameter_server.requests import ActAnswer, GradientAnswer, PublishedAnswer, Pull
from qfleet.topologies.parameter_server.server_shard import PublishedParameters, ServerShard
from qfleet.topologies.parameter_server.worker import GradientReply, Worker

# --- Workers ---


class RemoteWorker(InRemoteProcess):
    """A `Worker` in a process of its own. It pulls parameters before it acts or computes a gradient."""

    def __init__(self, variables: Mapping[str, str], config: TrainConfig, number: int) -> None:
        """Makes a worker; `variables` are those of `InRemoteProcess`."""
        super().__init__(variables)
        self._worker = Worker(config, number)

    def begin(self, incarnation: int) -> None:
        """Starts the first episodes of the lanes."""
        self._worker.begin(incarnation)

    def act(self, pull: Pull, exploration: float) -> ActAnswer:
        """Takes the steps of one chunk."""
        self._pull(pull)
        reply = self._worker.act(exploration)
        chunk = None if reply.chunk is None else Reference(reply.chunk)
        return ActAnswer(reply.chunk_stats, reply.shard_stats, chunk)

    def compute_gradient(self, pull: Pull, importance_exponent: float) -> GradientAnswer:
        """Computes the gradient of a batch from the worker's own replay."""
        self._pull(pull)
        return gradient_answer(self._worker.compute_gradient(importance_exponent))

    def compute_gradient_of(
        self, pull: Pull, places: Sequence[np.ndarray], shares: Sequence[Reference[Transition]]
    ) -> GradientAnswer:
        """Computes the gradient of a batch that the shards of a shared replay have drawn."""
        self._pull(pull)
        return gradient_answer(self._worker.compute_gradient_of(places, [share.value for share in shares]))

    def snapshot(self) -> Reference[SavedReplay]:
        """Returns the contents of the worker's own replay."""
        return Reference(self._worker.snapshot())

    def restore(self, saved: Reference[SavedReplay]) -> ShardStats:
        """Continues with the replay of a snapshot."""
        return self._worker.restore(saved.copy())

    def _pull(self, pull: Pull) -> None:
        if pull.version != self._worker.version:
            params, target_params = ([piece.value for piece in pieces] for pieces in (pull.params, pull.target_params))
            self._worker.pull(pull.version, params, target_params)


def gradient_answer(reply: GradientReply) -> GradientAnswer:
    """Returns a gradient with references in place of its arrays."""
    # As bytes, because arrays of bfloat16 would be copied more often on their way.
    pieces = tuple(Reference(piece.view(np.uint8)) for piece in reply.pieces)
    return GradientAnswer(reply.result, pieces, tuple(map(Reference, reply.priorities)))


# --- Shards of the server ---


class RemoteServerShard(InRemoteProcess):
    """A `ServerShard` in a process of its own."""

    def __init__(self, variables: Mapping[str, str], config: TrainConfig, number: int) -> None:
        """Makes a shard; `variables` are those of `InRemoteProcess`."""
        super().__init__(variables)
        self._shard = ServerShard(config, number)

    def apply_gradients(self, gradients: Sequence[Reference[np.ndarray]]) -> PublishedAnswer:
        """Takes learner steps that need no other shard."""
        return _published_answer(self._shard.apply_gradients(self._arrays(gradients)))

    def average_gradients(self, gradients: Sequence[Reference[np.ndarray]]) -> tuple[float, Reference[list[float]]]:
        """Averages the gradients of each learner step, and keeps the means for `apply_averages`."""
        norms = self._shard.average_gradients(self._arrays(gradients))
        return norms.busy_seconds, Reference(norms.values)

    def apply_averages(self, squared_norms: Sequence[Reference[list[float]]]) -> PublishedAnswer:
        """Takes learner steps with the means that `average_gradients` kept, clipped by the norm of the whole."""
        return _published_answer(self._shard.apply_averages([values.value for values in squared_norms]))

    def publish(self) -> tuple[Reference[np.ndarray], Reference[np.ndarray]]:
        """Returns the parameters and those of the target network, as they are."""
        published = self._shard.publish()
        assert published.target_params is not None
        return Reference(published.params), Reference(published.target_params)

    def params(self) -> Reference[np.ndarray]:
        """Returns the parameters that `publish` returns, for the run's process."""
        return Reference(self._shard.publish().params)

    def take_snapshot(self) -> Reference[StateLeaves]:
        """Returns the leaves of a copy of all that the shard must keep."""
        return Reference(self._shard.take_snapshot().leaves)

    def restore(self, leaves: Reference[StateLeaves]) -> None:
        """Continues from the leaves that `take_snapshot` returned."""
        self._shard.restore(leaves.copy())

    def reset(self) -> None:
        """Begins again with the parameters that follow from the run's seed."""
        self._shard.reset()

    def _arrays(self, gradients: Sequence[Reference[np.ndarray]]) -> list[np.ndarray]:
        return [gradient.value.view(self._shard.gradient_dtype) for gradient in gradients]


def _published_answer(published: PublishedParameters) -> PublishedAnswer:
    target = published.target_params
    return PublishedAnswer(
        published.busy_seconds, Reference(published.params), None if target is None else Reference(target)
    )
