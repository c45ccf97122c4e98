"""A batch of trials in one program: ordinary runs in folders of their own, which are iterated over in turn."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qfleet.config import ConfigError, FusedConfig, RunFailed, TrainConfig
from qfleet.config.checks import MAX_COUNT
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.signals import StopFlag, StopRequested
from qfleet.sweeps.directory import SweepDirectory
from qfleet.sweeps.space import Parameter
from qfleet.sweeps.trial import Pruning, begun_run, checkpoints_of, outcome_of
from qfleet.training.callbacks import RunControl, check_observers

if TYPE_CHECKING:
    from qfleet.runtime.loggers import Logger
    from qfleet.training.assembly import RunParts
    from qfleet.training.run import Run

MOST_LEARNERS = 16
"""Most learners in one program by default. More take hardly less time for each, and the study chooses the settings of
all trials of a batch before it knows the result of any."""

Outcome = Mapping[str, Any] | ConfigError | RunFailed
"""How a trial has ended: the summary of its run, or why it failed."""


class SaveClock:
    """Callback that saves all runs of a batch after the same chunk, so that they can go on together."""

    def __init__(self, period_seconds: float) -> None:
        """Begins to measure the time."""
        self._period, self._saved_at = period_seconds, time.monotonic()
        self._env_steps, self._is_due = -1, False

    def on_progress(self, control: RunControl, progress: Progress) -> None:
        """Saves if it is time to. The first run of a round decides for the others."""
        if progress.env_steps != self._env_steps:
            now = time.monotonic()
            self._env_steps, self._is_due = progress.env_steps, now - self._saved_at > self._period
            if self._is_due:
                self._saved_at = now
        if self._is_due:
            control.save()


def default_at_once(config: TrainConfig, space: Sequence[Parameter]) -> int:
    """Returns how many trials are chosen at once by default: 1 unless one program can train trials that differ."""
    if not isinstance(config.topology, FusedConfig):
        return 1
    from qfleet.topologies.fused.trials_on_devices import INPUTS

    return max(2, MOST_LEARNERS // config.num_seeds) if any(each.name in INPUTS for each in space) else 1


def batches(directory: SweepDirectory, configs: Mapping[int, TrainConfig]) -> list[list[int]]:
    """Returns the numbers of trials in groups that one program can train. Groups of one train in a run of their own.

    Trials that have begun go on together from the newest checkpoint that all of them have, or each on its own if there
    is none. Trials without a checkpoint begin together.

    Args:
      directory: the sweep's folder.
      configs: the configs of the trials, by number.
    """
    saved = {number: checkpoints_of(directory, number) for number in configs}
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, config in configs.items():
        key = None if _has_ended(directory, number) else _key_of(config)
        groups[number if key is None else (key, bool(saved[number]))].append(number)
    found = []
    for numbers in groups.values():
        is_together = not saved[numbers[0]] or _newest_common(directory, numbers) is not None
        found += [numbers] if is_together else [[number] for number in numbers]
    return found


def _key_of(config: TrainConfig) -> str | None:
    if not isinstance(config.topology, FusedConfig):
        return None
    from qfleet.topologies.fused.trials_on_devices import program_key

    return program_key(config)


def _has_ended(directory: SweepDirectory, number: int) -> bool:
    """Returns whether a trial has ended without the study knowing, or can't be read, which its own run will report."""
    folder = directory.trial_folder(number)
    try:
        return (folder / "config.json").exists() and bool(outcome_of(RunDirectory.open(folder)))
    except ConfigError:
        return True


def _newest_common(directory: SweepDirectory, numbers: Sequence[int]) -> int | None:
    """Returns the environment steps of the newest checkpoint that all of these trials have."""
    return max(set.intersection(*(set(checkpoints_of(directory, number)) for number in numbers)), default=None)


def train_batch(
    directory: SweepDirectory,
    configs: Mapping[int, TrainConfig],
    parts: "Mapping[int, RunParts]",
    *,
    prunings: Mapping[int, Pruning],
    loggers: "Sequence[str | Logger]",
    on_progress: Callable[[Progress], None],
    on_end: Callable[[int, Outcome], None],
    stop: StopFlag,
) -> None:
    """Trains the trials of a batch to their ends, in one program. They go on if they have begun.

    Args:
      directory: the sweep's folder.
      configs: the configs of the trials, by number, of a group that `batches` returns.
      parts: what `make_parts_of_trials` returns for them, by number.
      prunings: what may stop them early, by number; empty if nothing may.
      loggers: as for `train`.
      on_progress: told of each chunk, as the first trial sees it that is still under way.
      on_end: told how each trial has ended, as soon as it has. What it raises ends the batch.
      stop: whether a signal has asked the sweep to stop. Then all trials are saved after the same chunk.
    """
    common = _newest_common(directory, list(configs))
    clock = SaveClock(next(iter(configs.values())).checkpoint_period_seconds)
    under_way: dict[int, tuple[Run, Generator[Progress | None, None, None]]] = {}
    try:
        for number, config in configs.items():
            callbacks = [*([prunings[number]] if prunings else []), clock]
            try:
                run = _start(directory, number, config, common, parts[number], check_observers(callbacks, loggers))
            except StopRequested:  # before the run had made its folder
                break
            except (ConfigError, RunFailed) as error:
                on_end(number, error)
            else:
                under_way[number] = run, run.in_turn()
        while under_way:
            _train_chunk(under_way, prunings, on_progress, on_end)
            if stop.requested:
                break
    finally:  # those that are still under way are saved where the others are
        for number, (run, iterator) in under_way.items():
            iterator.close()
            on_end(number, run.summary)


def _start(
    directory: SweepDirectory,
    number: int,
    config: TrainConfig,
    common: int | None,
    parts: "RunParts",
    observers: dict[str, Any],
) -> "Run":
    """Returns the run of a trial of a batch, which goes on from the checkpoint at `common` if it has begun."""
    from qfleet.training.run import Run

    folder = directory.trial_folder(number)
    config = dataclasses.replace(config, run_dir=str(folder), report=False).with_schedule_lengths()
    # The clock of all trials decides when they are saved, and the newest but one is there until all have the newest.
    kept = max(2, config.checkpoints_kept)
    here = dataclasses.replace(config, checkpoint_period_seconds=MAX_COUNT, checkpoints_kept=kept)
    begun = begun_run(directory, number, config)
    if begun is None:
        return Run(here, lambda: RunDirectory.create(folder, config), None, None, parts=parts, **observers)
    newest = max(checkpoints_of(directory, number), default=None)
    checkpoint = None if common == newest else common
    return Run(here, lambda: begun, None, None, is_resumed=True, checkpoint=checkpoint, parts=parts, **observers)


def _train_chunk(
    under_way: "dict[int, tuple[Run, Generator[Progress | None, None, None]]]",
    prunings: Mapping[int, Pruning],
    on_progress: Callable[[Progress], None],
    on_end: Callable[[int, Outcome], None],
) -> None:
    """Lets each trial take its share of one chunk, and evaluate and save as is due. The first time, none trains."""
    is_told = False
    for number, (run, iterator) in list(under_way.items()):
        progress: Progress | None = None
        outcome: Outcome | None = None
        try:
            progress = next(iterator)
            if number in prunings and prunings[number].has_stopped:
                next(iterator)  # ends it here, before another trial trains the next chunk
        except StopIteration:
            outcome = run.summary
        except RunFailed as error:
            outcome = error
        if outcome is not None:
            del under_way[number]
            on_end(number, outcome)
        elif progress is not None and not is_told:
            is_told = True
            on_progress(progress)
