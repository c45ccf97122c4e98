"""A run on disk, as other programs read it: config, outcome, metrics, versions, videos."""

import functools
import os
from pathlib import Path
from typing import Any

from qfleet.config import ConfigError, TrainConfig
from qfleet.runtime.metrics_reading import Metrics, MetricsReader
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.run_files import read_json


class SavedRun:
    """A run's folder, read only. It may be under way, finished, or stopped half-way.

    Everything but the config is read at the first use and then kept; open the run again to see what came meanwhile.
    """

    def __init__(self, path: str | os.PathLike[str] | RunDirectory, reader: MetricsReader | None = None) -> None:
        """Reads the run's config.

        Args:
          path: the run's folder.
          reader: reads the run's metrics, and has perhaps read a part of them before.

        Raises:
          ConfigError: if the folder isn't a run, or its config.json can't be read.
        """
        self.directory = path if isinstance(path, RunDirectory) else RunDirectory.open(path)
        self._reader = reader or MetricsReader(self.directory.metrics_path)

    def __repr__(self) -> str:
        return f"SavedRun({str(self.path)!r}, {self.config.env}, {self.config.preset}, seed {self.config.seed})"

    def _repr_html_(self) -> str:
        """Returns what a notebook shows of the run: how far it got, its returns, and where the whole report is."""
        from qfleet.runtime.notebook import Curve, run_html

        config, metrics = self.config, self.metrics
        env_steps = int(metrics["env_steps"][-1]) if metrics.num_records else 0
        stopped = self.summary.get("stopped")
        return run_html(
            f"{config.env} with {config.preset}, {config.topology.name}",
            "no end yet" if stopped is None else f"stopped: {stopped}",
            completed=min(1.0, env_steps / config.env_steps),
            details=f"{env_steps:,} of {config.env_steps:,} environment steps, in {self.path}",
            curve=Curve.of_columns(metrics),
        )

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.directory.path

    @property
    def config(self) -> TrainConfig:
        """The config that the run began with."""
        return self.directory.config

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """The outcome: content of summary.json. It is empty before the run's first end.

        Raises:
          ConfigError: if summary.json can't be read.
        """
        return self.directory.read_summary() or {}

    @property
    def outcome(self) -> dict[str, Any]:
        """The summary, unless the run was resumed and has come further since then: then it is empty.

        The records of a run whose seeds have processes of their own go as far as the last seed, its summary doesn't.

        Raises:
          ConfigError: as `summary` and `metrics` do.
        """
        ended_at, records = self.summary.get("env_steps"), self.metrics["env_steps"]
        if self.config.has_seed_processes or not isinstance(ended_at, int) or not records.size:
            return self.summary
        return {} if records[-1] > ended_at else self.summary

    @functools.cached_property
    def metrics(self) -> Metrics:
        """The run's records, one NumPy column per name.

        Raises:
          ConfigError: if metrics.jsonl can't be read.
        """
        return self._reader.read()

    @functools.cached_property
    def environment(self) -> list[dict[str, Any]]:
        """Versions, devices and command of each start of the run, oldest first: content of environment.json.

        Raises:
          ConfigError: if environment.json can't be read.
        """
        file = self.directory.environment_path
        try:
            starts = read_json(file)
        except FileNotFoundError:  # a run of an older version
            return []
        except (OSError, ValueError) as error:
            raise ConfigError(f"environment.json must be JSON, got {file} ({error}); move it away") from error
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise ConfigError(f"environment.json must be a list of objects, got {file}; move it away")
        return starts

    @property
    def videos(self) -> list[Path]:
        """The run's videos, oldest first: regular files whose names end in .mp4."""
        folder = self.directory.videos_path
        if folder.is_symlink():  # to files that aren't this run's
            return []
        files = [file for file in folder.glob("*.mp4") if file.is_file() and not file.is_symlink()]
        return sorted(files, key=lambda file: (file.lstat().st_mtime_ns, file.name))
