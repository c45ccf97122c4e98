"""The summary of a run whose seeds are runs of their own: how far each has come, and what all have reached."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.own_parts import own_parts
from qfleet.runtime.run_directory import SEEDS_FOLDER, RunDirectory
from qfleet.runtime.run_files import shortened


@dataclasses.dataclass
class Seed:
    """One seed of a run, as far as its folder tells."""

    seed: int
    folder: Path
    """Folder of the seed's own run. There is none until it begins."""
    error: str = ""
    """Why it failed, now that it has."""
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Content of its summary.json; empty if there is none."""

    def read(self) -> None:
        """Reads its summary.json. One that can't be read counts as none: the seed's run replaces it."""
        try:
            self.summary = RunDirectory.open(self.folder).read_summary() or {}
        except ConfigError:
            self.summary = {}

    @property
    def log(self) -> Path:
        """File with the output of its process."""
        return self.folder.with_suffix(".log")

    @property
    def stopped(self) -> str:
        """Why its run stopped, as its summary says, or "failed"; "interrupted" if it has not come to an end."""
        return "failed" if self.error else str(self.summary.get("stopped", "interrupted"))

    @property
    def env_steps(self) -> int:
        """Environment steps that its run had taken when it stopped last."""
        return _whole(self.summary.get("env_steps"))

    @property
    def eval_returns(self) -> list[float]:
        """Returns of its newest evaluation when its run stopped last; empty if there was none."""
        returns = _of_one(self.summary, "eval_returns") or []
        return [value for value in returns if value is not None]

    def is_finished(self, env_steps: int, *, stop_return_holds: bool) -> bool:
        """Returns whether nothing is left to do.

        Args:
          env_steps: environment steps at which the run ends now.
          stop_return_holds: whether the return to stop at is the one that the run began with.
        """
        if self.stopped == "return reached" and stop_return_holds:
            return True
        return self.stopped in ("env steps", "return reached") and self.env_steps >= env_steps


def seeds_of(path: Path, config: TrainConfig) -> list[Seed]:
    """Returns the seeds of a run in this folder, in order, with what they have left there."""
    seeds = [Seed(seed, path / SEEDS_FOLDER / str(seed)) for seed in config.seeds]
    for seed in seeds:
        seed.read()
    return seeds


def open_seed(directory: RunDirectory, seed: int | None) -> RunDirectory:
    """Returns the folder of one seed's own run; None stands for the first seed.

    Raises:
      ConfigError: if the run has no such seed, it has not begun, or its folder holds another run.
    """
    config = directory.config
    seed = config.seed if seed is None else seed
    check_seed(config, seed)
    path = directory.folder / SEEDS_FOLDER / str(seed)
    if not (path / "config.json").exists():
        raise ConfigError(
            f"a seed must have begun before anything is known of it, got seed {seed} of {directory.path}, which "
            f"hasn't; give another seed, or `qfleet resume` the run"
        )
    own = RunDirectory.open(path)
    if dataclasses.replace(own.config, run_dir=None) != config.of_seed(seed):
        raise ConfigError(
            f"the run of a seed must have the config of the whole run, got another one in {path}; restore the folder "
            f"from a copy, or train again into another folder"
        )
    return own


def check_seed(config: TrainConfig, seed: int) -> None:
    """Raises ConfigError if a run doesn't train this seed."""
    if seed not in config.seeds:
        raise ConfigError(f"seed must be one that the run trained, {config.seeds[0]} to {config.seeds[-1]}, got {seed}")


def combined_summary(config: TrainConfig, seeds: Sequence[Seed], best: tuple[int, float] | None) -> dict[str, Any]:
    """Returns the entries of summary.json that follow from those of the seeds.

    They are those of a run that trains all seeds in one program, and `seeds`, which tells how each seed's run ended.

    Args:
      config: of the run with all seeds.
      seeds: the seeds, in order.
      best: environment steps and mean return of the best evaluation.
    """
    summaries = [seed.summary for seed in seeds]

    def numbers(name: str) -> list[Any]:
        return [value for summary in summaries if type(value := summary.get(name)) in (int, float)]

    returns = [seed.eval_returns for seed in seeds]
    flat = [value for each in returns for value in each]
    limits = numbers("eval_episode_limit")
    num_episodes = _whole(sum(numbers("num_episodes")))
    return {
        "own_parts": own_parts(config.agent),
        "stopped": _stopped(seeds),
        "env_steps": max((seed.env_steps for seed in seeds), default=0),
        "learner_steps": max(numbers("learner_steps"), default=0),
        "num_episodes": num_episodes,
        "env_steps_between_episodes": num_episodes // config.num_seeds,
        "solved_at_env_steps": [_of_one(summary, "solved_at_env_steps") for summary in summaries],
        "compile_seconds": max(numbers("compile_seconds"), default=0.0),
        "env_steps_per_second": _mean(numbers("env_steps_per_second")),
        "learner_steps_per_second": _mean(numbers("learner_steps_per_second")),
        "time_shares": None,
        "eval_at_env_steps": max(numbers("eval_at_env_steps"), default=None),
        "eval_return_mean": _mean(flat),
        "eval_returns": returns if flat else None,
        "eval_num_different": sum(numbers("eval_num_different")) if flat else None,
        "eval_num_cut": sum(numbers("eval_num_cut")) if flat else None,
        "eval_episode_limit": max(limits) if limits else None,
        "eval_exploration": config.eval_exploration,
        "confirmed_by_new_episodes": [_of_one(summary, "confirmed_by_new_episodes") for summary in summaries],
        "best_eval_at_env_steps": best and best[0],
        "best_eval_return_mean": best and best[1],
        **{name: sum(numbers(name)) for name in ("num_env_failures", "num_videos", "num_video_failures")},
        "peak_rss_bytes": max(numbers("peak_rss_bytes"), default=0),
        "warnings": [
            f"seed {seed.seed}: {warning}" for seed in seeds for warning in seed.summary.get("warnings") or []
        ],
        "seeds": [
            {
                "seed": seed.seed,
                "run": f"{SEEDS_FOLDER}/{seed.seed}",
                "stopped": seed.stopped,
                "env_steps": seed.env_steps,
                **({"error": seed.error} if seed.error else {}),
            }
            for seed in seeds
        ],
        **({"error": failures_in_words(seeds)} if any(seed.error for seed in seeds) else {}),
    }


def failures_in_words(seeds: Sequence[Seed]) -> str:
    """Returns which seeds failed and why, in one line."""
    failed = [f"seed {seed.seed}: {shortened(seed.error, 400)}" for seed in seeds if seed.error]
    return f"{len(failed)} of {len(seeds)} seeds failed: {'; '.join(failed)}"


def _stopped(seeds: Iterable[Seed]) -> str:
    """Returns why all seeds together have stopped."""
    reasons = {seed.stopped for seed in seeds}
    for reason in ("failed", "interrupted", "env steps"):
        if reason in reasons:
            return reason
    return "return reached"


def _of_one(summary: dict[str, Any], name: str) -> Any:
    """Returns the only item of a list in the summary of a seed's run, or None if it has none."""
    values = summary.get(name)
    return values[0] if isinstance(values, list) and values else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _whole(value: Any) -> int:
    return int(value) if type(value) in (int, float) else 0
