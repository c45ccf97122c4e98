"""The folder of a sweep.

runs/<name>/
  sweep.json       what varies, and the config of what doesn't
  journal.log      what the study has proposed and heard, a line for each step; nothing in it is ever changed
  trials/<number>/ the run of each trial
  best.json        the best settings, as a file for `qfleet train --config`
  sweep.html       what was found, as one page for a browser
  .lock            held by the process that goes on with the sweep
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.checks import MAX_PROCESSES, check, check_count, check_ray_address, check_resources
from qfleet.config.encoding import SCHEMA_VERSION, decode, encode
from qfleet.config.own_parts import own_parts
from qfleet.config.values import to_plain
from qfleet.envs.factory import FACTORY
from qfleet.runtime.run_directory import lock_folder, write_atomically
from qfleet.runtime.run_files import read_json, shortened

_FILE, _JOURNAL, _TRIALS = "sweep.json", "journal.log", "trials"

_MAX_BYTES = 2**20

_MAY_CHANGE = ("num_trials", "trials_at_once", "trials_on_ray", "trial_resources")
"""Fields of a plan that a command may change when it goes on with a sweep: they don't change what is learned."""


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep does."""

    config: TrainConfig
    """The config of each trial, but for the settings that vary. Its `run_dir` is None."""
    params: Mapping[str, str]
    """How each setting varies, as `texts_of` returns it."""
    num_trials: int
    """Number of trials at which the sweep ends."""
    prune: bool
    """Whether a trial that does worse than the others is stopped early."""
    request: str
    """Digest of what the user asked for, by which the same command finds its sweep again."""
    trials_at_once: int | None = None
    """Number of trials in a batch, or most trials at once on Ray; None leaves it to what varies, or to the cluster."""
    trials_on_ray: str | None = None
    """Address of the Ray cluster on which each trial has a process of its own; None if this process trains them."""
    trial_resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Ray resources that each of these processes takes; empty for the default."""

    def __post_init__(self) -> None:
        check_count("trials", self.num_trials)
        if self.trials_at_once is not None:
            check_count("trials_at_once", self.trials_at_once, maximum=MAX_PROCESSES // self.config.num_seeds)
        if self.config.stop_return is not None:
            raise ConfigError(
                f"stop_return must be left out of a sweep, because it couldn't tell trials apart that reach it, got "
                f"{self.config.stop_return:g}; leave it out, and give the env_steps after which to compare"
            )
        if self.trials_on_ray is not None:
            _check_on_ray(self.config, self.trials_on_ray, self.trial_resources)
        elif self.trial_resources:
            raise ConfigError(
                f"trial_resources must come with trials_on_ray, got {dict(self.trial_resources)} without it; give "
                f"trials_on_ray auto, local or HOST:PORT too"
            )


def _check_on_ray(config: TrainConfig, address: str, resources: Mapping[str, float]) -> None:
    check_ray_address(address, "trials_on_ray")
    check_resources("trial_resources", resources)
    is_any = not resources or any(resources.values())
    check(is_any, "trial_resources", "more than nothing, or left out for the default", dict(resources))
    if config.topology.runs_in != "this process":
        raise ConfigError(
            f"with trials_on_ray, a learner must be in one process, got topology {config.topology.name}; give the "
            f"topology fused or overlapped, or leave trials_on_ray out: then each trial has its topology's processes"
        )
    if config.env.startswith(FACTORY):
        raise ConfigError(
            f"with trials_on_ray, an environment must have a name that other processes can import, got {config.env}, "
            f"a function of this program; register it with qfleet.register_env in a module, and give MODULE:NAME"
        )


def digest_of(*parts: Any) -> str:
    """Returns 16 hexadecimal digits that stand for these values, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def default_folder(env: str, request: str) -> Path:
    """Returns the folder of a sweep for which the user names none. The same request has the same folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{env}-sweep-{request[:8]}").lstrip(".-")
    return Path("runs") / name


@dataclasses.dataclass(frozen=True)
class SweepDirectory:
    """The folder of one sweep, locked by this process until `release` is called."""

    path: Path
    """The folder as the user named it, for messages."""
    folder: Path
    """The same as an absolute path, because an environment may change the current folder."""
    plan: SweepPlan
    is_new: bool
    _lock: filelock.BaseFileLock | None
    """None in a process that trains a trial for the one that holds the lock."""

    @classmethod
    def create_or_open(cls, path: Path, plan: SweepPlan) -> "SweepDirectory":
        """Locks the folder of a sweep that this plan describes, and makes it if there is none.

        A sweep that has begun keeps the config that it began with. Only the numbers of trials, and where they are
        trained, may be others.

        Raises:
          ConfigError: if the folder holds something else, or another process goes on with the sweep.
        """
        folder = path.absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(path, folder)
        except OSError as error:
            raise ConfigError(
                f"a sweep's folder must be one that can be made, got {path} ({error.strerror}); give another --run-dir"
            ) from error
        try:
            is_new = not (folder / _FILE).exists()
            if is_new and any(not each.name.startswith(".") for each in folder.iterdir()):
                raise ConfigError(
                    f"a new sweep needs an absent or empty folder, got {path}, which holds files already; give another "
                    f"--run-dir"
                )
            if not is_new:
                begun = _read_plan(path, folder)
                # The user has named modules on the command line, and not those that the folder may name instead.
                if begun.request != plan.request or _modules_of(begun.config) != _modules_of(plan.config):
                    raise ConfigError(
                        f"a sweep goes on with the settings that it began with, got others for {path}; repeat its "
                        f"command, give `qfleet sweep --resume {shlex.quote(str(path))}`, or another --run-dir"
                    )
                _check_journal(path, folder)
                plan = dataclasses.replace(begun, **{name: getattr(plan, name) for name in _MAY_CHANGE})
            _write_plan(folder, plan)
        except BaseException:
            lock.release()
            raise
        return cls(path, folder, plan, is_new, lock)

    @classmethod
    def open(cls, path: Path, **changes: Any) -> "SweepDirectory":
        """Locks the folder of a sweep that has begun.

        Args:
          path: the folder.
          **changes: other values of fields of its plan: `num_trials`, `trials_at_once`, `trials_on_ray` and
            `trial_resources`. None leaves a field as it is.

        Raises:
          ConfigError: if the folder isn't a sweep's, or another process goes on with it.
        """
        folder = path.absolute()
        plan = _read_plan(path, folder)
        lock = _lock(path, folder)
        try:
            _check_journal(path, folder)
            given = {name: value for name, value in changes.items() if value is not None}
            if given:
                plan = dataclasses.replace(plan, **given)
                _write_plan(folder, plan)
        except BaseException:
            lock.release()
            raise
        return cls(path, folder, plan, False, lock)

    def release(self) -> None:
        """Gives up the lock."""
        if self._lock is not None:
            self._lock.release()

    def without_lock(self) -> "SweepDirectory":
        """Returns what a process needs that trains a trial for this one, which keeps the lock."""
        return dataclasses.replace(self, _lock=None)

    def trial_folder(self, number: int) -> Path:
        """Returns the absolute path of the run of a trial."""
        return self.folder / _TRIALS / f"{number:04}"

    def named(self, file: Path) -> Path:
        """Returns the path of a file in the folder as the user would name it."""
        return self.path / file.relative_to(self.folder)

    @property
    def journal_path(self) -> Path:
        return self.folder / _JOURNAL

    @property
    def best_path(self) -> Path:
        return self.folder / "best.json"

    @property
    def page_path(self) -> Path:
        return self.folder / "sweep.html"

    def discard(self) -> None:
        """Deletes a sweep that was refused before any trial began."""
        self.journal_path.unlink(missing_ok=True)
        (self.folder / _FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder / _TRIALS, ignore_errors=True)
        self.release()
        (self.folder / ".lock").unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _modules_of(config: TrainConfig) -> tuple[Any, ...]:
    """Returns what of a config may name modules to import."""
    return config.env, own_parts(config.agent)


def _lock(path: Path, folder: Path) -> filelock.BaseFileLock:
    return lock_folder(
        folder, f"a sweep is run by one process at a time, and another one is running {path}; wait for it, or stop it"
    )


def _check_journal(path: Path, folder: Path) -> None:
    """Checks that a sweep that has trials has the journal that says how they went.

    Raises:
      ConfigError: if it doesn't.
    """
    journal, trials = folder / _JOURNAL, folder / _TRIALS
    has_trials = trials.is_dir() and any(trials.iterdir())
    if has_trials and not (journal.exists() and journal.stat().st_size):
        raise ConfigError(
            f"a sweep that has trials must have its {_JOURNAL}, got {path}, where it is missing or empty; restore it "
            f"from a copy, or sweep into another folder"
        )


def _write_plan(folder: Path, plan: SweepPlan) -> None:
    content = {
        "qfleet_version": importlib.metadata.version("qfleet"),
        "schema_version": SCHEMA_VERSION,
        "config": encode(plan.config),
        "params": dict(plan.params),
        "num_trials": plan.num_trials,
        "trials_at_once": plan.trials_at_once,
        "trials_on_ray": plan.trials_on_ray,
        "trial_resources": dict(plan.trial_resources),
        "prune": plan.prune,
        "request": plan.request,
    }
    write_atomically(folder / _FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _read_plan(path: Path, folder: Path) -> SweepPlan:
    file = folder / _FILE
    rule = f"a sweep is a folder with a {_FILE}, got {path}"
    try:
        content = read_json(file, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{rule} ({error.strerror}); give the folder that `qfleet sweep` named") from error
    except ValueError as error:
        raise ConfigError(f"{rule}, which must be JSON ({error}); restore it, or sweep into another folder") from error
    try:
        return SweepPlan(
            config=decode(content["config"], content["schema_version"]),
            params=to_plain(Mapping[str, str], content["params"], "params"),
            num_trials=to_plain(int, content["num_trials"], "num_trials"),
            prune=to_plain(bool, content["prune"], "prune"),
            request=to_plain(str, content["request"], "request"),
            trials_at_once=to_plain(int | None, content.get("trials_at_once"), "trials_at_once"),
            trials_on_ray=to_plain(str | None, content.get("trials_on_ray"), "trials_on_ray"),
            trial_resources=to_plain(Mapping[str, float], content.get("trial_resources", {}), "trial_resources"),
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"a sweep's {_FILE} must hold a valid plan, got {path}: {shortened(str(error))}; use the version of qfleet "
            f"that wrote it, or sweep into another folder"
        ) from error
