"""Trials on Ray: the process that trains them, one after the other, and all of these processes as `pool` sees them."""

import contextlib
import functools
import gc
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import filelock
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.config.errors import RAISED_BY_USERS, short
from qfleet.runtime.run_directory import SEEDS_FOLDER
from qfleet.runtime.signals import StopFlag, StopRequested
from qfleet.sweeps.directory import SweepDirectory
from qfleet.sweeps.pool import Lost, Ready, Update
from qfleet.sweeps.trial import Pruning, failing_without_memory, start_trial
from qfleet.topologies.fleet.cluster import connected, in_words, is_local, last_line, room, variables
from qfleet.topologies.fleet.remote_process import InRemoteProcess, cpus_for, default_resources

logger = logging.getLogger("qfleet")

_TELL_SECONDS = 1.0
"""Time after which a process tells of its newest chunk, unless an evaluation or the trial's end comes before."""

_LOCK_SECONDS = 150
"""Time that a process waits for another one to leave the same trial: one whose node Ray has lost lives on for a while,
and a file server frees the locks of a client that is silent after up to 90 s."""

_WARN_SECONDS = 30
"""Time after which the user hears that no process has started yet, and why."""

_GPU_SHARE = 0.9
"""Share of a GPU's memory that all processes on it may take together."""


class _Place(NamedTuple):
    """Where a process runs."""

    pid: int
    node: str
    """Ray's id of the node."""
    address: str
    """IP address of the node."""
    sees_folder: bool
    """Whether the sweep's folder is there."""


class TrialProcess(InRemoteProcess):
    """Trains trials in a process of its own, a step of about a second in each call.

    Ray carries out the calls in the main thread, so signals reach the runs as they do in any other process.
    """

    def __init__(
        self,
        variables: Mapping[str, str],
        directory: SweepDirectory,
        loggers: Sequence[str],
        *,
        prunes: bool,
        num_seeds_at_once: int | None,
        folder: str,
        command: list[str],
    ) -> None:
        """Sets up the process.

        Args:
          variables: those of `InRemoteProcess`.
          directory: the sweep's folder.
          loggers: names of the trackers that each run logs to.
          prunes: whether evaluations are told, so that a trial can be stopped early.
          num_seeds_at_once: as for `train`.
          folder: working directory, if it exists on this node.
          command: command line of the sweep, which each run notes as its own.
        """
        super().__init__(variables)
        sys.argv = command
        if os.path.isdir(folder):
            os.chdir(folder)
        self._directory, self._prunes = directory, prunes
        self._arguments = {"loggers": loggers, "num_seeds_at_once": num_seeds_at_once}
        self._evaluation: tuple[int, float] | None = None
        self._pruning = Pruning(self._note)
        self._updates: Iterator[Update] = iter(())
        # From now on, a request to stop is kept until a run answers it. Processes that this one starts would inherit
        # Ray's signal mask, with which they couldn't be asked.
        self._stop = StopFlag().__enter__()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    def place(self) -> _Place:
        """Returns where this process runs."""
        node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        return _Place(os.getpid(), node, address, self._directory.journal_path.exists())

    def train(self, number: int, config: TrainConfig) -> Update:
        """Begins a trial, or goes on with it, and returns its first update."""
        self._evaluation, self._pruning, self._updates = None, Pruning(self._note), iter(())
        gc.collect()  # what the run before held, such as its replay, before this one makes its own
        self._updates = self._train(number, config)
        return self._next()

    def go_on(self, prune: bool) -> Update:
        """Trains on and returns the next update; `prune` stops the trial early."""
        if prune:
            self._pruning.stop()
        return self._next()

    def _note(self, number: int, mean: float) -> bool:
        self._evaluation = number, mean
        return False  # the answer comes with the next call

    def _next(self) -> Update:
        try:
            with failing_without_memory():
                return next(self._updates)
        except StopRequested:  # before the run had made its folder
            return Update(outcome={"stopped": "interrupted"})
        except (ConfigError, RunFailed) as error:
            return Update(outcome=error)
        except RAISED_BY_USERS as error:  # such as one of an environment that can't be made
            return Update(outcome=RunFailed(short(error)))

    def _train(self, number: int, config: TrainConfig) -> Iterator[Update]:
        with self._locked(number):
            callbacks = [self._pruning] if self._prunes else []
            run = start_trial(self._directory, number, config, {"callbacks": callbacks, **self._arguments})
            told_at = float("-inf")
            for progress in () if isinstance(run, dict) else run:
                if self._evaluation is not None or time.monotonic() - told_at > _TELL_SECONDS:
                    evaluation, self._evaluation = self._evaluation, None
                    yield Update(progress, evaluation)
                    told_at = time.monotonic()
            summary = run if isinstance(run, dict) else run.summary
        mean, stopped = summary.get("eval_return_mean"), summary.get("stopped")
        yield Update(outcome={"stopped": stopped, "eval_return_mean": None if mean is None else float(mean)})

    @contextlib.contextmanager
    def _locked(self, number: int) -> Iterator[None]:
        """Keeps other processes away from a trial, such as one that nobody has told yet that its sweep was killed.

        Raises:
          RunFailed: if another one doesn't leave it.
        """
        folder = self._directory.trial_folder(number)
        folder.parent.mkdir(exist_ok=True)
        lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))  # beside the run, whose folder may be new
        try:
            with self._stop.interrupting():
                lock.acquire(timeout=_LOCK_SECONDS)
                for file in folder.glob(f"{SEEDS_FOLDER}/*/.lock"):  # seeds save before they follow their process
                    with filelock.FileLock(file, timeout=_LOCK_SECONDS):
                        pass
        except filelock.Timeout as error:
            raise RunFailed(f"another process has trained it for {_LOCK_SECONDS} s and doesn't leave it") from error
        try:
            yield
        finally:
            lock.release()


class RayProcesses:
    """Processes on Ray that train trials: the `Processes` of a `TrialPool`."""

    def __init__(
        self, directory: SweepDirectory, resources: Mapping[str, float], make: Callable[[Any], Any], *, inherits: bool
    ) -> None:
        """Starts nothing yet.

        Args:
          directory: the sweep's folder.
          resources: that each process takes, by Ray's names.
          make: makes an actor of a class that Ray knows, from the arguments of `TrialProcess`.
          inherits: whether Ray's processes inherit `variables` from this one.
        """
        amounts = dict(resources)
        options = {"num_cpus": amounts.pop("CPU", 0), "num_gpus": amounts.pop("GPU", 0), "resources": amounts}
        self._environment: dict[str, Any] = {} if inherits else {"runtime_env": {"env_vars": variables()}}
        self._make = functools.partial(make, ray.remote(TrialProcess).options(**options, **self._environment))
        self._directory, self._resources = directory, resources
        self._numbers = itertools.count()
        self._handles: dict[int, Any] = {}
        self._places: dict[int, _Place] = {}
        self._calls: dict[Any, int] = {}
        """The process of each call that hasn't been answered, by its reference."""
        self._warned_at = time.monotonic()

    def room(self) -> int:
        free = ray.available_resources()
        return int(min(free.get(name, 0) / amount for name, amount in self._resources.items() if amount))

    def start(self) -> int:
        process = next(self._numbers)
        self._handles[process] = self._make()
        self._calls[self._handles[process].place.remote()] = process
        return process

    def train(self, process: int, number: int, config: TrainConfig) -> None:
        self._calls[self._handles[process].train.remote(number, config)] = process

    def go_on(self, process: int, *, prune: bool) -> None:
        self._calls[self._handles[process].go_on.remote(prune)] = process

    def wait(self, seconds: float) -> list[tuple[int, Ready | Update | Lost]]:
        if not self._places and time.monotonic() - self._warned_at > _WARN_SECONDS:
            self._warned_at = time.monotonic()
            wants = in_words(self._resources)
            logger.warning("trials wait for a node with %s: %s", wants, room(self._resources, {}))
        if not self._calls:
            time.sleep(seconds)  # no process is there that could have news, so the pool looks again later
            return []
        ready, others = ray.wait(list(self._calls), timeout=seconds)
        if ready and others:
            ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
        news = []
        for reference in ready:
            process = self._calls.pop(reference)
            news.append((process, self._news(process, reference)))
        return news

    def _news(self, process: int, reference: Any) -> Ready | Update | Lost:
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            has_started, is_raised = process in self._places, isinstance(error, ray.exceptions.RayTaskError)
            self.end(process)
            if has_started:
                return Lost(f"raised {last_line(error)}" if is_raised else "was killed, or its node was lost")
            return Lost(
                f"every node of the Ray cluster must be able to run this qfleet, and one isn't ({last_line(error)}); "
                f"install the same version on all, in the environment that Ray runs in",
                is_unfit=is_raised or getattr(error, "actor_init_failed", False),
            )
        if not isinstance(answer, _Place):
            return answer
        if not answer.sees_folder:
            self.end(process)
            return Lost(
                f"a sweep's folder must be on a file system that all nodes of the Ray cluster see, got "
                f"{self._directory.path}, which node {answer.address} lacks; give another --run-dir",
                is_unfit=True,
            )
        self._places[process] = answer
        return Ready()

    def ask_to_stop(self, process: int) -> None:
        # Ray calls the methods of a process one after the other, so only a signal reaches one that trains.
        place = self._places[process]
        if place.node == ray.get_runtime_context().get_node_id():
            _send_stop(place.pid)
        else:
            self._send_stop_there(place)

    def _send_stop_there(self, place: _Place) -> None:
        where = NodeAffinitySchedulingStrategy(place.node, soft=False)
        task = ray.remote(_send_stop).options(num_cpus=0, scheduling_strategy=where, **self._environment)
        task.remote(place.pid)

    def end(self, process: int) -> None:
        ray.kill(self._handles.pop(process))
        self._places.pop(process, None)
        self._calls = {reference: each for reference, each in self._calls.items() if each != process}

    def close(self) -> None:
        """Ends all processes, whatever they do."""
        for process in list(self._handles):
            self.end(process)


def _send_stop(pid: int) -> None:
    """Sends SIGTERM to a process on this node, if it still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


@contextlib.contextmanager
def trial_processes(directory: SweepDirectory, loggers: Sequence[str], *, prunes: bool) -> Iterator[RayProcesses]:
    """Keeps this process connected to the Ray cluster that a sweep's plan names, and ends the sweep's processes there.

    Args:
      directory: the sweep's folder.
      loggers: names of the trackers that each trial logs to.
      prunes: whether trials may be stopped early.

    Raises:
      ConfigError: if there is no cluster, or a Ray that is started for the sweep lacks what a trial takes.
    """
    plan = directory.plan
    topology = plan.config.topology
    cpus = {"CPU": float(topology.num_busy_processes)}
    num_cpus = cpus_for([plan.trial_resources or cpus])
    with connected(plan.trials_on_ray or "auto", num_cpus, "trials_on_ray") as inherits:
        resources = dict(plan.trial_resources) or default_resources(topology.mesh.num_devices) | cpus
        if os.environ.get("JAX_PLATFORMS") == "cpu" and not plan.trial_resources:
            resources = cpus
        lacking = [name for name, amount in resources.items() if ray.cluster_resources().get(name, 0) < amount]
        if is_local() and lacking:
            raise ConfigError(
                f"with trials_on_ray local, this machine must have what trial_resources asks for, got "
                f"{in_words(resources)}, and it lacks {' and '.join(lacking)}; ask for less, or join a cluster"
            )
        most = max(1, int(resources.get("CPU", 1) / topology.num_busy_processes))
        num_seeds_at_once = min(most, plan.config.num_seeds) if plan.config.has_seed_processes else None

        def make(kind: Any) -> Any:
            return kind.remote(
                _variables(resources, num_seeds_at_once or 1),
                directory.without_lock(),
                tuple(loggers),
                prunes=prunes,
                num_seeds_at_once=num_seeds_at_once,
                folder=os.getcwd(),
                command=sys.argv,
            )

        processes = RayProcesses(directory, resources, make, inherits=inherits)
        try:
            yield processes
        finally:
            processes.close()


def _variables(resources: Mapping[str, float], num_at_once: int) -> dict[str, str]:
    """Returns environment variables that hold a process to its share of the cores and of a GPU's memory.

    Args:
      resources: that the process takes.
      num_at_once: number of processes that share them.
    """
    threads, gpus = str(max(1, int(resources.get("CPU", 1) / num_at_once))), resources.get("GPU", 0)
    found = {"PJRT_NPROC": threads, "OMP_NUM_THREADS": threads}
    if not gpus:
        found["JAX_PLATFORMS"] = "cpu"
    elif gpus < 1:
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_GPU_SHARE * gpus / num_at_once:.3f}"
    return {name: os.environ.get(name, value) for name, value in found.items()}
