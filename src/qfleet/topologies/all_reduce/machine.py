"""The decisions of an all-reduce launcher: when a group of processes is lost, what follows, and how the run ends.

`LauncherMachine` has a method for each event, which returns what to do next. `launcher` does it, wherever the processes
run.
"""

import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

from qfleet.config import AllReduceConfig, ConfigError, RunFailed
from qfleet.topologies.all_reduce.processes import ProcessState
from qfleet.topologies.fleet.messages import Warn

MOST_SILENT_PROGRESS = 10
"""Multiple of `silence_seconds` after which the group counts as lost if no process makes progress, even though all
of them are alive."""

GATHER_SECONDS = 0.3
"""Wait after the first process has died. The others fail because of it; by then the exit codes show which one was the
cause."""


class PassOn(NamedTuple):
    """Give a message of progress to the caller."""

    message: dict[str, Any]


class AskToStop(NamedTuple):
    """Ask the processes of the group to stop."""


class GiveUp(NamedTuple):
    """Kill what is left of the group, and then look for the newest checkpoint: `checkpoint_found` is next."""


class StartGroup(NamedTuple):
    """Start a new group."""


class End(NamedTuple):
    """End the run, with an error if there is one."""

    error: Exception | None = None


Request = PassOn | AskToStop | GiveUp | StartGroup | Warn | End


class LauncherMachine:
    """Decides about the processes of a run, one group after the other.

    Silence is measured in the time that the launcher has listened. So no process counts as lost because the caller took
    long over a message.
    """

    def __init__(self, config: AllReduceConfig, logs: str) -> None:
        """Begins before the first group; `logs` is the folder with the output of the processes, for error messages."""
        self._config, self._logs = config, logs
        self.num_restarts = 0
        self.env_steps_repeated = 0
        """Environment steps that were taken again because of the restarts."""
        self._env_steps = 0
        """Environment steps of the newest message of progress."""
        self._is_stopping = self._has_left = False
        self._cause = ""
        """What happened to the group that was lost last."""
        self._forget_group()

    def _forget_group(self) -> None:
        self._seconds = 0.0
        """Time that the launcher has listened to the group. The times below are points in it."""
        self._progressed_at = 0.0
        self._heard_at: dict[int, float] = {}
        """When each process last reported anything."""
        self._died_at: float | None = None
        self._has_progressed = False

    # --- Events ---

    def reported(self, number: int, message: dict[str, Any]) -> list[Request]:
        """Takes notice of what a process has reported."""
        self._heard_at[number] = self._seconds
        if message["kind"] == "progress" and not self._has_left:
            self._progressed_at, self._has_progressed = self._seconds, True
            self._env_steps = message["env_steps"]
            return [PassOn(message)]
        if message["kind"] == "failed" and not self._has_left:
            return [End((ConfigError if message["is_config"] else RunFailed)(message["error"]))]
        return []

    def looked(
        self, seconds: float, states: Mapping[int, ProcessState], *, have_reports_ended: bool, must_stop: bool
    ) -> list[Request]:
        """Takes notice of a look at the group, after all that was reported by then.

        Args:
          seconds: time that the launcher has listened since the look before.
          states: of the processes, from before it listened.
          have_reports_ended: whether everything that the processes will ever report has been told.
          must_stop: whether the user has asked the run to stop.
        """
        self._seconds += seconds
        have_ended = all(state.code is not None for state in states.values())
        if self._has_left:
            return [End()] if have_ended or self._seconds > self._config.silence_seconds else []
        requests: list[Request] = []
        if must_stop and not self._is_stopping:
            if not self._has_progressed and self._config.coordinator is None:
                return [End()]  # there is nothing to save, and they may compile for a long time
            self._is_stopping = True
            requests.append(AskToStop())
        # A process that is asked to stop while it starts ends by SIGTERM, because it can't handle the signal yet.
        expected = (None, 0, -signal.SIGTERM) if self._is_stopping else (None, 0)
        if died := {i: state for i, state in states.items() if state.code not in expected}:
            return requests + self._gather(died, self._seconds - seconds)
        if have_ended and (self._is_stopping or have_reports_ended):
            return [End()]
        silence = self._silence(states)
        return self.lost(silence) if silence else requests

    def lost(self, cause: str) -> list[Request]:
        """Takes notice that the group is lost, or can't be started although an earlier one could."""
        self._cause = cause
        return [GiveUp()]

    def checkpoint_found(self, env_steps: int) -> list[Request]:
        """Takes notice of the environment steps of the newest checkpoint, 0 if there is none, when a group is lost."""
        max_restarts, resume = self._config.max_restarts, f"from environment step {env_steps} with `qfleet resume`"
        if self._is_stopping:
            failed = f"a run that is asked to stop must write a checkpoint, but {self._cause} before it had"
            return [End(RunFailed(f"{failed}; resume {resume}"))]
        if self.num_restarts == max_restarts:
            failed = f"an all-reduce run may lose a process max_restarts={max_restarts} times, and {self._cause}"
            return [End(RunFailed(f"{failed}; see {self._logs}, then resume {resume}"))]
        repeated = max(0, self._env_steps - env_steps)
        self.num_restarts += 1
        self.env_steps_repeated += repeated
        self._forget_group()
        news = f"{self._cause}; all processes start again from environment step {env_steps} and repeat {repeated} steps"
        return [Warn(f"{news} (restart {self.num_restarts} of {max_restarts})"), StartGroup()]

    def left(self) -> list[Request]:
        """Takes notice that the caller has left its loop: the processes may stop for as long as they may be silent."""
        self._has_left, self._seconds = True, 0.0
        return [] if self._is_stopping else [AskToStop()]  # a second request would end them before they have saved

    # --- Losses ---

    def _gather(self, died: Mapping[int, ProcessState], seen_at: float) -> list[Request]:
        """Gives up the group because of processes that have died, once it is clear which one was the cause."""
        if self._died_at is None:
            self._died_at = seen_at
        if seen_at - self._died_at < GATHER_SECONDS:
            return []
        # A process that was killed is the cause. The others fail or abort because it is missing.
        first = min(died, key=lambda i: ((died[i].code or 0) >= 0 or died[i].code == -signal.SIGABRT, i))
        return self.lost(f"{died[first].name} {died[first].cause}")

    def _silence(self, states: Mapping[int, ProcessState]) -> str:
        """Returns in words which process has reported nothing for too long, or that none makes progress; or ''."""
        longest = self._config.silence_seconds
        for i, state in states.items():
            if state.code is None and self._seconds - self._heard_at.get(i, 0.0) > longest:
                return f"{state.name} gave no sign of life for {longest:g} s"
        # Only process 0 reports progress; a launcher that does not have it can't judge.
        if 0 in states and self._seconds - self._progressed_at > MOST_SILENT_PROGRESS * longest:
            return f"no process made progress for {MOST_SILENT_PROGRESS * longest:g} s"
        return ""
