"""The requests for gradients: how many workers are asked, and what happens to the gradients that arrive."""

from collections.abc import Callable, Sequence

import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.exploration import importance_exponent_at
from qfleet.topologies.fleet.sharded_replay import ShardedReplay
from qfleet.topologies.fleet.supervisor import Supervisor
from qfleet.topologies.parameter_server import remote
from qfleet.topologies.parameter_server.remote import GradientReferences, GradientRequest
from qfleet.topologies.parameter_server.sharded_server import ShardedServer
from qfleet.topologies.parameter_server.step_queue import Admission
from qfleet.topologies.parameter_server.transport import Transport, VectorHandle
from qfleet.topologies.parameter_server.worker import GradientStats
from qfleet.topologies.parameter_server.worker_pool import PooledWorker


class GradientRequests:
    """Asks workers for gradients, and pushes what arrives to the server. For the director's thread.

    A worker has one request for a gradient at a time. It gets its parameters with the request. The parameters of a
    second request would wait until the first gradient is finished, and by then they would be older by one step of every
    other worker.
    """

    def __init__(
        self,
        config: TrainConfig,
        supervisor: Supervisor,
        server: ShardedServer,
        transport: Transport,
        replay: ShardedReplay | None,
        *,
        on_request: Callable[[PooledWorker], None],
        on_gradient: Callable[[GradientStats, Admission], None],
    ) -> None:
        """Has asked for nothing yet.

        Args:
          config: config of the run.
          supervisor: supervisor of the workers.
          server: applies the gradients.
          transport: leases buffers for them.
          replay: the replay that the workers share; None if each has its own.
          on_request: called with each worker that is asked.
          on_gradient: called with each gradient that has arrived, and with what became of it.
        """
        self._topology = config.topology_as(ParameterServerConfig)
        self._agent, self._supervisor = config.agent, supervisor
        self._server, self._transport, self._replay = server, transport, replay
        self._on_request, self._on_gradient = on_request, on_gradient

    def issue(self, workers: Sequence[PooledWorker], num_due_steps: int, env_steps: int) -> None:
        """Asks for as many gradients as the replay ratio and the bound on staleness allow.

        Args:
          workers: all workers, in the order in which they are asked.
          num_due_steps: learner steps that the replay ratio allows, beyond those that the server was sent.
          env_steps: environment steps so far.
        """
        if self._server.num_pending_steps:
            return  # newer parameters will be published soon, and their gradients are less stale
        each = self._topology.gradients_per_learner_step
        # With at most so many in flight, a gradient that is asked for now becomes stale only if others overtake it.
        limit = min(num_due_steps, self._topology.max_staleness + 1) * each
        num_coming = self._server.num_gradients + sum(worker.is_learning for worker in workers)
        for worker in workers:
            if num_coming >= limit:
                return
            if worker.is_learning or not worker.process.is_ready or not self.is_warm(worker):
                continue
            if not self._ask(worker, env_steps):
                return
            num_coming += 1

    def is_warm(self, worker: PooledWorker) -> bool:
        """Returns whether a worker's own replay has its share of the warm-up, or half of what it can hold."""
        agent, num_workers = self._agent, self._topology.num_workers
        share = min(agent.warmup_env_steps, agent.replay_capacity // 2) // num_workers
        return self._replay is not None or worker.stats.num_transitions >= max(1, share - agent.n_step)

    def _ask(self, worker: PooledWorker, env_steps: int) -> bool:
        """Asks a worker for a gradient; returns False if there is nothing to learn from."""
        agent, drawn = self._agent, None
        exponent = float(importance_exponent_at(agent, np.array(env_steps))) if agent.replay == "prioritised" else 0.0
        if self._replay is not None:
            drawn = self._replay.draw(agent.batch_size, exponent)
            if drawn is None:
                return False
        worker.is_learning = True
        self._on_request(worker)
        pull, handles = worker.next_pull(self._server.newest)
        lease = self._transport.lease()
        request = GradientRequest(pull, exponent, self._transport.gradient_buffers(lease))
        if drawn is not None:
            request = request._replace(places=tuple(drawn.places), shares=tuple(drawn.references))

        # `dropped` keeps the handles of the parameters, and `replied` the lease of the gradient's buffers, until the
        # worker has replied or is gone: until then it may read or write there.
        def replied(result: GradientStats, references: GradientReferences) -> None:
            worker.is_learning = False
            pieces = tuple(request.buffers) if request.buffers else references.pieces
            gradient = VectorHandle(pieces, lease, references.pieces)
            self._on_gradient(result, self._server.push(gradient, pull.version, result.unweighted_loss))
            if drawn is not None and self._replay is not None:
                self._replay.return_priorities(drawn, references.priorities)

        def dropped() -> None:
            worker.is_learning = False
            worker.pull_all_again()
            self._server.note_failed_pull(handles)

        remote.submit_gradient(
            self._supervisor, worker.process, request, handles, len(self._server.processes), on_reply=replied,
            on_dropped=dropped,
        )  # fmt: skip
        return True
