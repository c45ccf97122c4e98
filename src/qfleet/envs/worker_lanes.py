"""Lanes of single Gymnasium environments in worker processes, each of which can be replaced.

Actions and failures travel through pipes, arrays through memory that the processes share. Workers are spawned rather
than forked, because a forked copy of a process in which JAX has threads may hang.
"""

import atexit
import multiprocessing
import pickle
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from gymnasium.vector.utils import CloudpickleWrapper

from qfleet.config.errors import ConfigError, short
from qfleet.config.python_path import is_module_folder_searched, starts_safely
from qfleet.envs.failures import Failure, FailureBudget, lane_seed
from qfleet.envs.host import HostStep, LaneOptions
from qfleet.envs.lane_group import SingleEnv, make_arrays, num_bytes
from qfleet.envs.names import searched_for
from qfleet.envs.worker import Share, work
from qfleet.envs.worker_signals import held_back

_START_SECONDS = 120.0  # time to start Python, import what the environments need, and make them
_CLOSE_SECONDS = 2.0  # time to close the environments, after which the worker is killed


class WorkerLanes:
    """`HostLanes` in `options.num_env_workers` processes, or as many as there are lanes."""

    def __init__(self, env: SingleEnv, num_lanes: int, options: LaneOptions) -> None:
        if multiprocessing.current_process().daemon:
            raise ConfigError(
                f"num_env_workers must be 0 in a process that may start no others, such as multiprocessing.Pool's, got "
                f"{options.num_env_workers}; start the run from concurrent.futures.ProcessPoolExecutor instead"
            )
        self._options = options
        self._budget = FailureBudget(env.name, options.max_failures)
        context = multiprocessing.get_context("spawn")
        buffer = context.RawArray("B", num_bytes(num_lanes, env.encoder))
        self._arrays = make_arrays(num_lanes, env.encoder, buffer)
        shares = np.array_split(np.arange(num_lanes), min(options.num_env_workers, num_lanes))
        env = env._replace(make=CloudpickleWrapper(env.make))  # so that closures and notebook classes can be sent too
        try:
            pickle.dumps(env)
        except Exception as error:  # what can't be pickled raises errors of many types
            raise ConfigError(
                f"environment {env.name} must be one that can be sent to worker processes, got "
                f"{short(error)}; make what it holds inside the function that makes it, or train with "
                f"num_env_workers=0"
            ) from error
        self._workers: list[_Worker] = []
        # At the end of this process, multiprocessing asks its children to end by SIGTERM, which these don't heed, and
        # waits for them. So they must have ended before.
        atexit.register(self.close)
        try:
            for lanes in shares:
                own = range(int(lanes[0]), int(lanes[-1]) + 1)
                share = Share(env, num_lanes, options.max_failures, own, is_module_folder_searched())
                self._workers.append(_Worker(context, buffer, share))
            for worker in self._workers:
                worker.wait_until_ready()
        except _WorkerLost as lost:
            self.close()
            raise ConfigError(
                f"environment {env.name} must be one that a worker process can make, got: {lost}{lost.hint}"
            ) from lost
        except BaseException:  # a request to stop, while environments are made
            self.close()
            raise

    def reset(self, seed: int) -> np.ndarray:
        for worker in self._workers:
            worker.reset(seed)
        self._gather()
        return self._arrays.observation.copy()

    def send(self, action: np.ndarray) -> None:
        actions = action.tolist()
        for worker in self._workers:
            worker.send("step", actions[worker.lanes.start : worker.lanes.stop])

    def recv(self) -> HostStep:
        self._gather()
        return HostStep(*(array.copy() for array in self._arrays))

    def close(self) -> None:
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.hang_up()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for worker in self._workers:
            worker.end(deadline)

    def _gather(self) -> None:
        """Waits for every worker. Replaces those that are lost, with all their lanes."""
        for worker in self._workers:
            try:
                self._spend(worker.failures(self._options.step_timeout_seconds))
            except _WorkerLost as lost:
                self._replace(worker, lost)

    def _replace(self, worker: "_Worker", lost: Exception) -> None:
        lanes = slice(worker.lanes.start, worker.lanes.stop)
        while True:
            # Count the failure before replacing the worker, so that one too many ends the run without that delay.
            self._spend([Failure(tuple(worker.lanes), worker.first_seed, str(lost))])
            try:
                # No lane has been rebuilt as often as there were failures, so this number gives every lane a new seed.
                worker.restart(rebuilds=self._budget.count)
                self._spend(worker.failures(self._options.step_timeout_seconds))
                break
            except _WorkerLost as again:
                lost = again
        out = self._arrays.of(lanes)
        out.reward[:], out.terminated[:], out.truncated[:], out.failed[:] = 0.0, False, False, True

    def _spend(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            self._budget.spend(failure)


class _WorkerLost(Exception):
    """A worker died or hangs. The message says which."""

    hint = ". If your script trains at its top level, put that under `if __name__ == '__main__':`"
    """What the reason may be if the worker never was ready."""


class _CannotMake(_WorkerLost):
    """A worker couldn't make its environments, and told why."""

    hint = ""


class _Worker:
    """One worker process and its pipe. It can be restarted."""

    def __init__(self, context: Any, buffer: Any, share: Share) -> None:
        self._context, self._buffer, self._share = context, buffer, share
        self.lanes = share.lanes
        self._seed = self._rebuilds = 0
        self._sent_at = 0.0
        self._start()

    @property
    def first_seed(self) -> int:
        return lane_seed(self._seed, self.lanes.start, self._rebuilds)

    def wait_until_ready(self) -> None:
        self._sent_at = time.monotonic()
        reason = self._answer(_START_SECONDS)
        if reason is not None:
            raise _CannotMake(reason)

    def reset(self, seed: int) -> None:
        self._seed, self._rebuilds = seed, 0
        self.send("reset", seed, 0)

    def send(self, *message: Any) -> None:
        self._sent_at = time.monotonic()
        try:
            self._connection.send(message)
        except OSError:
            self._is_gone = True  # `failures` raises the error later, because here nobody could replace the worker

    def failures(self, timeout_seconds: float) -> list[Failure]:
        """Waits until the last command is done and returns its failures.

        Raises:
          _WorkerLost: if the worker died or takes too long.
        """
        failures: list[Failure] = self._answer(timeout_seconds)
        return failures

    def restart(self, rebuilds: int) -> None:
        """Starts another process in place of this one, and a new episode in each of its lanes."""
        self.hang_up()
        self.end(time.monotonic())
        self._start()
        self.wait_until_ready()
        self._rebuilds = rebuilds
        self.send("reset", self._seed, rebuilds)

    def hang_up(self) -> None:
        self._connection.close()

    def end(self, deadline: float) -> None:
        """Waits for the process to end, and kills it at `deadline`, a time of the monotonic clock. Idempotent."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._is_gone = False
        self._process = self._context.Process(
            target=work, args=(theirs, self._buffer, self._share), name=f"qfleet-envs-{self.lanes.start}", daemon=True
        )
        # The process takes over this process's path.
        with held_back(), starts_safely(), searched_for(self._share.env.name):
            self._process.start()
        theirs.close()  # while this process holds that end, it can't see that the worker has died

    def _answer(self, timeout_seconds: float) -> Any:
        connection: Connection = self._connection
        try:
            if not self._is_gone and not connection.poll(max(0.0, self._sent_at + timeout_seconds - time.monotonic())):
                raise _WorkerLost(f"its worker process gave no answer for {timeout_seconds:g} s")
            return connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_CLOSE_SECONDS)
            raise _WorkerLost(f"its worker process died (exit code {self._process.exitcode})") from error
