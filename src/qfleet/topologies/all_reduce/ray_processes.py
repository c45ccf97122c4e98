"""A group of processes on a Ray cluster. Ray chooses a node for each; an actor on that node starts and watches it.

Ray finds the nodes, and carries the processes' reports of a few hundred bytes each. What the processes exchange while
they learn goes between them directly.
"""

import collections
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qfleet.config import AllReduceConfig, ConfigError
from qfleet.config.node_labels import node_labels
from qfleet.runtime.child_process import ChildProcess, cause_of, share_cores
from qfleet.topologies.all_reduce.processes import JoinInfo, ProcessGroup, ProcessLost, ProcessState, free_port
from qfleet.topologies.fleet.cluster import check_can_choose_nodes, connected, in_words, last_line, room, variables

_LISTEN_SECONDS = 0.2
"""Longest wait of an actor for its process to report. It handles no other call meanwhile."""

_KILL_SECONDS = 10
"""Time that the actors have to kill their processes. After it the actors are killed, and their processes with them."""


class _Placement(NamedTuple):
    """The node on which a process will run, as the actor there sees it."""

    node: str
    """Ray's id of the node."""
    address: str
    """IP address of the node."""
    port: int
    """A port of the node that no process listens to."""
    report_descriptor: int
    """File descriptor of the pipe that the process will report to."""
    python: str
    """Python interpreter on the node."""
    sees_folder: bool
    """Whether the run's folder exists on the node."""


class _Update(NamedTuple):
    """What a process reported since the last update, and whether it still runs."""

    data: bytes
    is_last: bool
    """Whether the report has ended."""
    code: int | None
    """Exit code; None while the process runs."""


class _ProcessActor:
    """The actor of Ray that runs one process, on its own node."""

    def __init__(self) -> None:
        self._child = ChildProcess()
        self._has_report_ended = False

    def placement(self, folder: str) -> _Placement:
        """Returns where this actor is, and whether it sees a folder there."""
        return _Placement(
            ray.get_runtime_context().get_node_id(),
            ray.util.get_node_ip_address(),
            free_port(""),
            self._child.report_descriptor,
            sys.executable,
            os.path.isdir(folder),
        )

    def start(self, command: list[str], variables: dict[str, str], num_here: int, log: str, folder: str) -> None:
        """Starts the process.

        Args:
          command: program and arguments.
          variables: environment variables of the launcher, which replace those of the node.
          num_here: processes of the run on this node, which share its cores.
          log: file to which the output of the process is appended.
          folder: working directory, if it exists on this node.
        """
        # Ray sets OMP_NUM_THREADS to 1 in its actors; the process is to have its share of the cores.
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= variables
        path = [variables["PYTHONPATH"], os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        share_cores(environment, num_here)  # without binding it to cores: other work may run on a node of Ray
        # The process inherits the signal mask of this thread, and Ray's blocks the signals that stop a process.
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            self._child.start(command, environment, Path(log), folder if os.path.isdir(folder) else None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def read(self, seconds: float) -> _Update:
        """Waits at most this long for news of the process, and returns them."""
        data = b""
        if self._has_report_ended:
            self._child.wait(seconds)
        elif select.select([self._child], [], [], seconds)[0]:
            data = self._child.read()
            self._has_report_ended = not data
        return _Update(data, self._has_report_ended, self._child.poll())

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to the process."""
        self._child.ask_to_stop()

    def kill(self) -> None:
        """Kills the process, and all that it has started."""
        self._child.kill()


@contextlib.contextmanager
def groups_on_ray(
    config: AllReduceConfig, make_command: Callable[[JoinInfo], list[str]], log_folder: Path
) -> Iterator[Callable[[], ProcessGroup]]:
    """Connects this process to a Ray cluster, and yields a function that makes a group of processes there.

    If this process is connected to a cluster already, that connection is used, and stays open afterwards.

    The arguments are those of `Launcher`.

    Raises:
      ConfigError: if there is no cluster at the address.
    """
    assert config.ray_address is not None
    num_made = 0

    def make_group() -> ProcessGroup:
        nonlocal num_made
        num_made += 1
        return RayProcessGroup(config, make_command, log_folder, is_first=num_made == 1)

    with connected(config.ray_address, config.num_processes, "ray_address"):
        check_can_choose_nodes(node_labels(config))
        yield make_group


class RayProcessGroup:
    """All processes of a run, on nodes that Ray chose."""

    def __init__(
        self,
        config: AllReduceConfig,
        make_command: Callable[[JoinInfo], list[str]],
        log_folder: Path,
        is_first: bool,
    ) -> None:
        """Starts nothing yet.

        Args:
          config, make_command, log_folder: those of `Launcher`.
          is_first: whether no group of this run was started before. What keeps the first group from starting is a
            mistake in the config or the cluster; what keeps a later group from starting is a loss.
        """
        self._config, self._make_command, self._log_folder = config, make_command, log_folder.absolute()
        self._is_first = is_first
        self._reserved: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._placements: list[_Placement] = []
        self._updates: dict[Any, int] = {}
        """The process of each update that is on its way, by its reference."""
        self._ended_reports: set[int] = set()
        """Processes whose report has been read to its end."""
        self._codes: dict[int, int | None] = {}
        self._causes: dict[int, str] = {}
        """How processes were lost that Ray lost, in words."""

    def start(self, must_stop: Callable[[], bool]) -> None:
        self._reserve(must_stop)
        self._placements = self._results(
            [actor.placement.remote(str(self._log_folder)) for actor in self._actors], must_stop
        )
        for placement in self._placements:
            if not placement.sees_folder:
                raise ConfigError(
                    f"a run's folder must be on a file system that all nodes of the Ray cluster see, got "
                    f"{self._log_folder.parent}, which node {placement.address} lacks; give another --run-dir"
                )
        arguments = zip(self._actors, self._start_arguments(), strict=True)
        self._results([actor.start.remote(*each) for actor, each in arguments], must_stop)
        for i in range(len(self._actors)):
            self._codes[i] = None
            self._listen(i)

    def _start_arguments(self) -> list[tuple]:
        """Returns the arguments of each actor's `start`."""
        first = self._placements[0]
        host = f"[{first.address}]" if ":" in first.address else first.address
        num_on = collections.Counter(placement.node for placement in self._placements)
        arguments = []
        for i, placement in enumerate(self._placements):
            info = JoinInfo(i, f"{host}:{first.port}", placement.report_descriptor, placement.python)
            log = str(self._log_folder / f"{i}.log")
            arguments.append((self._make_command(info), variables(), num_on[placement.node], log, os.getcwd()))
        return arguments

    def _reserve(self, must_stop: Callable[[], bool]) -> None:
        """Reserves room for each process, spread over as many nodes as possible, and starts an actor in each."""
        patience, labels, num_gpus = self._config.silence_seconds, self._config.process_node_labels, 0
        if ray.cluster_resources().get("GPU", 0) and os.environ.get("JAX_PLATFORMS") != "cpu":
            num_gpus = self._config.devices_per_process
        bundle = {"CPU": 1, "GPU": num_gpus} if num_gpus else {"CPU": 1}
        num = self._config.num_processes
        selectors = {"bundle_label_selector": [dict(labels)] * num} if labels else {}  # which an older Ray doesn't know
        self._reserved = placement_group([bundle] * num, strategy="SPREAD", **selectors)
        deadline = time.monotonic() + patience
        while not self._reserved.wait(_LISTEN_SECONDS):
            if must_stop():
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise (ConfigError if self._is_first else ProcessLost)(
                    f"a Ray cluster must have room for num_processes={num} times {in_words(bundle, labels)}, got "
                    f"{room(bundle, labels)} for {patience:g} s; add nodes, or give a smaller "
                    f"--num-processes{', or other labels' if labels else ''}"
                )
        for i in range(num):
            strategy = PlacementGroupSchedulingStrategy(self._reserved, placement_group_bundle_index=i)
            actor = ray.remote(_ProcessActor).options(num_cpus=1, num_gpus=num_gpus, scheduling_strategy=strategy)
            self._actors.append(actor.remote())

    def _results(self, references: list[Any], must_stop: Callable[[], bool]) -> list[Any]:
        """Waits for one call of each actor, and returns the results.

        Raises:
          ConfigError, ProcessLost, KeyboardInterrupt: as `start` does.
        """
        deadline = time.monotonic() + self._config.silence_seconds
        while ray.wait(references, num_returns=len(references), timeout=_LISTEN_SECONDS)[1]:
            if must_stop():
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise ProcessLost(f"a Ray actor did not answer for {self._config.silence_seconds:g} s")
        try:
            return ray.get(references)
        except ray.exceptions.RayError as error:
            # If our own code raised in the actor, this qfleet cannot run there. Otherwise the actor or its node died.
            is_raised = isinstance(error, ray.exceptions.RayTaskError) or getattr(error, "_actor_init_failed", False)
            if is_raised and self._is_first:
                raise ConfigError(
                    f"every node of the Ray cluster must be able to run this qfleet, and one isn't "
                    f"({last_line(error)}); install the same version on all, in the environment that Ray runs in"
                ) from error
            raise ProcessLost(f"a Ray actor could not start a process ({last_line(error)})") from error

    def _listen(self, i: int) -> None:
        self._updates[self._actors[i].read.remote(_LISTEN_SECONDS)] = i

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        ready, others = ray.wait(list(self._updates), timeout=seconds) if self._updates else ([], [])
        if ready and others:
            ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
        for reference in ready:
            i = self._updates.pop(reference)
            try:
                update: _Update = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._lose(i, error)
                continue
            self._codes[i] = update.code
            if update.is_last:
                self._ended_reports.add(i)
            if not update.is_last or update.code is None:
                self._listen(i)
            if update.data:
                yield i, update.data

    def _lose(self, i: int, error: Exception) -> None:
        """Counts a process as killed whose actor can't be reached, and finds out whether its node is lost too."""
        # A node reports the death of an actor at once. The death of a node itself is noticed later: until then Ray
        # calls the actor unavailable.
        is_unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
        has_node = any(node["NodeID"] == self._placements[i].node and node["Alive"] for node in ray.nodes())
        is_alone = has_node and not is_unreachable
        self._causes[i] = "was lost with its Ray actor" if is_alone else "was lost with its node or the network to it"
        self._codes[i] = -signal.SIGKILL
        self._ended_reports.add(i)

    def reports_have_ended(self) -> bool:
        return len(self._ended_reports) == len(self._actors)

    def states(self) -> dict[int, ProcessState]:
        states = {}
        for i, code in self._codes.items():
            name = f"process {i} of {self._config.num_processes} on {self._placements[i].address}"
            states[i] = ProcessState(name, code, self._causes.get(i) or cause_of(code))
        return states

    def ask_to_stop(self) -> None:
        for actor in self._actors:
            actor.ask_to_stop.remote()

    def kill(self) -> None:
        killed = [actor.kill.remote() for i, actor in enumerate(self._actors) if i not in self._causes]
        if killed:
            ray.wait(killed, num_returns=len(killed), timeout=_KILL_SECONDS)
        while self._actors:
            ray.kill(self._actors.pop())
        if self._reserved is not None:
            remove_placement_group(self._reserved)
            self._reserved = None
        self._updates.clear()
