"""`qfleet.sweep`: trains with different settings, and says which did best."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.checks import check_ray_address_trusted
from qfleet.config.encoding import encode
from qfleet.config.own_parts import check_parts_trusted, own_parts
from qfleet.config.values import show, to_plain
from qfleet.envs.names import check_trusted
from qfleet.runtime.signals import StopFlag
from qfleet.sweeps.directory import SweepDirectory, SweepPlan, default_folder, digest_of
from qfleet.sweeps.records import TrialRecord, best_first, best_of
from qfleet.sweeps.results import write_results
from qfleet.sweeps.space import Parameter, read_space, texts_of, with_settings
from qfleet.sweeps.training import SweepTraining, SweepView, all_failed

if TYPE_CHECKING:
    from qfleet.runtime.loggers import Logger
    from qfleet.sweeps.study import Study


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What a sweep has found."""

    path: Path
    """The sweep's folder."""
    trials: tuple[TrialRecord, ...]
    """All trials, the best first."""
    config: TrainConfig | None
    """The config of the best trial, for `qfleet.train`; None if no trial was complete when it was interrupted."""
    is_complete: bool
    """Whether the sweep has come to its end. Otherwise it was interrupted."""

    @property
    def best(self) -> TrialRecord | None:
        """The best trial, if any is complete."""
        return best_of(self.trials)


def sweep(
    config: TrainConfig,
    params: Mapping[str, Any],
    *,
    trials: int = 50,
    trials_at_once: int | None = None,
    trials_on_ray: str | None = None,
    trial_resources: Mapping[str, float] | None = None,
    prune: bool = True,
    loggers: "Sequence[str | Logger]" = (),
) -> SweepResult:
    """Trains with different settings, and returns which of them reached the highest return.

    A trial's result is the mean return of its last evaluation, over all episodes of all seeds (`config.num_seeds`).
    Optuna proposes settings that look promising after the trials so far. A sweep survives whatever ends its process:
    the same call goes on with it, without a trial that has ended, and with those that were under way from their newest
    checkpoints.

    Trials of a batch that differ only in numbers, such as the learning rate, are trained in one program where the
    environment is in JAX. Others are trained one after the other, or at the same time on Ray.

    Args:
      config: config of all trials, but for the settings that vary. `config.run_dir` is the sweep's folder; by default
        one in `runs/` that the same call finds again.
      params: how settings of the agent or the topology, or `env_steps`, vary: by their names, a range such as
        "1e-4..1e-2:log" or "8..64", or a list of values.
      trials: number of trials. Fewer are trained if all settings vary over lists that have fewer combinations.
      trials_at_once: number of trials in a batch. Their settings are chosen before any of them has a result. By default
        so many that they have 16 seeds in all, at least 2, if the topology is `fused` and a number varies that one
        program can take different values of; otherwise 1.
      prune: stop a trial early if it does worse than the median of the others at the same evaluation. Trials whose
        seeds have processes of their own aren't stopped early.
      loggers: as for `train`, of each trial.

    Raises:
      ConfigError: on bad input, before any work starts, if another process goes on with this sweep, or without the
        extra `sweep`.
      RunFailed: if the first three trials fail, or all of them.
      KeyboardInterrupt: if a signal asks the sweep to stop, once the trials under way have checkpoints.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"`config` must be a TrainConfig, got {show(config)}; make one with qfleet.make_config")
    texts = texts_of(params)
    if trials_on_ray is not None and (objects := [each for each in loggers if not isinstance(each, str)]):
        raise ConfigError(
            f"with trials_on_ray, loggers must be names, because an object stays in this process, got "
            f"{show(objects[0])}; give for example 'wandb'"
        )
    request = digest_of(encode(dataclasses.replace(config, run_dir=None)), texts, prune)
    directory = open_sweep(
        config,
        texts,
        trials,
        prune=prune,
        request=request,
        trials_at_once=trials_at_once,
        trials_on_ray=trials_on_ray,
        trial_resources=trial_resources,
    )
    result = run_sweep(directory, loggers=loggers)
    if not result.is_complete:
        raise KeyboardInterrupt(f"a signal has stopped the sweep; the same call goes on with {result.path}")
    return result


def open_sweep(
    config: TrainConfig,
    texts: Mapping[str, str],
    trials: int,
    *,
    prune: bool,
    request: str,
    trials_at_once: int | None = None,
    trials_on_ray: str | None = None,
    trial_resources: Mapping[str, float] | None = None,
) -> SweepDirectory:
    """Returns the locked folder of the sweep that these arguments describe, which is made if there is none.

    Args:
      config, trials, prune, trials_at_once, trials_on_ray, trial_resources: as for `sweep`.
      texts: what varies, as `texts_of` returns it.
      request: digest of what the user asked for. The same one finds the sweep that it began.

    Raises:
      ConfigError: on bad input, or if another process goes on with this sweep.
    """
    _import_study()
    read_space(config, texts)
    path = default_folder(config.env, request) if config.run_dir is None else Path(config.run_dir)
    plan = SweepPlan(
        dataclasses.replace(config, run_dir=None),
        texts,
        trials,
        prune,
        request,
        trials_at_once,
        to_plain(str | None, trials_on_ray, "trials_on_ray"),
        to_plain(Mapping[str, float], trial_resources or {}, "trial_resources"),
    )
    _import_ray(plan.trials_on_ray)
    return SweepDirectory.create_or_open(path, plan)


def reopen_sweep(path: Path, *, trust: bool, **changes: Any) -> SweepDirectory:
    """Returns the locked folder of a sweep that has begun.

    Args:
      path: its folder.
      trust: whether the user trusts modules, and an address of a Ray cluster, that only the sweep's folder names.
      **changes: those of `SweepDirectory.open`.

    Raises:
      ConfigError: if it isn't a sweep's folder, it names a module or an address that isn't trusted, or another process
        goes on with the sweep.
    """
    _import_study()
    directory = SweepDirectory.open(path, **changes)
    try:
        address = directory.plan.trials_on_ray
        _import_ray(address)
        named = None if changes.get("trials_on_ray") else address
        check_ray_address_trusted(named, str(path), "--trials-on-ray", trust=trust)
        check_trusted(directory.plan.config.env, path, trust=trust)
        check_parts_trusted(own_parts(directory.plan.config.agent), path, trust=trust)
    except BaseException:
        directory.release()
        raise
    return directory


def _import_study() -> "type[Study]":
    """Imports Optuna, which is an extra, and returns what uses it."""
    try:
        from qfleet.sweeps.study import Study
    except ImportError as error:
        raise ConfigError(f"a sweep needs Optuna ({error}); pip install 'qfleet[sweep]'") from error
    return Study


def _import_ray(address: str | None) -> None:
    """Raises ConfigError if trials are to be trained on Ray, which is an extra, and there is none."""
    if address is not None:
        importlib.import_module("qfleet.topologies.fleet.cluster")


def run_sweep(
    directory: SweepDirectory, *, loggers: "Sequence[str | Logger]" = (), view: SweepView | None = None
) -> SweepResult:
    """Trains the trials that a sweep lacks, and gives up its folder's lock.

    Raises:
      ConfigError: if its first trial can't be trained with its config.
      RunFailed: if the first three trials fail, or all of them.
    """
    plan, view = directory.plan, view or SweepView()
    try:
        space = read_space(plan.config, plan.params)
        study = _import_study()(
            directory.journal_path,
            space,
            seed=plan.config.seed,
            num_evaluations=plan.config.env_steps // plan.config.eval_period_env_steps,
        )
        view.begin(directory, min(plan.num_trials, study.num_combinations or plan.num_trials), study.records)
        with StopFlag() as stop:
            is_complete = SweepTraining(directory, study, space, view, loggers, stop).train()
        result = _result(directory, study, space, is_complete=is_complete)
        if is_complete and result.best is None:
            raise all_failed(directory, result.trials)
        return result
    finally:
        directory.release()


def _result(directory: SweepDirectory, study: "Study", space: Sequence[Parameter], *, is_complete: bool) -> SweepResult:
    """Returns what a sweep has found, after writing it to its folder."""
    records = best_first(study.records)
    best = best_of(records)
    config = None if best is None else with_settings(directory.plan.config, best.settings)
    write_results(directory, space, records, config, study.importances())
    return SweepResult(directory.path, tuple(records), config, is_complete)
