"""The folder of a run: what it was asked to do, what it did, and what it learned.

runs/<name>/
  config.json      the run's id, and the TrainConfig that it was created with; it never changes
  metrics.jsonl    one line per progress record
  events.out.*     the same for TensorBoard: `tensorboard --logdir runs` compares runs
  checkpoints/     the newest few, named by their environment steps, and best/ with the learner of the best evaluation
  summary.json     the outcome, always replaced as a whole
  environment.json versions, devices and command of each start
  report.html      what happened, as one page for a browser
  videos/          what `qfleet watch` has written, and the run itself if asked to
  exports/         policies that `qfleet export` has written
  peers/           what the processes of an all-reduce run have printed
  seeds/           the runs of single seeds, where each has a process of its own
  .lock            held by the process that trains the run
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import secrets
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.encoding import SCHEMA_VERSION, decode, encode
from qfleet.config.values import to_plain
from qfleet.runtime.process import check_can_open_files
from qfleet.runtime.run_files import read_json, shortened, temporary_of

SEEDS_FOLDER = "seeds"
"""Name of the folder, in the folder of a run, with the runs of its seeds, where each has a process of its own."""


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The folder of one run. Make it with `create` or find it with `open`."""

    path: Path
    """The folder as the user named it, for messages. It may be relative to `base`."""
    config: TrainConfig
    """The config that the run was created with. Checkpoints and summary tell how far it got or was extended."""
    version: str
    """Version of the qfleet that created it."""
    run_id: str = ""
    """Random name of the run, which its checkpoints bear too. Runs of older versions have none."""
    schema_version: int = SCHEMA_VERSION
    """Version in which its config.json is written. `config` is always of the newest."""
    is_new: bool = dataclasses.field(default=False, compare=False)
    """Whether this object has made the folder."""
    base: Path = dataclasses.field(default_factory=Path.cwd, compare=False)
    """The current folder when `path` was given. An environment may change it later, in the middle of a run."""

    @classmethod
    def create(
        cls, path: str | os.PathLike[str] | None, config: TrainConfig, base: Path | None = None
    ) -> "RunDirectory":
        """Makes the folder of a new run and writes its config.json.

        Args:
          path: the folder, which must be absent or empty. None makes `runs/<env>-<preset>-<seed>-<time>`, with a number
            added if that is taken.
          config: content of config.json.
          base: what a relative path begins from. By default the current folder.

        Raises:
          ConfigError: if the folder already holds something, can't be made, or has a name that isn't UTF-8. Also if
            this process may open too few files.
        """
        check_can_open_files()
        run_id = secrets.token_hex(8)
        content = {
            "qfleet_version": qfleet_version(),
            "schema_version": SCHEMA_VERSION,
            "run_id": run_id,
            "config": encode(config),
        }
        try:
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        except ValueError as error:
            raise ConfigError(f"every number in a run's configuration must be finite, got {config}") from error
        name, is_new = Path("runs") if path is None else Path(path), False
        base = base or Path.cwd()
        folder = base / name
        _check_name(folder)
        try:
            if path is None:
                name, is_new = _make_default_folder(config, base), True
                folder = base / name
            else:
                is_new = not folder.exists()
                folder.mkdir(parents=True, exist_ok=True)
            is_claimed = not any(folder.iterdir()) and _write_if_absent(folder / "config.json", text)
        except OSError as error:
            if is_new:  # the disk is full, for example; the next try must not find the folder taken
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise ConfigError(
                f"a run directory must be a folder that can be made, got {name} ({error.strerror}); "
                f"give another --run-dir"
            ) from error
        if not is_claimed:
            is_run = os.path.lexists(folder / "config.json")
            resume = f", or continue that run with `qfleet resume {shlex.quote(str(name))}`" if is_run else ""
            raise ConfigError(
                f"a new run needs an absent or empty folder, got {name}, which holds files already; "
                f"give another --run-dir{resume}"
            )
        return cls(name, config, qfleet_version(), run_id, is_new=is_new, base=base)

    def discard(self) -> None:
        """Deletes what `create` made, if nothing has come of the run. Call it without holding the lock."""
        if {path.name for path in self.folder.iterdir()} <= {"config.json", ".lock"}:
            for name in ("config.json", ".lock"):
                (self.folder / name).unlink(missing_ok=True)
            if self.is_new:
                self.folder.rmdir()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "RunDirectory":
        """Finds an existing run and reads its config.json.

        Raises:
          ConfigError: if the folder isn't a run, or its config.json is broken, foreign or from another version.
        """
        path = Path(to_plain(str, path, "run_dir"))
        _check_name(path)
        file = path / "config.json"
        try:
            content = read_json(file, _MAX_CONFIG_BYTES)
        except OSError as error:
            raise ConfigError(
                f"a run is a folder with a config.json, got {path} ({error.strerror}: {file}); "
                f"give the folder that `qfleet train` named"
            ) from error
        except ValueError as error:  # a file of another kind, or a path that no file can have
            raise ConfigError(f"a run's config.json must be JSON, got {file} ({error}); {_RESTORE}") from error
        if isinstance(content, dict) and "policy" in content:
            raise ConfigError(
                f"a run is wanted here, got {path}, an exported policy; `qfleet eval`, `watch` and `export`, and "
                f"qfleet.load, take one"
            )
        needed = {"qfleet_version", "config"}
        if not isinstance(content, dict) or not needed <= set(content) <= {"schema_version", "run_id", *needed}:
            raise ConfigError(f"a run's config.json must hold qfleet_version and config, {file} doesn't; {_RESTORE}")
        version, schema_version = shortened(str(content["qfleet_version"]), 50), content.get("schema_version", 1)
        try:
            config = decode(content["config"], schema_version)
            if len(config.env) > MAX_NAME_LENGTH:
                raise ConfigError(f"config.env must be a name of at most {MAX_NAME_LENGTH} characters")
            run_id = content.get("run_id", "") if schema_version < _FIRST_WITH_ID else content.get("run_id")
            if not isinstance(run_id, str) or not re.fullmatch("[0-9a-f]{16}|", run_id):
                raise ConfigError(f"run_id must be 16 hexadecimal digits, got {run_id!r}")
        except Exception as error:  # numbers that nobody thought of may raise anything
            raise ConfigError(
                f"a run's config.json must hold a valid configuration, got {file}: {shortened(str(error))}; it was "
                f"written by qfleet {version}, and this is {qfleet_version()}: use that version, or {_RESTORE}"
            ) from error
        return cls(path, config, version, run_id, schema_version)

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def folder(self) -> Path:
        """The folder as an absolute path, for everything that is read or written there."""
        return self.base / self.path

    def as_named(self, file: Path) -> Path:
        """Returns the path of a file in the folder as the user would name it."""
        return self.path / file.relative_to(self.folder)

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        return self.folder / "summary.json"

    @property
    def environment_path(self) -> Path:
        return self.folder / "environment.json"

    @property
    def report_path(self) -> Path:
        return self.folder / "report.html"

    @property
    def checkpoints_path(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def videos_path(self) -> Path:
        """Folder of the videos. Where each seed has a run of its own, the first one is filmed."""
        return (
            self.folder / SEEDS_FOLDER / str(self.config.seed) if self.config.has_seed_processes else self.folder
        ) / "videos"

    def lock(self) -> filelock.BaseFileLock:
        """Returns a lock that no other process can take while this one holds it. It is freed when the process ends.

        Raises:
          ConfigError: if another process is training this run, there can be no lock, or this process may open too few
            files.
        """
        return lock_folder(
            self.folder,
            f"a run is trained by one process at a time, and another one is training {self.path}; wait for it, or "
            f"stop it: it leaves a checkpoint",
        )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces summary.json as a whole. A reader finds either the old one or the new one, never half of one."""
        write_atomically(self.summary_path, strict_json(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """Returns the summary that `write_summary` wrote last, or None if there is none yet.

        Raises:
          ConfigError: if summary.json isn't a JSON object.
        """
        try:
            summary = read_json(self.summary_path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"summary.json must be JSON, got {self.summary_path} ({error}); delete it and `qfleet resume` the run"
            ) from error
        if not isinstance(summary, dict):
            raise ConfigError(f"summary.json must be a JSON object, got {self.summary_path}; delete it")
        return summary


def lock_folder(folder: Path, rule: str) -> filelock.BaseFileLock:
    """Returns a lock of a folder that no other process can take while this one holds it.

    Args:
      folder: the folder, in which the lock is the file `.lock`.
      rule: message of the error if another process holds it.

    Raises:
      ConfigError: if another process holds it, there can be no lock, or this process may open too few files.
    """
    check_can_open_files()
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ConfigError(rule) from error
    except OSError as error:  # a folder that can't be written to, or something else of that name
        raise ConfigError(
            f"a run's folder must be writable, and its lock a regular file, got {lock.lock_file} "
            f"({error.strerror}); fix the permissions, or move it away"
        ) from error
    return lock


def strict_json(value: Any, indent: int | None = None) -> str:
    """Returns `value` as JSON that any parser reads.

    NumPy and JAX scalars become numbers, their arrays become lists, and NaN and infinities become null.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


_MAX_CONFIG_BYTES = 2**20

MAX_NAME_LENGTH = 500
"""Largest length of an environment's name in a config.json."""

_FIRST_WITH_ID = 3
"""Schema version from which on config.json holds the run's id."""

_RESTORE = "restore the file from a copy, or train again into another folder"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _check_name(folder: Path) -> None:
    """Checks that checkpoints can be written to a folder. TensorStore, which writes them, takes no name but UTF-8."""
    name = str(folder.absolute())
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the path of a run's folder must be UTF-8, got {name!a}; give another folder, or set PYTHONUTF8=1 if "
            f"Python takes the names of files for another encoding"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a file as a whole, in place of the one of that name if there is one.

    Raises:
      OSError: if it can't be written.
    """
    temporary = temporary_of(path)
    try:
        _write(temporary, text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_if_absent(path: Path, text: str) -> bool:
    """Writes a file as a whole and returns True, or returns False if there is one already. Only one process gets True.

    A reader finds either no file or all of it.
    """
    temporary = temporary_of(path)
    try:
        _write(temporary, text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: exclusive all the same, but a reader may find half of it
            try:
                _write(path, text)
            except FileExistsError:
                return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _write(path: Path, text: str) -> None:
    """Writes a new file, which is on disk when this returns."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _make_default_folder(config: TrainConfig, base: Path) -> Path:
    """Makes a folder in `runs`, below `base`, that no other process gets, whatever the time at which they ask."""
    name = f"{config.env}-{config.preset}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    first = Path("runs") / re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")
    (base / first.parent).mkdir(exist_ok=True)
    path, number = first, 1
    while True:
        try:
            (base / path).mkdir()
            return path
        except FileExistsError:
            number += 1
            path = first.with_name(f"{first.name}-{number}")


def qfleet_version() -> str:
    """Returns the version of qfleet that is installed."""
    try:
        return importlib.metadata.version("qfleet")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree that was never installed
