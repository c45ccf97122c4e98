"""A run of many seeds, each of which is an ordinary run in a process of its own, as seen by the process that follows.

runs/<name>/              config.json with num_seeds; metrics.jsonl and summary.json of all seeds together
  seeds/<seed>/           an ordinary run, with config.json, metrics.jsonl, checkpoints and summary.json
  seeds/<seed>.log        what its process has printed
"""

import contextlib
import dataclasses
import logging
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.envs.registry import backend_of
from qfleet.runtime.activity import announce
from qfleet.runtime.loggers import Logger
from qfleet.runtime.process import seconds_since_process_start
from qfleet.runtime.records import Progress, mean, progress_from
from qfleet.runtime.report.page import write_report
from qfleet.runtime.run_directory import SEEDS_FOLDER, RunDirectory, strict_json, write_atomically
from qfleet.runtime.saved_run import SavedRun
from qfleet.runtime.seed_metrics import NUM_ROWS, CombinedMetrics, SeedRecords
from qfleet.runtime.signals import StopFlag
from qfleet.training.callbacks import CallbackFailed
from qfleet.training.leaving import failure_of_loop
from qfleet.training.observers import Observers
from qfleet.training.outcome import Closing
from qfleet.training.seed_places import make_places
from qfleet.training.seed_processes import SeedProcesses, cause_of_end
from qfleet.training.seed_summary import combined_summary, failures_in_words, open_seed, seeds_of
from qfleet.training.shown import ShownRun

logger = logging.getLogger("qfleet")

METRICS_SECONDS = 2.0
"""Time between two updates of the metrics of all seeds."""

_MEANS = ("episode_return_mean", "episode_length_mean", "q_mean", "loss", "td_error_mean", "exploration", "staleness")
"""Fields of `Progress` of which a record of all seeds has the mean over the seeds that are being trained."""


class SeedsRun(ShownRun):
    """A run of many seeds under way, in processes of their own. Iterate over it as over a `Run`."""

    def __init__(
        self,
        config: TrainConfig,
        open_directory: Callable[[], RunDirectory],
        *,
        is_resumed: bool = False,
        num_at_once: int | None = None,
        callbacks: Sequence[Any] = (),
        loggers: Sequence[tuple[str, Logger]] = (),
    ) -> None:
        """Checks the run and makes or opens its folder; the processes start once it is iterated over.

        Args:
          config: of the run with all seeds.
          open_directory: makes or opens the run's folder.
          is_resumed: whether the seeds go on that have not come to their end.
          num_at_once: as for `make_places`.
          callbacks: what is told of the records of all seeds together, and may stop the run.
          loggers: what logs these records, with names.

        Raises:
          ConfigError: if a seed can't be trained here, or all have come to their end.
        """
        self._began, self._process_age = time.monotonic(), seconds_since_process_start()
        self.config = config
        self._places = make_places(config, num_at_once)
        self.backend = backend_of(config.env)
        """Backend that makes the environments, as named by `backend_of`."""
        self.directory = open_directory()
        """Folder of the run."""
        self.summary: dict[str, Any] = {}
        """Content of summary.json, once the run is over."""
        self._is_resumed, self._is_refused, self._failure_of_loop = is_resumed, False, ""
        self._is_new = True  # not iterated over yet
        self._lock = self.directory.lock()
        try:
            self._seeds = seeds_of(self.directory.folder, config)
            self._unfinished = self._indices_to_train()
        except BaseException:
            self._lock.release()
            raise
        resumed_at = sum(seed.env_steps for seed in self._seeds) // len(self._seeds) if is_resumed else None
        self._observers = Observers(config, self.directory, callbacks, loggers, resumed_at)
        self._going_on = set(self._unfinished)
        """Indices of the seeds that have not ended."""
        self._processes = SeedProcesses(config, self._places)
        stretch = max(1, config.env_steps // NUM_ROWS)
        records = [
            SeedRecords(seed.folder / "metrics.jsonl", stretch, config.eval_period_env_steps) for seed in self._seeds
        ]
        self._metrics = CombinedMetrics(self.directory.metrics_path, records)
        self._has_begun = False  # to train anything
        self._newest: dict[int, Progress] = {}
        self._told_at = self._began
        self._told_steps = (0, 0)
        self._evaluations: dict[int, Progress] = {}

    @property
    def places_in_words(self) -> str:
        """How many seeds are trained at once, and why not more."""
        seeds, count = self.config.seeds, self._places.num_at_once
        reason = f", {self._places.reason}" if self._places.reason else ""
        at_once = "all at once" if count == self.config.num_seeds else f"{count} at a time"
        left = len(self._unfinished)
        done = f"; finished already: {self.config.num_seeds - left}" if left < self.config.num_seeds else ""
        return f"seeds {seeds[0]} to {seeds[-1]}, each in a process of its own, {at_once}{reason}{done}"

    def _indices_to_train(self) -> list[int]:
        """Returns the indices of the seeds that have not come to their end.

        If all have, those that reached the return to stop at go on to `env_steps`, as an ordinary run does.
        """
        config = self.config
        holds = config.stop_return == self.directory.config.stop_return
        unfinished = [
            i for i, seed in enumerate(self._seeds) if not seed.is_finished(config.env_steps, stop_return_holds=holds)
        ]
        unfinished = unfinished or [i for i, seed in enumerate(self._seeds) if seed.env_steps < config.env_steps]
        if not unfinished:
            raise ConfigError(
                f"a run ends after env_steps={config.env_steps}, and all seeds of this one have taken as many; give a "
                f"larger --env-steps"
            )
        return unfinished

    def __iter__(self) -> Iterator[Progress]:
        """Yields the progress of all seeds together: mean steps, and the newest returns of each.

        Raises:
          ConfigError: at the second call.
          RunFailed: at the end, if some seeds have failed.
        """
        if not self._is_new:
            raise ConfigError(
                f"a run can be iterated over only once, and this one has been already; continue with "
                f"qfleet.resume({str(self.directory.path)!r})"
            )
        self._is_new = False
        return self._shown(self._follow)

    def _follow(self) -> Generator[Progress, None, None]:
        with StopFlag() as stop, Closing() as closing:
            closing.add(self._end)
            try:
                yield from self._train(stop)
            except GeneratorExit:  # the caller has left the loop
                if not stop.requested:
                    self._failure_of_loop = failure_of_loop()
                self._processes.ask_to_stop()
                self._processes.wait()
                raise
            except CallbackFailed as error:
                self._failure_of_loop = str(error)
                self._processes.ask_to_stop()
                self._processes.wait()
                raise
        if any(seed.error for seed in self._seeds):
            run = shlex.quote(str(self.directory.path))
            raise RunFailed(f"{failures_in_words(self._seeds)}. `qfleet resume {run}` tries these again")

    def _train(self, stop: StopFlag) -> Iterator[Progress]:
        waiting, is_stopping, written_at = deque(self._unfinished), False, time.monotonic()
        announce("starting processes")
        while (waiting and not is_stopping) or self._processes.num_running:
            if (stop.requested or self._observers.stop_reason is not None) and not is_stopping:
                is_stopping = True
                self._processes.ask_to_stop()
            if stop.take_save_request():
                self._processes.ask_to_save(self._newest)
            while waiting and self._processes.has_room and not is_stopping:
                self._start(waiting.popleft())
            for i, message in self._processes.messages():
                if message["kind"] == "progress":
                    progress = self._together(i, progress_from(message))
                    self._observers.tell(progress)
                    yield progress
                elif message["kind"] == "failed":
                    self._note_failure(i, message["error"], is_config=message["is_config"])
            for i, code in self._processes.take_ended().items():
                self._note_end(i, code, is_stopping)
            if time.monotonic() - written_at > METRICS_SECONDS:
                self._write_metrics(self._going_on)
                written_at = time.monotonic()

    def _start(self, i: int) -> None:
        """Starts the process of a seed, in the seed's folder, which it makes if there is none."""
        seed = self._seeds[i]
        try:
            if (seed.folder / "config.json").exists():
                open_seed(self.directory, seed.seed)  # which checks that it is
            else:
                seed.folder.parent.mkdir(exist_ok=True)
                own = self.directory.config.of_seed(seed.seed)
                named = self.directory.as_named(seed.folder)
                RunDirectory.create(seed.folder, dataclasses.replace(own, run_dir=str(named)))
            self._processes.start(i, seed.folder, seed.log)
        except (ConfigError, OSError) as error:
            self._going_on.discard(i)
            self._note_failure(i, str(error), is_config=False)

    def _note_failure(self, i: int, error: str, *, is_config: bool) -> None:
        """Notes why a seed failed.

        Raises:
          ConfigError: if nothing has been trained yet, and the config is the reason. The others would fail too.
        """
        if is_config and not self._has_begun and not self._is_resumed:
            self._is_refused = True
            raise ConfigError(error)
        seed = self._seeds[i]
        seed.error = error
        logger.warning("seed %d failed, and the others go on: %s", seed.seed, error)

    def _note_end(self, i: int, code: int, is_stopping: bool) -> None:
        seed = self._seeds[i]
        seed.read()
        self._going_on.discard(i)
        self._newest.pop(i, None)
        # A process that is asked to stop while it starts ends by SIGTERM, because it can't handle the signal yet.
        if code != 0 and not seed.error and not (is_stopping and code == -signal.SIGTERM):
            self._note_failure(i, cause_of_end(code, seed.log), is_config=False)

    def _together(self, i: int, progress: Progress) -> Progress:
        """Returns a record of all seeds, after this one of a seed."""
        self._has_begun, self._newest[i] = True, progress
        if progress.eval_returns is not None:
            self._evaluations[i] = progress
        steps = [(seed.env_steps, int(seed.summary.get("learner_steps", 0))) for seed in self._seeds]
        for j, newest in self._newest.items():
            steps[j] = (newest.env_steps, newest.learner_steps)
        env_steps, learner_steps = (sum(each) // len(steps) for each in zip(*steps, strict=True))
        now, before = time.monotonic(), self._told_steps
        seconds, self._told_at, self._told_steps = now - self._told_at, now, (env_steps, learner_steps)
        means: dict[str, Any] = {}
        for name in _MEANS:
            values = [getattr(newest, name) for newest in self._newest.values()]
            means[name] = mean([value for value in values if value is not None])
        return dataclasses.replace(
            progress,
            env_steps=env_steps,
            learner_steps=learner_steps,
            train_seconds=max(seconds, 1e-6),
            new_env_steps=max(0, env_steps - before[0]),
            new_learner_steps=max(0, learner_steps - before[1]),
            part_seconds=None,
            fleet={**(progress.fleet or {}), "seeds_ready": float(self._processes.num_running)},
            **means,
            **(self._newest_evaluations() if progress.eval_returns is not None else {}),
        )

    def _newest_evaluations(self) -> dict[str, Any]:
        """Returns the evaluations' fields of `Progress`: a seed without an evaluation has no returns yet."""
        known = [self._evaluations.get(i) for i in range(len(self._seeds))]
        return {
            "eval_returns": tuple(
                each.eval_returns[0] if each and each.eval_returns else tuple(seed.eval_returns)
                for each, seed in zip(known, self._seeds, strict=True)
            ),
            "eval_num_different": sum(each.eval_num_different or 0 for each in known if each),
            "eval_num_cut": sum(each.eval_num_cut or 0 for each in known if each),
        }

    def _write_metrics(self, pending: Collection[int]) -> None:
        kept = [i for i, seed in enumerate(self._seeds) if seed.stopped == "return reached" and i not in pending]
        with contextlib.suppress(OSError):  # of a full disk, of which the seeds' own runs warn
            self._metrics.write(kept, pending)

    def _end(self) -> None:
        """Ends what is left of the processes, and writes metrics and summary of all seeds."""
        with Closing() as closing:
            if self._is_refused:
                closing.add(self._discard)
            closing.add(self._lock.release)
            closing.add(self._metrics.close)
            if not self._is_refused:
                if self.config.report:
                    closing.add(self._write_report)
                closing.add(self._write_summary)
            closing.add(self._processes.kill)

    def _write_summary(self) -> None:
        for i in self._going_on:  # those that have ended are known already
            self._seeds[i].read()
        self._write_metrics(())
        config = self.config
        self.summary = {
            "env": config.env,
            "backend": self.backend,
            "preset": config.preset,
            "topology": config.topology.name,
            "seed": config.seed,
            "num_seeds": config.num_seeds,
            **combined_summary(config, self._seeds, self._metrics.best()),
            "wall_seconds": time.monotonic() - self._began,
            "process_age_seconds": self._process_age,
            "version": self.directory.version,
        }
        if self.summary["stopped"] == "interrupted":
            self.summary |= self._observers.outcome(self._failure_of_loop)
        self.directory.write_summary(self.summary)
        self._observers.end(self.summary)

    def _write_report(self) -> None:
        """Writes the report of all seeds, and what the first of them was started with."""
        with contextlib.suppress(ConfigError):  # it has not begun, or its record can't be read
            starts = SavedRun(self._seeds[0].folder).environment
            starts = [*starts[:-1], *({**start, "command": sys.argv} for start in starts[-1:])]
            write_atomically(self.directory.environment_path, strict_json(starts, indent=2) + "\n")
        write_report([SavedRun(self.directory)], self.directory.report_path)

    def _discard(self) -> None:
        """Deletes the folder of a run that was refused before it trained anything."""
        for seed in self._seeds:
            if seed.folder.exists():
                RunDirectory.open(seed.folder).discard()
                seed.folder.rmdir()
            seed.log.unlink(missing_ok=True)
        (self.directory.folder / SEEDS_FOLDER).rmdir()
        self.directory.discard()
