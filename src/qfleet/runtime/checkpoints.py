"""Checkpoints of a run: qfleet decides what is in them, Orbax writes them atomically in the background.

    checkpoints/<env_steps>/
      <item>/          one Orbax tree of arrays per item: learner, replay ...
      index.json       the run's id and its own data, and path, shape and dtype of every array
      checksums.json   size and CRC-32 of each file above

A tree is stored as nested dictionaries, with the names of its fields, keys and indices. So reading one needs none of
qfleet's classes and never unpickles. The folder gets its final name once everything in it is written.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from qfleet.config import ConfigError
from qfleet.runtime import checkpoint_files as files
from qfleet.runtime.checkpoint_arrays import handler_classes, import_orbax, make_writer, read_arrays, reading
from qfleet.runtime.checkpoint_index import FORMAT, declared_bytes
from qfleet.runtime.checkpoint_trees import (
    PyTree,
    TreePath,
    describe,
    named_leaves,
    nest,
    recorded_leaves,
    spell,
    to_stored,
)
from qfleet.runtime.process import available_memory_bytes
from qfleet.runtime.run_files import sync_folder

_BEGINNING = threading.Lock()
"""Held while a save begins. Orbax counts saves in one variable for all threads, and reads it later in the same save."""


class CheckpointWriteError(OSError):
    """A checkpoint couldn't be written. The message says where, why and what to do."""


class Checkpoints:
    """The checkpoints of one run, named by their environment steps. Only the newest few are kept.

    Use it as a context manager or `close` it, because the last save may still be under way.
    """

    def __init__(
        self, directory: str | os.PathLike[str], keep: int = 3, *, run_id: str | None = "", is_keeper: bool = True
    ) -> None:
        """Neither reads nor writes anything yet.

        Args:
          directory: holds one folder per checkpoint. The first save makes it.
          keep: number of newest checkpoints that a save leaves.
          run_id: the run's id. Every checkpoint bears it, and those of other runs are neither read nor deleted.
            None reads those of any run, and saves none.
          is_keeper: whether this process deletes and renames checkpoints. If several processes save together, exactly
            one of them should.
        """
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._run_id = run_id
        self._writer: Any = None  # an orbax AsyncCheckpointer
        self._index: dict[str, Any] = {}  # index.json of the save under way
        self._is_keeper = is_keeper
        self._replaced: Path | None = None
        """The checkpoint that the save under way replaces, under its other name."""
        self._is_unsynced = False
        """Whether a save has begun whose folder isn't known to be on disk."""

    @property
    def directory(self) -> Path:
        """Folder that holds one folder per checkpoint."""
        return self._directory

    def all(self) -> list[int]:
        """Returns the environment steps of every complete checkpoint, ascending. Contents are not verified."""
        return files.list_checkpoints(self._directory)

    def latest(self) -> int | None:
        """Returns the environment steps of the newest complete checkpoint, or None."""
        return max(self.all(), default=None)

    def save(self, env_steps: int, state: Mapping[str, PyTree], metadata: Mapping[str, Any]) -> None:
        """Copies `state` and writes it in the background. Its arrays may be donated as soon as this returns.

        Waits for the previous save first. Within a run, a checkpoint that is already at `env_steps` holds the same
        state. It is replaced only if its metadata differs, because an evaluation was made up for after a resume.

        Args:
          env_steps: environment steps done so far, over all lanes.
          state: trees of arrays by item name. They may hold tuples, dicts, lists, None and typed random keys.
          metadata: any values that strict JSON can hold.

        Raises:
          CheckpointWriteError: if this or the previous save couldn't be written.
          ValueError: if `metadata` isn't strict JSON.
        """
        assert self._run_id is not None
        self.wait()
        path = self._directory / str(env_steps)
        if env_steps in self.all():
            stored = files.read_index(path, [], self._run_id)  # raises if it is another run's
            if stored["metadata"] == json.loads(json.dumps(metadata)) or jax.process_count() > 1:
                return  # several processes could not agree on when to move it away
            self._replaced = files.set_aside(path, self._run_id)
        if os.path.lexists(path):
            raise self._write_error(FileExistsError(f"{path} is in the way and no checkpoint; move it away"))
        leaves = {item: named_leaves(tree) for item, tree in state.items()}
        self._index = {
            "format": FORMAT,
            "env_steps": env_steps,
            "run_id": self._run_id,
            "metadata": dict(metadata),
            "items": {
                item: [{"path": path, **describe(leaf)} for path, leaf in named.items()]
                for item, named in leaves.items()
            },
        }
        json.dumps(self._index, allow_nan=False)  # raises here, rather than later in the background
        trees = {item: nest((path, to_stored(leaf)) for path, leaf in named.items()) for item, named in leaves.items()}
        try:
            if self._writer is None:
                if self._is_keeper:
                    files.make_directory(self._directory)
                self._writer = make_writer(lambda: self._index)
            arguments = {item: import_orbax().args.PyTreeSave(tree) for item, tree in trees.items() if tree}
            self._is_unsynced = True
            with _BEGINNING:
                self._writer.save(path, args=handler_classes()[1](**arguments))
        except Exception as error:
            self._put_back_replaced(path)
            raise self._write_error(error) from error

    def set_aside_after(self, env_steps: int) -> None:
        """Renames checkpoints newer than `env_steps` to `<env_steps>.set-aside`.

        A run that goes back to `env_steps` will write new ones, and the old ones must not be mistaken for them.
        """
        if self._is_keeper:
            files.set_aside_after(self._directory, env_steps, self._run_id)

    def wait(self) -> None:
        """Waits until the save under way, if any, is complete, then deletes checkpoints that are no longer kept.

        Raises:
          CheckpointWriteError: if the save couldn't be written.
        """
        if self._writer is None:
            return
        try:
            self._writer.wait_until_finished()
            if self._is_keeper and self._is_unsynced:
                sync_folder(self._directory)  # of the name that the checkpoint got last
                if self._replaced:
                    files.delete(self._replaced)
                    self._replaced = None
                self._delete_old()
            self._is_unsynced = False
        except Exception as error:
            self._put_back_replaced(self._directory / str(self._index["env_steps"]))
            raise self._write_error(error) from error

    def _delete_old(self) -> None:
        files.delete_all_but_newest(self._directory, self._keep, self._run_id)

    def _put_back_replaced(self, path: Path) -> None:
        """Gives the checkpoint that was to be replaced its name back, if the new one isn't there."""
        if self._replaced and not os.path.lexists(path):
            with contextlib.suppress(OSError):  # the error that is under way matters more
                self._replaced.rename(path)
                self._replaced = None

    def close(self) -> None:
        """Waits for the save under way, then ends the writer's threads. Idempotent."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def restore(self, env_steps: int | None, like: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Returns the state and the metadata of a checkpoint, after verifying its files.

        Args:
          env_steps: which checkpoint; None is the newest.
          like: trees to restore, by item name. Their leaves (arrays or `jax.ShapeDtypeStruct`) give structure, shape,
            dtype and sharding. Items that it doesn't name are neither read nor verified.

        Raises:
          CheckpointError: if there is no such checkpoint, or a file is missing or has changed.
          ConfigError: if the checkpoint holds other arrays than `like`. The message names the first one.
        """
        path, index = self._open(env_steps, like)
        for item, tree in like.items():
            _check_same(path, item, recorded_leaves(index, item), named_leaves(tree))
        with reading(path):
            state = {item: _restore_like(path / item, index, item, tree) for item, tree in like.items()}
        return state, index["metadata"]

    def restore_item(self, item: str, like: PyTree = None, env_steps: int | None = None) -> PyTree:
        """Returns one item of a checkpoint, after verifying its files.

        Args:
          item: its name, such as `"learner"`.
          like: tree to restore, as in `restore`. Without it, the item comes back as nested dictionaries of NumPy arrays
            and typed random keys, by name. Branches without arrays are absent, and an item that is a single array
            becomes `{"value": array}`.
          env_steps: which checkpoint; None is the newest.

        Raises:
          CheckpointError: as `restore` does.
          ConfigError: as `restore` does.
        """
        if like is not None:
            return self.restore(env_steps, {item: like})[0][item]
        path, index = self._open(env_steps, [item])
        _check_fits(path, item, declared_bytes(index["items"][item]))
        recorded = recorded_leaves(index, item)
        with reading(path):
            return nest(zip(recorded, read_arrays(path / item, recorded, dict.fromkeys(recorded)), strict=True))

    def read_metadata(self, env_steps: int | None = None) -> dict[str, Any]:
        """Returns the metadata that was given to `save`. Reads no arrays.

        Raises:
          CheckpointError: if there is no such checkpoint, or its index is missing or has changed.
        """
        metadata: dict[str, Any] = self._open(env_steps, [])[1]["metadata"]
        return metadata

    def items(self, env_steps: int | None = None) -> list[str]:
        """Returns the names of the items that a checkpoint holds, by default the newest. Reads no arrays.

        Raises:
          CheckpointError: if there is no such checkpoint, or its index is missing or has changed.
        """
        return list(self._open(env_steps, [])[1]["items"])

    def _open(self, env_steps: int | None, items: Iterable[str]) -> tuple[Path, dict[str, Any]]:
        """Returns the folder and the index of a checkpoint, after verifying its files for `items`."""
        self.wait()
        env_steps = self.latest() if env_steps is None else env_steps
        path = self._directory / str(files.check_exists(self._directory, env_steps))
        return path, files.read_index(path, items, self._run_id)

    def _write_error(self, error: Exception) -> "CheckpointWriteError":
        if self._is_keeper:
            with contextlib.suppress(OSError):  # the error that is under way matters more
                files.make_directory(self._directory)  # which removes the unfinished one, because it takes up room
        reason = " ".join(str(error).split())
        newest = self.latest()
        there_is = "there is none yet" if newest is None else f"the newest one is {newest}"
        return CheckpointWriteError(
            f"a checkpoint must be writable, got {type(error).__name__} in {self._directory}: {reason}; free space or "
            f"fix permissions there, then `qfleet resume` the run ({there_is})"
        )


def _check_fits(path: Path, item: str, size: int) -> None:
    available = available_memory_bytes()
    if available is not None and size > available:
        raise files.CheckpointError(
            f"a checkpoint must fit into memory to be read, got {size:,} bytes of {item} in {path} and {available:,} "
            f"bytes free; use a machine with more memory"
        )


def _check_same(
    path: Path, item: str, recorded: Mapping[TreePath, Mapping[str, Any]], wanted: Mapping[TreePath, Any]
) -> None:
    """Raises ConfigError, which names the first difference, unless an item holds the arrays that are wanted."""
    for name in [*wanted, *recorded]:
        here = spell(describe(wanted[name])) if name in wanted else "nothing"
        there = spell(recorded[name]) if name in recorded else "nothing"
        if here != there:
            raise ConfigError(
                f"a checkpoint must hold the arrays that this configuration builds, but "
                f"{item}/{'/'.join(name)} is {there} in {path} and {here} here; "
                f"use the configuration that the run was trained with"
            )


def _restore_like(path: Path, index: Mapping[str, Any], item: str, like: PyTree) -> PyTree:
    leaves = read_arrays(path, recorded_leaves(index, item), named_leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
