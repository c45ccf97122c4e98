"""The metadata of a run's checkpoints, which may have been damaged or written by somebody else."""

import logging
from typing import Any

from qfleet.config import TrainConfig
from qfleet.config.own_parts import own_parts
from qfleet.envs.recorded import is_record
from qfleet.runtime.best_checkpoint import RETURN_MEAN, BestCheckpoint
from qfleet.runtime.checkpoint_files import CheckpointError
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.run_files import shortened
from qfleet.training.outcome import Evaluation

logger = logging.getLogger("qfleet")

_COUNTERS = ("env_steps", "learner_steps", "replay_starts_at")
"""Counters that every topology saves. Others are whole numbers or lists of them, too."""


def read_metadata(checkpoints: Checkpoints, checkpoint: int | None, config: TrainConfig) -> dict[str, Any]:
    """Returns the metadata of a checkpoint, after checking that it is what a run with this config saves.

    Raises:
      CheckpointError: if there is no such checkpoint, or its metadata holds something else.
    """
    metadata = checkpoints.read_metadata(checkpoint)
    for name, fits in _checks(metadata, config).items():
        if not fits:
            raise CheckpointError(
                f"a checkpoint's metadata must be what this run saves, got {name} "
                f"{shortened(repr(metadata.get(name)), 100)} in {'the newest' if checkpoint is None else checkpoint}; "
                f"restore the checkpoint from a copy, or give another one with --checkpoint"
            )
    return metadata


def best_evaluation(best: BestCheckpoint, config: TrainConfig) -> Evaluation | None:
    """Returns the evaluation for which a run keeps its best checkpoint; None if there is none that can be read."""
    try:
        if best.latest() is None:
            return None
        metadata = read_metadata(best, None, config)
    except CheckpointError as error:
        logger.warning("the run goes on without its best checkpoint, and will keep another one: %s", error)
        return None
    mean, mean_error = (metadata.get(name, 0.0) for name in (RETURN_MEAN, "return_error"))
    return Evaluation(metadata["counters"]["env_steps"], mean, mean_error)


def _checks(metadata: dict[str, Any], config: TrainConfig) -> dict[str, bool]:
    """Returns whether each part of a checkpoint's metadata is of the right kind, by name."""
    counters, solved_at, layout = (metadata.get(name) for name in ("counters", "solved_at", "layout"))
    return {
        "counters": isinstance(counters, dict)
        and all(_is_count(counters.get(name)) for name in _COUNTERS)
        and all(_is_count(value) or _are_counts(value) for value in counters.values()),
        "solved_at": isinstance(solved_at, list)
        and len(solved_at) == config.num_seeds
        and all(steps is None or _is_count(steps) for steps in solved_at),
        "evaluation_rounds": _are_rounds(metadata.get("evaluation_rounds"), config),
        "evaluated_at": _is_count(metadata.get("evaluated_at", 0)),
        "num_episodes": _is_count(metadata.get("num_episodes", 0)),
        "stop_return": metadata.get("stop_return") is None or _is_number(metadata["stop_return"]),
        "best_evaluation": _are_evaluations(metadata.get("best_evaluation")),
        RETURN_MEAN: _is_number(metadata.get(RETURN_MEAN, 0.0)),
        "fixed": isinstance(metadata.get("fixed", {}), dict)
        and all(map(_is_number, metadata.get("fixed", {}).values())),
        "return_error": _is_number(metadata.get("return_error", 0.0)),
        "environment": metadata.get("environment") is None or is_record(metadata["environment"]),
        "own_parts": metadata.get("own_parts", own_parts(config.agent)) == own_parts(config.agent),
        "has_own_network": isinstance(metadata.get("has_own_network"), bool),
        "layout": isinstance(layout, str)
        or (
            isinstance(layout, dict)
            and isinstance(layout.get("topology"), str)
            and all(_is_count(layout.get(name)) for name in ("num_segments", "lanes_per_segment"))
        ),
    }


def _are_rounds(rounds: Any, config: TrainConfig) -> bool:
    """Returns whether this is what a run remembers of its evaluations. Older versions remember nothing."""
    if rounds is None:
        return True
    if not isinstance(rounds, dict):
        return False
    newest, new_episodes, lengths = (rounds.get(name) for name in ("newest", "new_episodes", "lengths"))
    return (
        isinstance(newest, dict)
        and _are_returns(newest.get("eval_returns"))
        and isinstance(new_episodes, list)
        and len(new_episodes) == config.num_seeds
        and all(count is None or _is_count(count) for count in new_episodes)
        and isinstance(lengths, list)
        and len(lengths) == 2
        and all(map(_is_number, [*lengths, rounds.get("env_steps_taken"), rounds.get("mean_length")]))
    )


def _are_returns(returns: Any) -> bool:
    """Returns whether this is None or a list of each seed's returns."""
    return returns is None or (
        isinstance(returns, list)
        and all(isinstance(each, list) and all(map(_is_number_or_none, each)) for each in returns)
    )


def _are_evaluations(evaluations: Any) -> bool:
    """Returns whether this is None, or the best and the newest evaluation, each three numbers or None."""
    return evaluations is None or (
        isinstance(evaluations, list)
        and len(evaluations) == 2
        and all(
            each is None or (isinstance(each, list) and len(each) == 3 and all(map(_is_number_or_none, each)))
            for each in evaluations
        )
    )


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return type(value) is int and -1 <= value < 2**62  # -1 is an incarnation that has not begun


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_count, values))
