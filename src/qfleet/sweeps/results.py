"""What a sweep leaves for its reader: best.json, and sweep.html."""

import json
import logging
from collections.abc import Mapping, Sequence

from qfleet.config import TrainConfig
from qfleet.config.encoding import SCHEMA_VERSION, encode
from qfleet.envs.failures import describe
from qfleet.runtime.report.page import render
from qfleet.runtime.run_directory import write_atomically
from qfleet.sweeps.directory import SweepDirectory
from qfleet.sweeps.page import sweep_data
from qfleet.sweeps.records import TrialRecord
from qfleet.sweeps.space import Parameter

logger = logging.getLogger("qfleet")


def write_results(
    directory: SweepDirectory,
    space: Sequence[Parameter],
    records: Sequence[TrialRecord],
    config: TrainConfig | None,
    importances: Mapping[str, float],
) -> None:
    """Writes best.json and sweep.html into a sweep's folder, in place of older ones.

    Args:
      directory: the sweep's folder.
      space: the settings that vary.
      records: all trials, the best first.
      config: the best trial's config; None if none is complete.
      importances: share of the difference between trials that each setting explains.
    """
    if config is not None:
        content = {"schema_version": SCHEMA_VERSION, **encode(config)}
        write_atomically(directory.best_path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    try:
        write_atomically(directory.page_path, render(sweep_data(directory, space, records, importances)))
    except OSError as error:  # the results are in the journal, and the page is written again when the sweep goes on
        logger.warning("sweep.html can't be written: %s", describe(error))
