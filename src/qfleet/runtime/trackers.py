"""Trackers of experiments as loggers: Weights & Biases, and MLflow. Each needs the extra of its name.

Where they log to is set as for any program that uses them: by their own variables and files, such as WANDB_MODE=offline
or MLFLOW_TRACKING_URI. Nothing is logged there unless the user names the tracker.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qfleet.config import ConfigError, suggest
from qfleet.config.values import show
from qfleet.runtime.loggers import LoggedRun, Logger

PROJECT = "qfleet"
"""Name of the project, or experiment, that a run is logged to if the tracker's own variables name none."""


_WANDB_INIT_SECONDS = 15.0
"""Longest wait for the server of wandb when a run begins. Its own default is longer than the end of a run waits."""

_MLFLOW_PERIOD_SECONDS = 5.0
"""Time between two writes to MLflow."""

_MLFLOW_MOST_METRICS = 1000
"""The most metrics that MLflow takes at once."""


class WandbLogger:
    """Logs to Weights & Biases. The run's files of it lie in the run's folder. A run that is resumed goes on there."""

    def begin(self, run: LoggedRun) -> None:
        """Begins a run of wandb, or goes on with the one of the same id.

        Raises:
          RuntimeError: if nobody has logged in, because wandb would ask for that in the terminal.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which would send errors in offline mode, too
        import wandb

        mode = os.environ.get("WANDB_MODE", wandb.setup().settings.mode)
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("there is no API key; run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.path.name,
            id=run.run_id or None,
            resume="allow",
            dir=str(run.path),
            config=dict(run.config),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, init_timeout=_WANDB_INIT_SECONDS
            ),
        )

    def log(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        """Logs one record. wandb leaves out a step that it has already."""
        self._run.log(dict(numbers), step=env_steps)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Logs the summary's numbers and texts, and ends the run of wandb."""
        self._run.summary.update(
            {name: value for name, value in summary.items() if isinstance(value, (int, float, str))}
        )
        self._run.finish()


class MlflowLogger:
    """Logs to MLflow. A run that is resumed goes on there."""

    def begin(self, run: LoggedRun) -> None:
        """Begins a run of MLflow in the experiment that MLFLOW_EXPERIMENT_NAME names, or goes on with the run's own."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._waiting: list[Any] = []
        self._written_at = time.monotonic()
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tag = "qfleet.run_id"
        found = self._client.search_runs([number], f"tags.`{tag}` = '{run.run_id}'") if run.run_id else []
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, run_name=run.path.name, tags={tag: run.run_id}).info.run_id
        params = [Param(name, str(value)[:500]) for name, value in _flat(run.config)]
        for i in range(0, len(params), 100):  # the most that it takes at once
            self._client.log_batch(self._id, params=params[i : i + 100])

    def log(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        """Logs one record, together with the next ones: a store in SQLite takes some 30 ms for each time."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        self._waiting += [Metric(name, value, now, env_steps) for name, value in numbers.items()]
        if time.monotonic() - self._written_at > _MLFLOW_PERIOD_SECONDS:
            self._write()

    def end(self, summary: Mapping[str, Any]) -> None:
        """Notes why the run has ended, and ends the run of MLflow."""
        self._write()
        stopped = str(summary.get("stopped", ""))
        self._client.set_tag(self._id, "qfleet.stopped", stopped)
        status = {"failed": "FAILED", "interrupted": "KILLED"}.get(stopped, "FINISHED")
        self._client.set_terminated(self._id, status)

    def _write(self) -> None:
        waiting, self._waiting, self._written_at = self._waiting, [], time.monotonic()
        for i in range(0, len(waiting), _MLFLOW_MOST_METRICS):
            self._client.log_batch(self._id, metrics=waiting[i : i + _MLFLOW_MOST_METRICS])


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the settings of a nested config with dotted names."""
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


TRACKERS: dict[str, Callable[[], Logger]] = {"wandb": WandbLogger, "mlflow": MlflowLogger}
"""Loggers by the name of their package, which is also that of the extra."""


def make_loggers(loggers: Sequence[str | Logger]) -> list[tuple[str, Logger]]:
    """Returns loggers with their names in warnings, from loggers and names of trackers.

    Raises:
      ConfigError: if there is no tracker of a name, its package isn't installed, or an object is no logger.
    """
    if not isinstance(loggers, (list, tuple)):
        raise ConfigError(f"loggers must be a list of names and loggers, got {show(loggers)}; write [...] around it")
    made: list[tuple[str, Logger]] = []
    names = [each for each in loggers if isinstance(each, str)]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ConfigError(f"each tracker must be named once, got {twice[0]} twice; leave one of them out")
    for each in loggers:
        if not isinstance(each, str):
            if missing := [name for name in ("begin", "log", "end") if not callable(getattr(each, name, None))]:
                raise ConfigError(
                    f"a logger must have the methods begin, log and end, got {show(each)} without {missing[0]}"
                )
            made.append((type(each).__name__, each))
            continue
        if each not in TRACKERS:
            raise ConfigError(f"a tracker must be one of {', '.join(TRACKERS)}, got {each!r}.{suggest(each, TRACKERS)}")
        if importlib.util.find_spec(each) is None:
            raise ConfigError(f"{each} must be installed to log there; pip install 'qfleet[{each}]'")
        made.append((each, TRACKERS[each]()))
    return made
