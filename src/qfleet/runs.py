"""Reads runs back: their metrics and outcomes, one by one or side by side. Nothing here imports JAX."""

import os
from collections.abc import Iterable

from qfleet.config import ConfigError
from qfleet.config.values import show
from qfleet.runtime import diagnosis
from qfleet.runtime.comparison import Comparison
from qfleet.runtime.diagnosis import Finding
from qfleet.runtime.finding_runs import find_run
from qfleet.runtime.metrics_reading import Metrics
from qfleet.runtime.saved_run import SavedRun


def open_run(run: str | os.PathLike[str]) -> SavedRun:
    """Returns a run on disk, to read its config, summary, metrics, versions and videos. It may be under way.

    Args:
      run: the run's folder, the beginning of its name in runs/, or `latest`.

    Raises:
      ConfigError: if that isn't a run.
    """
    return SavedRun(find_run(os.fspath(run)))


def read_metrics(run: str | os.PathLike[str]) -> Metrics:
    """Returns the records of a run: a dictionary of NumPy columns, which pandas and polars make a table of.

    Lines of metrics.jsonl that hold no record are left out; `damaged` of the result names them.

    Args:
      run: as for `open_run`.

    Raises:
      ConfigError: if that isn't a run, or its metrics.jsonl can't be read.
    """
    return open_run(run).metrics


def diagnose(run: str | os.PathLike[str] | SavedRun) -> list[Finding]:
    """Returns what is wrong with a run, the likeliest root cause first. An empty list means that nothing was found.

    Args:
      run: as for `open_run`, or a run that is open already.

    Raises:
      ConfigError: if that isn't a run, or its files can't be read.
    """
    opened = run if isinstance(run, SavedRun) else open_run(run)
    return diagnosis.diagnose(opened.metrics, opened.config, opened.summary)


def compare(runs: Iterable[str | os.PathLike[str] | SavedRun]) -> Comparison:
    """Returns runs side by side: a table, the settings that differ, and curves with bands over seeds.

    Runs that differ only in their seeds form one group.

    Args:
      runs: folders of runs, as for `open_run`, or runs that are open already.

    Raises:
      ConfigError: if there is none, or one of them isn't a run.
    """
    if isinstance(runs, (str, os.PathLike)):
        raise ConfigError(f"`runs` must be a list of runs, got {show(runs)}; put it into a list")
    opened = [run if isinstance(run, SavedRun) else open_run(run) for run in runs]
    if not opened:
        raise ConfigError("`runs` must name at least one run, got none")
    return Comparison(opened)
