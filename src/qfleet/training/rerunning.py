"""Training a run again: with which config, what differs since then, and whether the result is the same."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.checks import check_ray_address_trusted
from qfleet.doctor.children import examine
from qfleet.envs.factory import FACTORY
from qfleet.runtime.checkpoint_files import CheckpointError
from qfleet.runtime.checkpoint_trees import named_leaves
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.environment_record import Difference, describe_process, differences
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.saved_run import SavedRun
from qfleet.training.metadata import read_metadata
from qfleet.training.resuming import check_run_trusted
from qfleet.training.seed_summary import open_seed, seeds_of


def config_to_rerun(directory: RunDirectory, run_dir: str | None, *, trust: bool) -> TrainConfig:
    """Returns the config with which a run is trained again, in a new folder.

    Args:
      directory: the run's folder.
      run_dir: the new folder; None for one in runs/.
      trust: whether the user trusts modules that only the run's folder names.

    Raises:
      ConfigError: if a module isn't trusted, or the run used what only the program that began it has.
    """
    config = directory.config
    again = f"train it again as it was begun, or with `qfleet train --config {directory.path / 'config.json'}`"
    if config.env.startswith(FACTORY):
        raise ConfigError(
            f"rerun makes the environment by its name, got {config.env}, a function that only the program which began "
            f"the run has; train it again from that program"
        )
    if config.topology.is_started_by_hand:
        raise ConfigError(
            f"rerun starts all processes of a run, got {directory.path}, whose processes were each started by hand; "
            f"{again} and a --process-id"
        )
    check_run_trusted(directory, trust=trust)
    check_ray_address_trusted(getattr(config.topology, "ray_address", None), str(directory.path), None, trust=trust)
    if any(map(_has_own_network, _learners(directory).values())):
        raise ConfigError(
            f"rerun makes the network from the config, got {directory.path}, which was trained with one that a program "
            f"gave; train it again from that program"
        )
    return dataclasses.replace(config, run_dir=run_dir)


def what_differs(directory: RunDirectory) -> list[Difference] | None:
    """Returns what differs between a run's first start and now. None if the run recorded nothing of it.

    Raises:
      ConfigError: if environment.json can't be read.
    """
    folders = (directory, *_learners(directory).values())
    starts = next((starts for each in folders if (starts := SavedRun(each).environment)), None)
    if starts is None:
        return None
    now = describe_process()
    if directory.config.has_seed_processes or directory.config.topology.runs_in == "joined processes":
        del now["num_cores"]  # a share of the cores is what each of several processes has
    if directory.config.topology.runs_in != "ray":  # where the recorded devices aren't those that learn
        now |= _devices(starts[0].get("devices"))
    return differences(starts[0], now)


def _devices(then: Any) -> dict[str, Any]:
    """Returns the devices as a run records them, or nothing if they can't be found out.

    Another process looks at them, because the run itself may divide the CPU before JAX starts.
    """
    [check] = examine(["devices"])
    if not check.facts.get("devices"):
        return {}  # the run will say why
    first = check.facts["devices"][0]
    found = {name: first[name] for name in ("platform", "kind", "count")}
    if first["platform"] == "cpu" and isinstance(then, dict):
        found["count"] = then.get("count")  # the config decides it
    return {"devices": found}


class Comparison(NamedTuple):
    """How the result of a run compares with that of the same run before."""

    is_same: bool | None
    """Whether the evaluations and the parameters are the same. None if they can't be compared."""
    words: str


def compare(before: RunDirectory, after: RunDirectory) -> Comparison:
    """Compares the last evaluation and the newest parameters of two runs, bit for bit.

    Raises:
      ConfigError: if a summary can't be read.
    """
    rule = "the results can't be compared"
    old, new = before.read_summary(), after.read_summary()
    if not old or not new:
        return Comparison(None, f"{rule}: the {'earlier' if not old else 'new'} run has not come to an end")
    if old.get("env_steps") != new.get("env_steps"):
        then, now = (f"{each.get('env_steps')} environment steps ({each.get('stopped')})" for each in (old, new))
        return Comparison(None, f"{rule}: the earlier run ended after {then}, and this one after {now}")
    pairs = [(_learners(before).get(seed), each) for seed, each in _learners(after).items()]
    try:
        found = [None if first is None else _difference_of_parameters(first, second) for first, second in pairs]
    except (ConfigError, OSError) as error:
        return Comparison(None, f"{rule}: {error}")
    if None in found:
        return Comparison(None, f"{rule}: there is no checkpoint of both with parameters of the same shapes")
    names = ("eval_return_mean", "eval_returns", "eval_at_env_steps")
    has_same_returns = all(old.get(name) == new.get(name) for name in names)
    then, now = (_shown(each.get("eval_return_mean")) for each in (old, new))
    words = f"mean return {now} both times" if has_same_returns else f"mean return {now}, and {then} before"
    changed = sum(each.num_changed for each in found if each)
    total = sum(each.num_parameters for each in found if each)
    if not changed:
        words += f", all {total:,} parameters the same bit for bit"
    else:
        largest = max(each.largest for each in found if each)
        words += f", {changed:,} of {total:,} parameters different, by {largest:.3g} at most"
    is_same = has_same_returns and not changed
    return Comparison(is_same, f"the result is {'the same' if is_same else 'different'}: {words}")


class _ParameterDifference(NamedTuple):
    num_parameters: int
    num_changed: int
    largest: float


def _learners(directory: RunDirectory) -> dict[int, RunDirectory]:
    """Returns the folders that hold a run's checkpoints, by their first seeds.

    That is its own, or one for each seed that has begun, if seeds have processes of their own.
    """
    config = directory.config
    if not config.has_seed_processes:
        return {config.seed: directory}
    begun = [seed.seed for seed in seeds_of(directory.folder, config) if (seed.folder / "config.json").exists()]
    return {seed: open_seed(directory, seed) for seed in begun}


def _has_own_network(directory: RunDirectory) -> bool:
    with Checkpoints(directory.checkpoints_path, run_id=directory.run_id) as checkpoints:
        newest = checkpoints.latest()
        if newest is None:
            return False
        try:
            return bool(read_metadata(checkpoints, newest, directory.config)["has_own_network"])
        except CheckpointError:  # a damaged checkpoint is no reason not to train anew
            return False


def _difference_of_parameters(before: RunDirectory, after: RunDirectory) -> _ParameterDifference | None:
    """Returns how parameters differ at the last checkpoint that both runs have; None if that can't be said."""
    with (
        Checkpoints(before.checkpoints_path, run_id=before.run_id) as first,
        Checkpoints(after.checkpoints_path, run_id=after.run_id) as second,
    ):
        at = max({*first.all()} & {*second.all()}, default=None)
        if at is None:
            return None
        old, new = (named_leaves(each.restore_item("learner", env_steps=at)["params"]) for each in (first, second))
    kinds = [{path: (leaf.shape, leaf.dtype) for path, leaf in each.items()} for each in (old, new)]
    if kinds[0] != kinds[1]:
        return None
    changed, largest = 0, 0.0
    for path, leaf in old.items():
        differs = _bytes_of(leaf) != _bytes_of(new[path])
        changed += int(differs.any(axis=1).sum())
        gaps = np.abs(np.asarray(leaf, np.float64) - np.asarray(new[path], np.float64))
        largest = max(largest, float(np.nanmax(gaps, initial=0.0)))
    return _ParameterDifference(sum(leaf.size for leaf in old.values()), changed, largest)


def _bytes_of(numbers: np.ndarray) -> np.ndarray:
    """Returns the bytes of each number, `[numbers, bytes]` uint8, by which NaNs are compared too."""
    return np.ascontiguousarray(numbers).reshape(-1, 1).view(np.uint8)


def _shown(mean: Any) -> str:
    return f"{mean:.1f}" if isinstance(mean, int | float) else "unknown"
