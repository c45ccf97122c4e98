"""The files of a checkpoint, apart from the arrays that Orbax writes: their names, the index and the checksums.

Everything in a run's folder may be damaged, or may not be qfleet's. A folder counts as a checkpoint if its name is a
number and it holds an index or checksums. It is deleted only if it is proven to be this run's: its checksums hold for
its index, the index names the run, and there is nothing else in it.
"""

import json
import logging
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qfleet.config import ConfigError
from qfleet.runtime.checkpoint_index import FORMAT, check_index, declared_bytes
from qfleet.runtime.run_files import UnusableFile, open_regular, read_json, shortened, sync_folder

logger = logging.getLogger("qfleet")

INDEX = "index.json"
CHECKSUMS = "checksums.json"

BEST = "best"
"""Name of the folder, among a run's checkpoints, of the one with the best evaluation; and what stands for that one."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")

_UNFINISHED = re.compile(r"[0-9]+\.(orbax-checkpoint-tmp|deleted-tmp)")
"""Folders that a process left when it was killed: it was writing one, or deleting one."""

_ORBAX_OR_HIDDEN = re.compile(r"[_.]|commit_success\.txt$")
"""Files that Orbax, or a file manager, adds to the folder of a checkpoint."""

_SPARE_BYTES = 64 * 2**20
"""Size that the files of an item may have beyond a multiple of its arrays' size."""


class CheckpointError(ConfigError):
    """A checkpoint is absent or damaged, or was not written by qfleet. The message says which, why and what to do."""


class NotSaved(CheckpointError):
    """A checkpoint was saved without the item that is asked for."""


class _Damaged(Exception):
    """A file of a checkpoint isn't as qfleet wrote it. The message says which one."""


def list_checkpoints(directory: Path) -> list[int]:
    """Returns the environment steps of every complete checkpoint, ascending. Their contents are not verified."""
    try:
        return sorted(int(path.name) for path in directory.iterdir() if _NUMBER.fullmatch(path.name) and _claims(path))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(
            f"a run's checkpoints must be readable, got {directory} ({error.strerror}); fix the permissions there"
        ) from error


def check_exists(directory: Path, env_steps: int | None) -> int:
    """Returns the environment steps of a complete checkpoint: the given ones, or those of the newest for None.

    Raises:
      CheckpointError: if there is no such checkpoint.
    """
    existing = list_checkpoints(directory)
    steps = max(existing, default=None) if env_steps is None else env_steps
    if steps is None or steps not in existing:
        wanted = "a checkpoint" if steps is None else f"checkpoint {steps}"
        raise CheckpointError(
            f"{wanted} must be in {directory}, which holds {', '.join(map(str, existing)) or 'none'}; "
            f"{'choose one of these' if existing else 'train first, or give another run'}"
        )
    return steps


def read_index(path: Path, items: Iterable[str], run_id: str | None) -> dict[str, Any]:
    """Returns the index of a checkpoint, after verifying the index and the files of `items`.

    Raises:
      CheckpointError: if one of these files is missing or has changed, the format is another, an item was not saved, or
        the checkpoint is another run's.
    """
    items = list(items)
    try:
        index = _verified_index(path, items)
    except _Damaged as damage:
        raise CheckpointError(
            f"a checkpoint must be as qfleet wrote it, got {path}: {damage}; {_remedy(path)}"
        ) from damage
    owner = index.get("run_id", "")
    if run_id is not None and owner != run_id:
        here, there = (f"run {name}" if name else "a run of an older version, without id" for name in (run_id, owner))
        raise CheckpointError(
            f"a checkpoint must be of the run in whose folder it is, got one of {there} in {path}, and this is {here}; "
            f"move it back into the folder of its own run, or delete it"
        )
    for item in items:
        if item not in index["items"]:
            raise NotSaved(
                f"checkpoint {path} holds {', '.join(index['items'])}, not {item}; it was saved without "
                f"(checkpoint_replay=False does that to the replay)"
            )
    return index


def find_damage(path: Path, items: Iterable[str] | None = None) -> str:
    """Returns what is wrong with the files of a checkpoint, or ''.

    Args:
      path: folder of the checkpoint.
      items: items whose files are read, in addition to the index. None reads every file.
    """
    try:
        _verified_index(path, items)
    except (_Damaged, CheckpointError) as damage:
        return str(damage)
    return ""


def _remedy(path: Path) -> str:
    if path.parent.name == BEST:
        return "leave --checkpoint out for the newest one, or restore the folder from a copy"
    older = (step for step in reversed(list_checkpoints(path.parent)) if step < int(path.name))
    intact = next((step for step in older if not find_damage(path.with_name(str(step)))), None)
    if intact is None:
        return "no older one is intact, so train again or restore the folder from a copy"
    return f"continue from the newest intact one before it: --checkpoint {intact}"


def _verified_index(path: Path, items: Iterable[str] | None) -> dict[str, Any]:
    """Returns the index of a checkpoint, after verifying it and the files of `items`; None verifies those of all items.

    Raises:
      _Damaged: if one of these files is missing, has changed, or holds something that qfleet never writes.
      CheckpointError: if the format is another.
    """
    sums = _read_checksums(path)
    _verify(path, INDEX, sums[INDEX])
    try:
        index: dict[str, Any] = read_json(path / INDEX)
    except (OSError, ValueError) as error:
        raise _Damaged(f"{INDEX} is not what qfleet writes ({error})") from error
    if isinstance(index, dict) and index.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"checkpoint format must be {FORMAT}, got {shortened(str(index['format']), 50)} in {path}; "
            f"use the qfleet that wrote it"
        )
    if problem := check_index(index, int(path.name)):
        raise _Damaged(f"{INDEX} is not what qfleet writes: {problem}")
    for item in index["items"] if items is None else items:
        if item in index["items"]:
            _verify_item(path, item, sums, declared_bytes(index["items"][item]))
    return index


def _read_checksums(path: Path) -> dict[str, tuple[int, int]]:
    try:
        sums = read_json(path / CHECKSUMS)["files"]
        expected = {name: (int(size), int(crc)) for name, (size, crc) in sums.items()}
    except OSError as error:
        raise _Damaged(f"{CHECKSUMS} can't be read ({error.strerror}), so it was cut off or isn't qfleet's") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        why = f" ({error})" if isinstance(error, UnusableFile) else ""
        raise _Damaged(f"{CHECKSUMS} is not what qfleet writes{why}") from error
    if INDEX not in expected:
        raise _Damaged(f"{CHECKSUMS} lists no {INDEX}")
    return expected


def _verify_item(path: Path, item: str, sums: Mapping[str, tuple[int, int]], array_bytes: int) -> None:
    """Verifies that an item's folder holds the files that the checksums list, and nothing else that may be read."""
    listed = {name: written for name, written in sums.items() if name.split("/")[0] == item}
    if sum(size for size, _ in listed.values()) > 4 * array_bytes + _SPARE_BYTES:
        raise _Damaged(f"{item} has files that are far larger than its arrays")
    if (path / item).is_symlink():
        raise _Damaged(f"{item} must be a folder, got a symbolic link")
    for name, written in listed.items():
        _verify(path, name, written)
    for folder, folders, files in os.walk(path / item):
        for name in (*folders, *files):
            found = Path(folder, name)
            relative = found.relative_to(path).as_posix()
            is_folder = name in folders and not found.is_symlink()
            is_hidden_file = name.startswith(".") and stat.S_ISREG(found.lstat().st_mode)  # of a file manager
            if not is_folder and relative not in listed and not is_hidden_file:
                raise _Damaged(f"{shortened(relative, 200)} is not one of its files")


def _verify(path: Path, name: str, written: tuple[int, int]) -> None:
    shown = shortened(name, 200)
    if name.startswith("/") or ".." in name.split("/"):
        raise _Damaged(f"{CHECKSUMS} lists {shown}, which is outside of it")
    try:
        with open_regular(path / name) as file:
            size = os.fstat(file.fileno()).st_size
        found = size_and_crc32(path / name) if size == written[0] else (size, 0)
    except FileNotFoundError as error:
        raise _Damaged(f"{shown} is missing") from error
    except (OSError, ValueError) as error:
        raise _Damaged(f"{shown} can't be read ({error})") from error
    if found != written:
        sizes = f"{found[0]} bytes instead of {written[0]}" if found[0] != written[0] else "other bytes inside"
        raise _Damaged(f"{shown} has changed since it was written ({sizes})")


def write_index(path: Path, index: Mapping[str, Any]) -> None:
    """Writes the index into the folder of a checkpoint whose items are complete, and the checksums of all files."""
    _write(path / INDEX, json.dumps(index, allow_nan=False))
    files = [path / INDEX]
    for item in index["items"]:
        files += sorted(file for file in (path / item).rglob("*") if file.is_file())
    sums = {file.relative_to(path).as_posix(): size_and_crc32(file) for file in files}
    _write(path / CHECKSUMS, json.dumps({"files": sums}, indent=1))
    sync_folder(path)


def _write(path: Path, text: str) -> None:
    """Writes a file that is on disk when this returns."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def size_and_crc32(file: Path) -> tuple[int, int]:
    """Returns the size of a regular file in bytes, and its CRC-32."""
    size = crc = 0
    with open_regular(file) as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def make_directory(directory: Path) -> None:
    """Makes the folder of checkpoints, and removes what a process left there when it was killed."""
    directory.mkdir(parents=True, exist_ok=True)
    if directory.is_symlink():
        return
    for path in directory.iterdir():
        if _UNFINISHED.fullmatch(path.name) and _is_folder(path):
            delete(path)


def delete_all_but_newest(directory: Path, keep: int, run_id: str | None) -> None:
    """Deletes all of a run's own checkpoints but the `keep` newest. Logs a warning about what can't be deleted.

    Nothing is deleted through a symbolic link, or unless it is proven to be this run's.
    """
    steps = list_checkpoints(directory)
    if len(steps) <= keep or directory.is_symlink():
        return
    own = [path for path in (directory / str(step) for step in steps) if _is_of_run(path, run_id)]
    _delete_atomically(own[:-keep])


def delete_all_but(directory: Path, env_steps: int, run_id: str | None) -> None:
    """Deletes all checkpoints of a run except one. What isn't proven to be the run's stays."""
    if not (directory.is_symlink() or directory.parent.is_symlink()):
        others = (directory / str(step) for step in list_checkpoints(directory) if step != env_steps)
        _delete_atomically(path for path in others if _is_of_run(path, run_id))


def _delete_atomically(paths: Iterable[Path]) -> None:
    for path in paths:
        doomed = path.with_name(f"{path.name}.deleted-tmp")
        try:
            path.rename(doomed)  # first, because a half-deleted checkpoint must not look like a complete one
        except OSError as error:
            logger.warning("checkpoint %s can't be deleted (%s); fix the permissions, or delete it", path, error)
        else:
            delete(doomed)


def set_aside_after(directory: Path, env_steps: int, run_id: str | None) -> None:
    """Renames checkpoints newer than `env_steps` to `<env_steps>.set-aside`, replacing the run's own of this name."""
    for newer in list_checkpoints(directory):
        if newer > env_steps:
            set_aside(directory / str(newer), run_id)


def set_aside(path: Path, run_id: str | None) -> Path:
    """Renames one checkpoint to `<env_steps>.set-aside`, replacing the run's own of this name; returns its new path."""
    aside, number = path.with_name(f"{path.name}.set-aside"), 1
    if _is_of_run(aside, run_id) and not path.parent.is_symlink():
        delete(aside)
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.set-aside-{number}")
    path.rename(aside)
    return aside


def copy(source: Path, target: Path) -> None:
    """Copies a checkpoint to a name that is free, beside others or beside itself. It is there whole or not at all.

    Raises:
      CheckpointError: if it can't be copied.
    """
    temporary = target.with_name(f"{target.name}.orbax-checkpoint-tmp")  # a name that `make_directory` cleans up
    try:
        shutil.copytree(source, temporary)
        temporary.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"there must be room for a copy of a checkpoint, got {error.strerror or error} in {target.parent}; free "
            f"space or fix permissions there"
        ) from error


def delete(path: Path) -> None:
    """Deletes a checkpoint. If that fails, it is a warning."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("the rest of a checkpoint, %s, can't be deleted (%s); fix the permissions there", path, error)


def _claims(path: Path) -> bool:
    """Returns whether a folder looks like a checkpoint, whole or damaged."""
    return _is_folder(path) and any(os.path.lexists(path / name) for name in (INDEX, CHECKSUMS))


def _is_of_run(path: Path, run_id: str | None) -> bool:
    """Returns whether a folder is proven to be a checkpoint of this run, and nothing else: its intact index says so."""
    try:
        if not _is_folder(path):
            return False
        _verify(path, INDEX, _read_checksums(path)[INDEX])
        index = read_json(path / INDEX)
        steps = int(path.name.removesuffix(".set-aside"))
        if check_index(index, steps) or index["format"] != FORMAT or index.get("run_id", "") != run_id:
            return False
        own = {INDEX, CHECKSUMS, *index["items"]}
        return all(name in own or _ORBAX_OR_HIDDEN.match(name) for name in os.listdir(path))
    except (_Damaged, OSError, ValueError):
        return False


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode) if os.path.lexists(path) else False
