"""The requests for gradients: how many workers are asked, and what happens to the gradients that arrive."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.exploration import importance_exponent_at
from qfleet.topologies.fleet.sharded_replay import ShardedReplay
from qfleet.topologies.fleet.supervisor import Supervisor
from qfleet.topologies.parameter_server.remote import GradientAnswer, RemoteWorker
from qfleet.topologies.parameter_server.sharded_server import ShardedServer
from qfleet.topologies.parameter_server.step_queue import Admission
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
          replay: the replay that the workers share; None if each has its own.
          on_request: called with each worker that is asked.
          on_gradient: called with each gradient that has arrived, and with what became of it.
        """
        self._topology = config.topology_as(ParameterServerConfig)
        self._agent, self._supervisor = config.agent, supervisor
        self._server, self._replay = server, replay
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
        newest = self._server.newest
        pull = worker.next_pull(newest)

        def replied(reply: GradientAnswer) -> None:
            worker.has_pulled(newest)
            worker.is_learning = False
            admission = self._server.push(reply.pieces, pull.version, reply.result.unweighted_loss)
            self._on_gradient(reply.result, admission)
            if drawn is not None and self._replay is not None:
                self._replay.return_priorities(drawn, reply.priorities)

        def dropped() -> None:
            worker.is_learning = False
            worker.pull_all_again()
            self._server.note_failed_pull(pull)

        submit = functools.partial(self._supervisor.submit, on_reply=replied, on_dropped=dropped)
        num_pieces = len(self._server.processes)
        if drawn is None:
            submit(worker.process, RemoteWorker.pull_and_differentiate, pull, exponent, num_references=num_pieces)
        else:
            submit(
                worker.process, RemoteWorker.pull_and_differentiate_batch, pull, drawn.places, drawn.references,
                num_references=num_pieces + len(drawn.references),
            )  # fmt: skip
        return True
