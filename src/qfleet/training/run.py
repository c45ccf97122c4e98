"""A training run under way in this process."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.core.types import Network
from qfleet.envs.failures import describe
from qfleet.envs.recorded import check_as_recorded, record_of
from qfleet.envs.registry import backend_of
from qfleet.runtime import peers
from qfleet.runtime.activity import announce
from qfleet.runtime.best_checkpoint import BestCheckpoint
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.devices import check_not_forked
from qfleet.runtime.environment_record import record_start
from qfleet.runtime.loggers import Logger
from qfleet.runtime.metrics import MetricsWriter
from qfleet.runtime.recorder import Recorder
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.signals import StopFlag, StopRequested
from qfleet.topologies.footprint import check_fits
from qfleet.training.account import RunAccount
from qfleet.training.assembly import RunParts, footprint, make_parts
from qfleet.training.callbacks import Callbacks, RunControl
from qfleet.training.changes import Changes
from qfleet.training.evaluation_rounds import EvaluationRounds
from qfleet.training.leaving import closed_at_exit, failure_of_loop
from qfleet.training.metadata import best_evaluation, read_metadata
from qfleet.training.outcome import Closing, evaluation_of, is_of_checkpoints, message_of
from qfleet.training.resuming import check_goes_on, check_network_is_given, check_reads_the_same
from qfleet.training.saving import Saving
from qfleet.training.shown import ShownRun

if TYPE_CHECKING:
    import optax

logger = logging.getLogger("qfleet")


class Run(ShownRun):
    """A run under way. Iterate over it for its progress, then read its `summary`."""

    def __init__(
        self,
        config: TrainConfig,
        open_directory: Callable[[], RunDirectory],
        network: Network | None,
        optimiser: "optax.GradientTransformation | None",
        *,
        is_resumed: bool = False,
        checkpoint: int | Literal["best"] | None = None,
        callbacks: Sequence[Any] = (),
        loggers: Sequence[tuple[str, Logger]] = (),
        parts: RunParts | None = None,
    ) -> None:
        self._account = RunAccount(config)
        self._has_own_network = network is not None
        self.config = config
        self.summary: dict[str, Any] = {}
        """Content of summary.json, once the run is over."""
        self._goes_on = False  # although it has reached the return to stop at, because it was resumed after that
        self._metrics: MetricsWriter | None = None
        self._is_new = True  # not iterated over yet
        self._closing = Closing()
        with StopFlag() as stop:
            # Mistakes are found before the folder is touched and before anything is compiled.
            with self._interrupting(stop):
                env, network, self._topology = parts or make_parts(config, network, optimiser)
                self._env = env
                self._rounds = EvaluationRounds(config, self._topology, env.spec.time_limit)
                self.backend = backend_of(config.env)
                """Backend that makes the environments: for a bare name, the fastest that there is."""
                footprint_of = functools.partial(footprint, network=network, optimiser=optimiser)
                if not is_resumed:
                    check_fits(config, self._topology.footprint(), footprint_of)
                self._recorder = None if config.video_period_env_steps is None else Recorder(config, env, network)
            self.directory = open_directory()
            """Folder of the run."""
            self._callbacks = Callbacks(
                callbacks, RunControl(config, self.directory.folder, Changes(self._topology, config))
            )
            try:
                self._start(stop, checkpoint, loggers, is_resumed=is_resumed, footprint_of=footprint_of)
                with self._interrupting(stop):  # the last moment to hear a request that came meanwhile
                    pass
            except StopRequested:
                with self._closing:
                    self._write_summary_of_start()
            except BaseException as error:
                self._closing.close()
                if isinstance(error, ConfigError) and not is_resumed:
                    self.directory.discard()
                raise

    def _start(
        self,
        stop: StopFlag,
        checkpoint: int | Literal["best"] | None,
        loggers: Sequence[tuple[str, Logger]],
        *,
        is_resumed: bool,
        footprint_of: Callable[..., Any],
    ) -> None:
        """Compiles the programs, starts the environments and processes, and goes on from a checkpoint if there is one.

        Raises:
          StopRequested: if a signal asked for it before anything was changed.
        """
        config, topology = self.config, self._topology
        topology.checkpoints_path = self.directory.checkpoints_path
        self._checkpoints = Checkpoints(
            self.directory.checkpoints_path,
            keep=config.checkpoints_kept,
            run_id=self.directory.run_id,
            is_keeper=peers.is_first(),
        )
        self._best_checkpoint = BestCheckpoint(
            self.directory.checkpoints_path, run_id=self.directory.run_id, is_keeper=peers.is_first()
        )
        self._saving = Saving(
            topology, self._checkpoints, self._best_checkpoint, self._account.warn, keeps_best=config.checkpoint_best
        )
        if config.topology.runs_in != "joined processes":  # otherwise the launcher holds it
            # This comes before a checkpoint is chosen, because whoever holds the lock may still write one.
            self._closing.add(self.directory.lock().release)
        was_named = checkpoint is not None
        if checkpoint == "best":
            self._read_metadata(self._best_checkpoint, None)  # raises before anything is changed
            checkpoint = self._best_checkpoint.promote()
        if is_resumed and checkpoint is None:
            checkpoint = self._checkpoints.latest()
        metadata = None if checkpoint is None else self._read_metadata(self._checkpoints, checkpoint)
        if is_resumed:  # only once the network is known to be the one that the run was trained with
            check_fits(config, topology.footprint(), footprint_of)
        self._closing.add(self._checkpoints.close)
        self._closing.add(self._best_checkpoint.close)
        self._closing.add(topology.close)
        enable_compilation_cache()
        announce("starting processes" if config.topology.runs_in == "ray" else "compiling")
        with self._interrupting(stop):
            self._account.compile_seconds = topology.start()
            topology.prepare_evaluation()
            state = None if metadata is None else topology.read(self._checkpoints, checkpoint, metadata)
        self._writes = peers.is_first()  # files that a run has once, even in several processes
        self._metrics = MetricsWriter(self.directory, self._account.began, loggers) if self._writes else None
        if self._metrics:
            record_start(self.directory)
            self._closing.add(self._metrics.close)
        if metadata is not None and state is not None:
            self._restore(state, metadata, sets_best_aside=was_named)
        if is_resumed and self._metrics:
            self._metrics.truncate_after(topology.env_steps)

    def _interrupting(self, stop: StopFlag) -> contextlib.AbstractContextManager[None]:
        """Returns a context that a signal may leave half-way. Equal processes must first agree to stop."""
        is_alone = self.config.topology.runs_in != "joined processes"
        return stop.interrupting() if is_alone else contextlib.nullcontext()

    @property
    def _is_interruptible(self) -> bool:
        """Whether a signal may interrupt an evaluation at any place. Otherwise it only asks now and then."""
        return self.config.topology.runs_in == "this process"

    def _read_metadata(self, checkpoints: Checkpoints, checkpoint: int | None) -> dict[str, Any]:
        """Returns the metadata of the checkpoint to continue from, after checking it."""
        metadata = read_metadata(checkpoints, checkpoint, self.config)
        check_network_is_given(self._has_own_network, metadata["has_own_network"])
        check_as_recorded(self._env, metadata.get("environment"), self.config.env)
        if not self._has_own_network:
            check_reads_the_same(self.directory, self._env.spec)
        check_goes_on(metadata, self.config)
        return metadata

    def _restore(self, state: dict[str, Any], metadata: dict[str, Any], *, sets_best_aside: bool) -> None:
        self._topology.restore(state, metadata["counters"])
        self._checkpoints.set_aside_after(self._topology.env_steps)
        self._account.restore(metadata, self.directory.config.stop_return)
        self._topology.fixed = {
            name: value for name, value in metadata.get("fixed", {}).items() if name in self._topology.changeable
        }
        if sets_best_aside:  # otherwise a crash came after it, and it must not cost the best
            self._best_checkpoint.set_aside_after(self._topology.env_steps)
        if self.config.checkpoint_best:
            self._account.evaluations.best = best_evaluation(self._best_checkpoint, self.config)
        self._rounds.restore(metadata.get("evaluation_rounds"))
        self._goes_on = self._account.is_solved
        for i in range(self.config.num_seeds):
            if self._account.solved_at[i] is not None and not self._goes_on:
                self._topology.keep(i)

    def __iter__(self) -> Iterator[Progress]:
        self._begin()
        return iter(()) if self.summary else self._shown(self._train)

    def in_turn(self) -> Generator[Progress | None, None, None]:
        """Returns the iterator over a run that one program trains together with others, which take turns.

        Before its first chunk it yields None, once an evaluation that a signal had interrupted has been played: the
        first run that trains also trains the others, whose parameters would then be newer ones.
        """
        self._begin()
        return closed_at_exit(self._train(waits=True))

    def _begin(self) -> None:
        if not self._is_new:
            raise ConfigError(
                f"a run can be iterated over only once, and this one has been already; continue with "
                f"qfleet.resume({str(self.directory.path)!r}, env_steps=...)"
            )
        self._is_new = False
        check_not_forked()

    def _train(self, *, waits: bool = False) -> Generator[Any, None, None]:
        if self.summary:  # stopped already, while it started
            return
        stopped: str | None = None
        failure = ""
        self._reported = self._topology.env_steps  # of the newest record; a fleet goes on while it is evaluated
        with StopFlag() as stop, self._closing:
            try:
                try:
                    self._evaluate_if_pending(stop)
                    if waits:
                        yield None
                    stopped = "interrupted" if peers.any_of(stop.requested)[0] else self._reason_to_stop()
                    saved_at = time.monotonic()
                    while stopped is None:
                        progress = self._advance(stop)
                        is_due = time.monotonic() - saved_at > self.config.checkpoint_period_seconds
                        is_asked = stop.take_save_request() or self._callbacks.control.take_save_request()
                        must_stop, must_save = peers.any_of(stop.requested, is_asked or is_due)
                        stopped = "interrupted" if must_stop else self._reason_to_stop()
                        self._account.decided_at = time.monotonic()
                        if must_save and stopped is None:
                            self._saving.save_if_possible(self._notes())
                            saved_at = time.monotonic()
                        self._callbacks.on_checkpoints(self._saving.take_complete)
                        yield progress
                except GeneratorExit:  # the caller has left the loop
                    failure = "" if stopped or stop.requested else failure_of_loop()
                    stopped = stopped or ("failed" if failure else "interrupted")
                self._finish(stopped, **({"error": failure} if failure else {}))
            except BaseException as error:
                message = self._fail(error, stop)
                is_joined = self.config.topology.runs_in == "joined processes"  # the launcher starts them again
                if isinstance(error, RunFailed) or not isinstance(error, (Exception, SystemExit)) or is_joined:
                    raise
                raise RunFailed(message) from error

    def _advance(self, stop: StopFlag) -> Progress:
        """Trains one chunk, which ends at the next evaluation at the latest, and then evaluates and films if it did."""
        period = self.config.eval_period_env_steps
        goal = min((self._reported // period + 1) * period, self.config.env_steps)
        fixed = {f"fixed_{name}": value for name, value in self._topology.fixed.items()}
        progress = self._topology.advance(goal)
        self._reported = progress.env_steps
        self._account.add(progress)
        self._rounds.add(progress)
        self._callbacks.on_progress(progress)
        if self._callbacks.control.take_evaluation_request() or progress.env_steps >= goal:
            progress = dataclasses.replace(progress, **self._evaluate_and_film(stop))
        self._account.check_divergence(progress)
        if self._metrics:
            self._metrics.write(progress.env_steps, {**progress.metrics(), **fixed})
        if progress.eval_returns is not None:
            self._callbacks.on_evaluation(progress)
        return progress

    def _evaluate_if_pending(self, stop: StopFlag) -> None:
        """Plays the evaluation that was due when the run was stopped, if a signal has interrupted it."""
        env_steps, period = self._topology.env_steps, self.config.eval_period_env_steps
        is_at_end = env_steps >= self.config.env_steps and self._account.evaluated_at < env_steps
        if env_steps // period > self._account.evaluated_at // period or is_at_end:
            evaluated = self._evaluate_and_film(stop)
            if self._metrics and evaluated:
                mean = float(np.mean(evaluated["eval_returns"]))
                self._metrics.write(env_steps, {"eval_return_mean": mean, **evaluated["measures"]})

    def _evaluate_and_film(self, stop: StopFlag) -> dict[str, Any]:
        """Evaluates and films, unless a signal interrupts that, and returns what `_evaluate` does."""
        env_steps = self._topology.env_steps
        try:
            with stop.interrupting() if self._is_interruptible else contextlib.nullcontext():
                evaluated = self._evaluate(stop)
        except StopRequested:
            return {}
        if not evaluated and peers.any_of(stop.requested)[0]:
            return {}
        if evaluated:
            returns = np.array(self._rounds.summary["eval_returns"])
            self._account.evaluations.newest = evaluation_of(env_steps, returns)
            self._keep_if_best(stop)
        self._film_if_due(stop)
        self._account.evaluated_at = env_steps
        return evaluated

    def _evaluate(self, stop: StopFlag) -> dict[str, Any]:
        """Evaluates, if that is due, and notes which seeds have reached the return to stop at.

        Returns:
          The evaluation's fields of `Progress`; none if there was no evaluation.
        """
        unsolved = np.array([solved is None for solved in self._account.solved_at])
        evaluated, reached = self._rounds.evaluate(unsolved, lambda: stop.requested)
        for i in np.flatnonzero(reached):
            self._account.solved_at[i] = self._topology.env_steps
            self._topology.keep(int(i))
        return evaluated

    def _keep_if_best(self, stop: StopFlag) -> None:
        def play_fresh() -> np.ndarray | None:
            with stop.interrupting() if self._is_interruptible else contextlib.nullcontext():
                return self._rounds.confirm(lambda: stop.requested)

        notes = {**self._notes(), "evaluated_at": self._topology.env_steps}
        self._saving.keep_if_best(self._account.evaluations, play_fresh, notes)

    def _film_if_due(self, stop: StopFlag) -> None:
        recorder, env_steps = self._recorder, self._topology.env_steps
        if recorder is not None and recorder.is_due(env_steps, self._account.evaluated_at) and self._writes:
            announce("filming")
            recorder.record(
                jax.device_get(self._topology.params), env_steps, self.directory.videos_path, lambda: stop.requested
            )

    def _reason_to_stop(self) -> str | None:
        if self.config.stop_return is not None and self._account.is_solved and not self._goes_on:
            return "return reached"
        if self._reported >= self.config.env_steps:
            return "env steps"
        return None if self._callbacks.control.stop_reason is None else "callback"

    def _notes(self) -> dict[str, Any]:
        """Returns what the metadata of a checkpoint keep, apart from what the topology says about itself."""
        return {
            **self._account.saved,
            "evaluation_rounds": self._rounds.saved,
            "has_own_network": self._has_own_network,
            "environment": record_of(self._env),
            "fixed": dict(self._topology.fixed),
        }

    def _finish(self, stopped: str, **more: Any) -> None:
        self._saving.save_at_end(self._notes())
        self._callbacks.on_checkpoints(self._saving.take_complete)
        if fall := self._account.evaluations.fall():
            self._account.warn("fall", fall)
        self._write_summary(stopped, **more)
        self._callbacks.on_end(self.summary)
        self._write_report()

    def _fail(self, error: BaseException, stop: StopFlag) -> str:
        """Saves what is sound, writes the summary, and returns what happened in one line."""
        self._account.decided_at = time.monotonic()
        if isinstance(error, KeyboardInterrupt) and stop.requested:  # the second signal, of somebody who won't wait
            self._write_summary_if_possible("interrupted")
            return "interrupted"
        is_sound = not isinstance(error, RunFailed) or error.learner_is_sound
        self._saving.save_after_failure(self._notes(), is_sound=is_sound and not is_of_checkpoints(error))
        num_env_failures = getattr(error, "num_env_failures", 0)
        self._account.num_env_failures = max(self._account.num_env_failures, num_env_failures)
        message = message_of(error, self._topology.env_steps, self._saving.newest(), self.directory.path)
        self._write_summary_if_possible("failed", error=message)
        self._callbacks.on_failure(self.summary)
        self._write_report()
        return message

    def _write_summary_if_possible(self, stopped: str, **more: Any) -> None:
        try:
            self._write_summary(stopped, **more)
        except Exception as error:  # such as a full disk; the error that is under way matters more
            logger.warning("the summary can't be written: %s", describe(error))

    def _write_report(self) -> None:
        if self.config.report and peers.is_first():
            try:
                from qfleet.runtime.report.page import write_report  # here, because the start must not wait for it
                from qfleet.runtime.saved_run import SavedRun

                write_report([SavedRun(self.directory)], self.directory.report_path)
            except Exception as error:  # it can be written later, by `qfleet report`
                logger.warning("the report can't be written: %s", describe(error))

    def _write_summary_of_start(self) -> None:
        """Writes the summary of a run that was stopped while it started, which has changed nothing."""
        before = self.directory.read_summary() or {}
        self._write_summary("interrupted", **{k: v for k, v in before.items() if k not in ("stopped", "error")})

    def _write_summary(self, stopped: str, **more: Any) -> None:
        self.summary = {
            "env": self.config.env,
            "backend": self.backend,
            **self._account.summary(stopped, self._topology),
            **self._rounds.summary,
            **self._saving.summary(),
            "num_videos": self._recorder.num_videos if self._recorder else 0,
            "num_video_failures": self._recorder.num_failures if self._recorder else 0,
            "version": self.directory.version,
            "stop_reason": self._callbacks.control.stop_reason if stopped == "callback" else None,
            **more,
        }
        if self._metrics:
            self._metrics.summary = self.summary
        if peers.is_first():
            self.directory.write_summary(self.summary)
