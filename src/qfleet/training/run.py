"""A training run under way in this process."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.core.types import Network
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
from qfleet.runtime.signals import StopFlag
from qfleet.runtime.stopwatch import TimeShares
from qfleet.topologies.base import StateIsLost
from qfleet.topologies.footprint import check_fits
from qfleet.training.assembly import footprint, make_env_and_network, make_topology
from qfleet.training.evaluation_rounds import EvaluationRounds
from qfleet.training.metadata import read_metadata
from qfleet.training.resuming import check_goes_on, check_network_is_given

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
        # Mistakes are found before the folder is touched and before anything is compiled.
        self._has_own_network = network is not None
        env, network = make_env_and_network(config, network)
        self._topology = make_topology(config, env, network, optimiser)
        footprint_of = functools.partial(footprint, network=network, optimiser=optimiser)
        if not is_resumed:
            check_fits(config, self._topology.footprint(), footprint_of)
        self._recorder = None if config.video_period_env_steps is None else Recorder(config, env, network)
        self.config = config
        self.backend = backend_of(config.env)
        """Backend that makes the environments, as named by `backend_of`: for a bare name, the fastest that there is."""
        self.directory = open_directory()
        """Folder of the run."""
        self._topology.checkpoints_path = self.directory.checkpoints_path
        self._checkpoints = Checkpoints(
            self.directory.checkpoints_path,
            keep=config.checkpoints_kept,
            run_id=self.directory.run_id,
            is_keeper=peers.is_first(),
        )
        metadata = self._metadata_to_resume(checkpoint) if is_resumed else None
        if is_resumed:  # only once the network is known to be the one that the run was trained with
            check_fits(config, self._topology.footprint(), footprint_of)
        is_launched = config.topology.runs_in == "joined processes"
        self._lock = None if is_launched else self.directory.lock()  # otherwise the launcher holds it
        self.summary: dict[str, Any] = {}
        """Content of summary.json, once the run is over."""
        self._solved_at: list[int | None] = [None] * config.num_seeds
        self._rounds = EvaluationRounds(config, self._topology, env.spec.time_limit)
        self._evaluated_at = 0  # in environment steps
        self._num_env_failures = 0
        self._speed = _Speed()
        self._time_shares = TimeShares(config.topology.num_envs)
        self._decided_at = 0.0  # in seconds since the start of the process
        enable_compilation_cache()
        announce("starting processes" if config.topology.runs_in == "ray" else "compiling")
        self._compile_seconds = self._topology.start()
        self._topology.prepare_evaluation()
        self._writes = peers.is_first()  # files that a run has once, even in several processes
        self._metrics = MetricsWriter(self.directory) if self._writes else None
        self._is_new = True  # not iterated over yet
        if metadata is not None:
            self._restore(checkpoint, metadata)
        if is_resumed and self._metrics:
            self._metrics.truncate_after(self._topology.env_steps)

    def _metadata_to_resume(self, checkpoint: int | None) -> dict[str, Any] | None:
        """Returns the metadata of the checkpoint to continue from, after checking it; None if there is none yet."""
        if checkpoint is None and self._checkpoints.latest() is None:
            return None
        metadata = read_metadata(self._checkpoints, checkpoint, self.config)
        check_network_is_given(self._has_own_network, metadata["has_own_network"])
        check_goes_on(metadata, self.config)
        return metadata

    def _restore(self, checkpoint: int | None, metadata: dict[str, Any]) -> None:
        state = self._topology.read(self._checkpoints, checkpoint, metadata)
        self._topology.restore(state, metadata["counters"])
        self._checkpoints.set_aside_after(self._topology.env_steps)
        period = self.config.eval_period_env_steps
        self._evaluated_at = self._topology.env_steps // period * period
        self._solved_at = metadata["solved_at"]
        self._rounds.restore(metadata.get("evaluation_rounds"))
        for i in range(self.config.num_seeds):
            if self._solved_at[i] is not None:
                self._topology.keep(i)

    def __iter__(self) -> Iterator[Progress]:
        if not self._is_new:
            raise ConfigError(
                f"a run can be iterated over only once, and this one has been already; continue with "
                f"qfleet.resume({str(self.directory.path)!r}, env_steps=...)"
            )
        self._is_new = False
        check_not_forked()
        return self._train()

    def _train(self) -> Iterator[Progress]:
        stopped: str | None = None
        try:
            with StopFlag() as stop:
                saved_at = time.monotonic()
                while stopped is None:
                    progress = self._advance(stop)
                    is_due = time.monotonic() - saved_at > self.config.checkpoint_period_seconds
                    must_stop, must_save = peers.any_of(stop.requested, is_due)
                    stopped = "interrupted" if must_stop else self._reason_to_stop()
                    self._decided_at = seconds_since_process_start()
                    if must_save and stopped is None:
                        self._save()
                        saved_at = time.monotonic()
                    yield progress
                self._finish(stopped)
        except GeneratorExit:  # the caller has left the loop
            self._finish(stopped or "interrupted")
            raise
        except RunFailed as error:
            if error.learner_is_sound and jax.process_count() == 1:  # several processes can only save together
                self._save()
            self._write_summary("failed", error=str(error))
            raise
        finally:
            self._topology.close()
            if self._metrics:
                self._metrics.close()
            self._checkpoints.close()
            if self._lock:
                self._lock.release()

    def _advance(self, stop: StopFlag) -> Progress:
        """Trains one chunk, which ends at the next evaluation at the latest, and then evaluates and films if it did."""
        period = self.config.eval_period_env_steps
        goal = min((self._topology.env_steps // period + 1) * period, self.config.env_steps)
        progress = self._topology.advance(goal)
        self._speed.add(progress)
        self._time_shares.add(progress)
        self._num_env_failures += progress.num_env_failures
        self._rounds.add(progress)
        if progress.env_steps >= goal:
            progress = dataclasses.replace(progress, **self._evaluate(stop))
            self._film_if_due(stop)
            self._evaluated_at = progress.env_steps
        if self._metrics:
            self._metrics.write(progress.env_steps, progress.metrics())
        return progress

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
        if self.config.stop_return is not None and None not in self._solved_at:
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
            "evaluation_rounds": self._rounds.saved,
            "has_own_network": self._has_own_network,
            "layout": self._topology.layout,
        }
        self._checkpoints.save(self._topology.env_steps, state, metadata)

    def _finish(self, stopped: str) -> None:
        self._save()
        self._write_summary(stopped)

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
            "solved_at_env_steps": self._solved_at,
            "wall_seconds": self._decided_at,
            "compile_seconds": self._compile_seconds,
            "env_steps_per_second": self._speed.per_second(self._speed.env_steps),
            "learner_steps_per_second": self._speed.per_second(self._speed.learner_steps),
            **self._time_shares.summary(),
            **self._rounds.summary,
            "num_env_failures": self._num_env_failures,
            "num_videos": self._recorder.num_videos if self._recorder else 0,
            "num_video_failures": self._recorder.num_failures if self._recorder else 0,
            "peak_rss_bytes": peak_rss_bytes(),
            "version": self.directory.version,
            **self._topology.facts,
            **more,
        }
        if self._writes:
            self.directory.write_summary(self.summary)


class _Speed:
    """Steady-state speed of training. Evaluations don't count, nor does the first chunk, which warms caches up."""

    def __init__(self) -> None:
        self.env_steps = 0
        self.learner_steps = 0
        self._seconds = 0.0
        self._is_first = True

    def add(self, progress: Progress) -> None:
        if not self._is_first:
            self.env_steps += progress.new_env_steps
            self.learner_steps += progress.new_learner_steps
            self._seconds += progress.train_seconds
        self._is_first = False

    def per_second(self, count: int) -> float | None:
        return count / self._seconds if self._seconds else None
