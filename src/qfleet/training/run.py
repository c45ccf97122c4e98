"""A training run under way in this process."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.core.types import Network
from qfleet.envs.failures import describe
from qfleet.envs.recorded import check_as_recorded, record_of
from qfleet.envs.registry import backend_of
from qfleet.runtime import peers
from qfleet.runtime.activity import announce
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.devices import check_not_forked
from qfleet.runtime.metrics import MetricsWriter
from qfleet.runtime.process import peak_rss_bytes, seconds_since_process_start
from qfleet.runtime.recorder import Recorder
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.signals import StopFlag, StopRequested
from qfleet.runtime.stopwatch import TimeShares
from qfleet.topologies.base import StateIsLost
from qfleet.topologies.footprint import check_fits
from qfleet.training.assembly import footprint, make_env_and_network, make_topology
from qfleet.training.evaluation_rounds import EvaluationRounds
from qfleet.training.leaving import closed_at_exit, failure_of_loop
from qfleet.training.metadata import read_metadata
from qfleet.training.outcome import BestEvaluation, Closing, DivergenceCheck, Speed, is_of_checkpoints, message_of
from qfleet.training.resuming import check_goes_on, check_network_is_given, check_reads_the_same

if TYPE_CHECKING:
    import optax

logger = logging.getLogger("qfleet")


class Run:
    """A run under way. Iterate over it for its progress, then read its `summary`."""

    def __init__(
        self,
        config: TrainConfig,
        open_directory: Callable[[], RunDirectory],
        network: Network | None,
        optimiser: "optax.GradientTransformation | None",
        *,
        is_resumed: bool = False,
        checkpoint: int | None = None,
    ) -> None:
        self._began = time.monotonic()
        self._process_age = seconds_since_process_start()
        self._has_own_network = network is not None
        self.config = config
        self.summary: dict[str, Any] = {}
        """Content of summary.json, once the run is over."""
        self._best = BestEvaluation()
        self._solved_at: list[int | None] = [None] * config.num_seeds
        self._evaluated_at = 0  # in environment steps
        self._num_env_failures = self._num_episodes = 0
        self._goes_on = False  # although it has reached the return to stop at, because it was resumed after that
        self._speed = Speed()
        self._divergence = DivergenceCheck(config.agent.discount)
        self._time_shares = TimeShares(config.topology.num_envs)
        self._warnings: dict[str, str] = {}  # by what they are about
        self._decided_at = self._began
        self._compile_seconds = 0.0
        self._is_new = True  # not iterated over yet
        self._closing = Closing()
        with StopFlag() as stop:
            # Mistakes are found before the folder is touched and before anything is compiled.
            with self._interrupting(stop):
                env, network = make_env_and_network(config, network)
                self._env = env
                self._topology = make_topology(config, env, network, optimiser)
                self._rounds = EvaluationRounds(config, self._topology, env.spec.time_limit)
                self.backend = backend_of(config.env)
                """Backend that makes the environments: for a bare name, the fastest that there is."""
                footprint_of = functools.partial(footprint, network=network, optimiser=optimiser)
                if not is_resumed:
                    check_fits(config, self._topology.footprint(), footprint_of)
                self._recorder = None if config.video_period_env_steps is None else Recorder(config, env, network)
            self.directory = open_directory()
            """Folder of the run."""
            try:
                self._start(stop, checkpoint, is_resumed=is_resumed, footprint_of=footprint_of)
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
        self, stop: StopFlag, checkpoint: int | None, *, is_resumed: bool, footprint_of: Callable[..., Any]
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
        if config.topology.runs_in != "joined processes":  # otherwise the launcher holds it
            # This comes before a checkpoint is chosen, because whoever holds the lock may still write one.
            self._closing.add(self.directory.lock().release)
        if is_resumed and checkpoint is None:
            checkpoint = self._checkpoints.latest()
        metadata = None if checkpoint is None else self._read_metadata(checkpoint)
        if is_resumed:  # only once the network is known to be the one that the run was trained with
            check_fits(config, topology.footprint(), footprint_of)
        self._closing.add(self._checkpoints.close)
        self._closing.add(topology.close)
        enable_compilation_cache()
        announce("starting processes" if config.topology.runs_in == "ray" else "compiling")
        with self._interrupting(stop):
            self._compile_seconds = topology.start()
            topology.prepare_evaluation()
            state = None if metadata is None else topology.read(self._checkpoints, checkpoint, metadata)
        self._writes = peers.is_first()  # files that a run has once, even in several processes
        self._metrics = MetricsWriter(self.directory, self._began) if self._writes else None
        if self._metrics:
            self._closing.add(self._metrics.close)
        if metadata is not None and state is not None:
            self._restore(state, metadata)
        if is_resumed and self._metrics:
            self._metrics.truncate_after(topology.env_steps)

    def _interrupting(self, stop: StopFlag) -> contextlib.AbstractContextManager[None]:
        """Returns a context that a signal may leave half-way. Equal processes must first agree to stop."""
        is_alone = self.config.topology.runs_in != "joined processes"
        return stop.interrupting() if is_alone else contextlib.nullcontext()

    def _read_metadata(self, checkpoint: int) -> dict[str, Any]:
        """Returns the metadata of the checkpoint to continue from, after checking it."""
        metadata = read_metadata(self._checkpoints, checkpoint, self.config)
        check_network_is_given(self._has_own_network, metadata["has_own_network"])
        check_as_recorded(self._env, metadata.get("environment"), self.config.env)
        if not self._has_own_network:
            check_reads_the_same(self.directory, self._env.spec)
        check_goes_on(metadata, self.config)
        return metadata

    def _restore(self, state: dict[str, Any], metadata: dict[str, Any]) -> None:
        self._topology.restore(state, metadata["counters"])
        self._checkpoints.set_aside_after(self._topology.env_steps)
        env_steps, period = self._topology.env_steps, self.config.eval_period_env_steps
        self._evaluated_at = metadata.get("evaluated_at", env_steps // period * period)
        self._num_episodes = metadata.get("num_episodes", 0)
        self._best.restore(metadata.get("best_evaluation"))
        self._rounds.restore(metadata.get("evaluation_rounds"))
        if self.config.stop_return == metadata.get("stop_return", self.directory.config.stop_return):
            self._solved_at = metadata["solved_at"]
        self._goes_on = None not in self._solved_at
        for i in range(self.config.num_seeds):
            if self._solved_at[i] is not None and not self._goes_on:
                self._topology.keep(i)

    def __iter__(self) -> Iterator[Progress]:
        if not self._is_new:
            raise ConfigError(
                f"a run can be iterated over only once, and this one has been already; continue with "
                f"qfleet.resume({str(self.directory.path)!r}, env_steps=...)"
            )
        self._is_new = False
        check_not_forked()
        return iter(()) if self.summary else closed_at_exit(self._train())  # stopped already, while it started

    def _train(self) -> Generator[Progress, None, None]:
        stopped: str | None = None
        failure = ""
        with StopFlag() as stop, self._closing:
            try:
                try:
                    self._evaluate_if_pending(stop)
                    stopped = "interrupted" if peers.any_of(stop.requested)[0] else self._reason_to_stop()
                    saved_at = time.monotonic()
                    while stopped is None:
                        progress = self._advance(stop)
                        is_due = time.monotonic() - saved_at > self.config.checkpoint_period_seconds
                        must_stop, must_save = peers.any_of(stop.requested, stop.take_save_request() or is_due)
                        stopped = "interrupted" if must_stop else self._reason_to_stop()
                        self._decided_at = time.monotonic()
                        if must_save and stopped is None:
                            self._save_if_possible()
                            saved_at = time.monotonic()
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
        goal = min((self._topology.env_steps // period + 1) * period, self.config.env_steps)
        progress = self._topology.advance(goal)
        self._speed.add(progress)
        self._time_shares.add(progress)
        self._num_env_failures += progress.num_env_failures
        self._num_episodes += progress.num_episodes
        self._rounds.add(progress)
        if progress.env_steps >= goal:
            progress = dataclasses.replace(progress, **self._evaluate_and_film(stop))
        if diverged := self._divergence.check(progress):
            self._warn("divergence", diverged)
        if self._metrics:
            self._metrics.write(progress.env_steps, progress.metrics())
        return progress

    def _evaluate_if_pending(self, stop: StopFlag) -> None:
        """Plays the evaluation that was due when the run was stopped, if a signal has interrupted it."""
        env_steps, period = self._topology.env_steps, self.config.eval_period_env_steps
        is_at_end = env_steps >= self.config.env_steps and self._evaluated_at < env_steps
        if env_steps // period > self._evaluated_at // period or is_at_end:
            evaluated = self._evaluate_and_film(stop)
            if self._metrics and evaluated:
                self._metrics.write(env_steps, {"eval_return_mean": float(np.mean(evaluated["eval_returns"]))})

    def _evaluate_and_film(self, stop: StopFlag) -> dict[str, Any]:
        """Evaluates and films, unless a signal interrupts that, and returns what `_evaluate` does."""
        is_interruptible = self.config.topology.runs_in == "this process"  # others only ask now and then
        try:
            with stop.interrupting() if is_interruptible else contextlib.nullcontext():
                evaluated = self._evaluate(stop)
        except StopRequested:
            return {}
        if not evaluated and peers.any_of(stop.requested)[0]:
            return {}
        newest = self._rounds.summary
        if evaluated:
            self._best.add(newest["eval_at_env_steps"], np.array(newest["eval_returns"]))
        self._film_if_due(stop)
        self._evaluated_at = self._topology.env_steps
        return evaluated

    def _evaluate(self, stop: StopFlag) -> dict[str, Any]:
        """Evaluates, if that is due, and notes which seeds have reached the return to stop at.

        Returns:
          The evaluation's fields of `Progress`; none if there was no evaluation.
        """
        unsolved = np.array([solved is None for solved in self._solved_at])
        evaluated, reached = self._rounds.evaluate(unsolved, lambda: stop.requested)
        for i in np.flatnonzero(reached):
            self._solved_at[i] = self._topology.env_steps
            self._topology.keep(int(i))
        return evaluated

    def _film_if_due(self, stop: StopFlag) -> None:
        recorder, env_steps = self._recorder, self._topology.env_steps
        if recorder is not None and recorder.is_due(env_steps, self._evaluated_at) and self._writes:
            announce("filming")
            recorder.record(
                jax.device_get(self._topology.params), env_steps, self.directory.videos_path, lambda: stop.requested
            )

    def _reason_to_stop(self) -> str | None:
        if self.config.stop_return is not None and None not in self._solved_at and not self._goes_on:
            return "return reached"
        return "env steps" if self._topology.env_steps >= self.config.env_steps else None

    def _save(self) -> None:
        announce("saving")
        try:
            state = self._topology.state  # must come first: a fleet continues meanwhile, and this fixes what counts
        except StateIsLost as error:
            logger.warning("there is no checkpoint at environment step %d: %s", self._topology.env_steps, error)
            return
        metadata = {
            "counters": self._topology.counters,
            "solved_at": self._solved_at,
            "stop_return": self.config.stop_return,
            "evaluated_at": self._evaluated_at,
            "evaluation_rounds": self._rounds.saved,
            "best_evaluation": self._best.saved(),
            "num_episodes": self._num_episodes,
            "has_own_network": self._has_own_network,
            "environment": record_of(self._env),
            "layout": self._topology.layout,
        }
        self._checkpoints.save(self._topology.env_steps, state, metadata)

    def _save_if_possible(self) -> None:
        """Saves on the way. A disk that is full now may have room at the next time."""
        try:
            self._save()
        except (OSError, ConfigError) as error:  # a folder that can't be read, or another run's checkpoint
            if jax.process_count() > 1:  # several processes can only save together
                raise
            self._warn("saving", f"{error}. The run goes on, and the next checkpoint tries again")

    def _finish(self, stopped: str, **more: Any) -> None:
        with contextlib.suppress(OSError):  # of an earlier checkpoint, which must not prevent this one
            self._checkpoints.wait()
        self._save()
        self._checkpoints.wait()
        if fall := self._best.fall():
            self._warn("fall", fall)
        self._write_summary(stopped, **more)

    def _fail(self, error: BaseException, stop: StopFlag) -> str:
        """Saves what is sound, writes the summary, and returns what happened in one line."""
        self._decided_at = time.monotonic()
        if isinstance(error, KeyboardInterrupt) and stop.requested:  # the second signal, of somebody who won't wait
            self._write_summary_if_possible("interrupted")
            return "interrupted"
        is_sound = not isinstance(error, RunFailed) or error.learner_is_sound
        can_save = not is_of_checkpoints(error)
        if is_sound and can_save and jax.process_count() == 1:  # several processes can only save together
            try:
                self._save()
                self._checkpoints.wait()
            except Exception as another:
                logger.warning("what the run has learned since its newest checkpoint is lost: %s", describe(another))
        self._num_env_failures = max(self._num_env_failures, getattr(error, "num_env_failures", 0))
        try:
            newest = self._checkpoints.latest()
        except ConfigError as another:  # the folder can't be read any more; the error under way matters more
            logger.warning("%s", another)
            newest = None
        message = message_of(error, self._topology.env_steps, newest, self.directory.path)
        self._write_summary_if_possible("failed", error=message)
        return message

    def _warn(self, about: str, text: str) -> None:
        """Logs a warning, and notes it for the summary; only once about the same thing."""
        if about not in self._warnings:
            self._warnings[about] = text
            logger.warning("%s", text)

    def _write_summary_if_possible(self, stopped: str, **more: Any) -> None:
        try:
            self._write_summary(stopped, **more)
        except Exception as error:  # such as a full disk; the error that is under way matters more
            logger.warning("the summary can't be written: %s", describe(error))

    def _write_summary_of_start(self) -> None:
        """Writes the summary of a run that was stopped while it started, which has changed nothing."""
        before = self.directory.read_summary() or {}
        self._write_summary("interrupted", **{k: v for k, v in before.items() if k not in ("stopped", "error")})

    def _write_summary(self, stopped: str, **more: Any) -> None:
        config = self.config
        self.summary = {
            "env": config.env,
            "backend": self.backend,
            "preset": config.preset,
            "topology": config.topology.name,
            "seed": config.seed,
            "num_seeds": config.num_seeds,
            "stopped": stopped,
            "env_steps": self._topology.env_steps,
            "learner_steps": self._topology.learner_steps,
            "num_episodes": self._num_episodes,
            "env_steps_between_episodes": self._num_episodes // config.num_seeds,
            "solved_at_env_steps": self._solved_at,
            "wall_seconds": self._decided_at - self._began,
            "process_age_seconds": self._process_age,
            "compile_seconds": self._compile_seconds,
            "env_steps_per_second": self._speed.per_second(self._speed.env_steps),
            "learner_steps_per_second": self._speed.per_second(self._speed.learner_steps),
            **self._time_shares.summary(),
            **self._rounds.summary,
            **self._best.summary(),
            "num_env_failures": self._num_env_failures,
            "num_videos": self._recorder.num_videos if self._recorder else 0,
            "num_video_failures": self._recorder.num_failures if self._recorder else 0,
            "peak_rss_bytes": peak_rss_bytes(),
            "version": self.directory.version,
            "warnings": list(self._warnings.values()),
            **self._topology.facts,
            **more,
        }
        if peers.is_first():
            self.directory.write_summary(self.summary)
