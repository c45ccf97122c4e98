"""Runs on disk whose curves are known, made without training."""

import json
from pathlib import Path
from typing import Any

from qfleet.config import TrainConfig
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.saved_run import SavedRun


def make_run(path: Path, num_records: int = 20, metrics: dict[str, float] | None = None, **settings: Any) -> SavedRun:
    """Makes a run with a record after every second and 100 environment steps, and an evaluation in every fifth of them.

    Args:
      path: its folder.
      num_records: number of records.
      metrics: further values of each record.
      settings: settings of the run.
    """
    run = RunDirectory.create(path, TrainConfig(env="CartPole-v1", **settings))
    with run.metrics_path.open("w") as file:
        for i in range(1, num_records + 1):
            record = {
                "env_steps": 100 * i,
                "wall_seconds": float(i),
                "learner_steps": 10 * i,
                "episode_return_mean": None if i % 2 else float(i),
                "q_mean": 0.5 * i,
                "loss": 1.0 / i,
                "td_error_mean": 2.0 / i,
                "exploration": 1.0 - i / num_records,
                "staleness": 0.0,
                "env_steps_per_second": 200.0,
                **({"eval_return_mean": float(i + settings.get("seed", 0))} if i % 5 == 0 else {}),
                **(metrics or {}),
            }
            file.write(json.dumps(record) + "\n")
    run.write_summary(
        {
            "stopped": "env steps",
            "env_steps": 100 * num_records,
            "eval_return_mean": 20.0,
            "best_eval_return_mean": 25.5,
            "best_eval_at_env_steps": 1500,
            "wall_seconds": 75.0,
            "warnings": [],
        }
    )
    return SavedRun(run.path)
