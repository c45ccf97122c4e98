"""Checkpoints of a run: Orbax writes them, in the background and atomically; qfleet says what is in them.

    checkpoints/<env_steps>/
      <item>/          one Orbax tree of arrays per item: learner, replay ...
      index.json       the run's own data, and path, shape and dtype of every array
      checksums.json   size and CRC-32 of each file above

Trees are stored as nested dictionaries with the names that their fields, keys and indices have, so that reading
one needs no class of ours, and never unpickles. The folder gets its final name once all of it is written.
"""

import functools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config import ConfigError

PyTree = Any

_FORMAT = 2
_INDEX = "index.json"
_CHECKSUMS = "checksums.json"
_TreePath = tuple[str, ...]


class CheckpointError(ConfigError):
    """A checkpoint that isn't there, is damaged, or is no checkpoint: which, why, and what to do."""


class Checkpoints:
    """The checkpoints of one run, named by their environment steps; the newest few are kept.

    Use it as a context manager, or `close` it: the last save may still be under way.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3, *, is_keeper: bool = True) -> None:
        """Neither reads nor writes anything yet.

        Args:
          directory: holds one folder per checkpoint; made by the first save.
          keep: number of newest checkpoints that a save leaves.
          is_keeper: whether to delete and rename: of several processes that save together, one does.
        """
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._writer: Any = None  # an orbax AsyncCheckpointer
        self._contents: dict[str, Any] = {}  # index.json of the save under way
        self._is_keeper = is_keeper

    def all(self) -> list[int]:
        """Returns the environment steps of every complete checkpoint, ascending. Contents are not verified."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """Returns the environment steps of the newest complete checkpoint, or None."""
        return max(self.all(), default=None)

    def save(self, env_steps: int, state: Mapping[str, PyTree], metadata: Mapping[str, Any]) -> None:
        """Copies `state` and writes it in the background; its arrays may be donated as soon as this returns.

        Waits for the save before it. Nothing happens if there is a checkpoint at `env_steps` already: within a
        run, the state there is the same.

        Args:
          env_steps: environment steps done so far, over all lanes.
          state: trees of arrays by item name. Tuples, dicts, lists, None, typed random keys: all fine.
          metadata: what JSON can hold.

        Raises:
          OSError: if this or the previous save couldn't be written.
          ValueError: if `metadata` isn't strict JSON.
        """
        self.wait()
        if env_steps in self.all():
            return
        leaves = {item: _named_leaves(tree) for item, tree in state.items()}
        self._contents = {
            "format": _FORMAT,
            "env_steps": env_steps,
            "metadata": dict(metadata),
            "items": {
                item: [{"path": path, **_describe(leaf)} for path, leaf in named.items()]
                for item, named in leaves.items()
            },
        }
        json.dumps(self._contents, allow_nan=False)  # say so now, not in the background
        trees = {item: _nest((path, _stored(leaf)) for path, leaf in named.items()) for item, named in leaves.items()}
        try:
            if self._writer is None:
                if self._is_keeper:
                    self._prepare_directory()
                self._writer = _orbax().AsyncCheckpointer(_handler_classes()[0](lambda: self._contents))
            arguments = {item: _orbax().args.PyTreeSave(tree) for item, tree in trees.items() if tree}
            self._writer.save(self._directory / str(env_steps), args=_handler_classes()[1](**arguments))
        except Exception as error:
            raise self._write_error(error) from error

    def set_aside_after(self, env_steps: int) -> None:
        """Renames checkpoints newer than `env_steps`, to `<env_steps>.set-aside`: they belong to a future given up."""
        if not self._is_keeper:
            return
        for newer in self.all():
            if newer > env_steps:
                path = self._directory / str(newer)
                aside = path.with_name(f"{newer}.set-aside")
                if aside.exists():
                    shutil.rmtree(aside)
                path.rename(aside)

    def wait(self) -> None:
        """Returns once the save under way, if any, is complete and older checkpoints are gone.

        Raises:
          OSError: if it couldn't be written.
        """
        if self._writer is None:
            return
        try:
            self._writer.wait_until_finished()
            if self._is_keeper:
                self._delete_old()
        except Exception as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Waits, then frees the writer's threads. Idempotent."""
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
        """Returns the state and the metadata of a checkpoint, its files verified.

        Args:
          env_steps: which one; None is the newest.
          like: what to restore, by item name: trees whose leaves (arrays or `jax.ShapeDtypeStruct`) give structure,
            shape, dtype and sharding. Items that it doesn't name are neither read nor verified.

        Raises:
          CheckpointError: if there is no such checkpoint, or a file is missing or changed.
          ConfigError: if it holds other arrays than `like`; the message names the first.
        """
        path, index = self._open(env_steps, like)
        for item, tree in like.items():
            self._check_same(path, item, _recorded(index, item), _named_leaves(tree))
        return {item: _restore_like(path / item, index, item, tree) for item, tree in like.items()}, index["metadata"]

    def restore_item(self, item: str, like: PyTree = None, env_steps: int | None = None) -> PyTree:
        """Returns one item of a checkpoint, its files verified.

        Args:
          item: its name, such as `"learner"`.
          like: as in `restore`. None: nested dictionaries of NumPy arrays (and typed random keys) by name, without
            what holds no array; an item that is a single array is `{"value": array}`.
          env_steps: which checkpoint; None is the newest.

        Raises: as `restore` does.
        """
        if like is not None:
            return self.restore(env_steps, {item: like})[0][item]
        path, index = self._open(env_steps, [item])
        recorded = _recorded(index, item)
        return _nest(zip(recorded, _read(path / item, recorded, dict.fromkeys(recorded)), strict=True))

    def read_metadata(self, env_steps: int | None = None) -> dict[str, Any]:
        """Returns what was given to `save` as metadata; reads no arrays.

        Raises:
          CheckpointError: if there is no such checkpoint, or its index is missing or changed.
        """
        metadata: dict[str, Any] = self._open(env_steps, [])[1]["metadata"]
        return metadata

    def _open(self, env_steps: int | None, items: Iterable[str]) -> tuple[Path, dict[str, Any]]:
        """Returns the folder and the index of a checkpoint whose files for `items` are as they were written."""
        self.wait()
        steps = self.latest() if env_steps is None else env_steps
        if steps is None or steps not in self.all():
            there = ", ".join(map(str, self.all()))
            wanted = "a checkpoint" if steps is None else f"checkpoint {steps}"
            raise CheckpointError(
                f"{wanted} must be in {self._directory}, which holds {there or 'none'}; "
                f"{'choose one of these' if there else 'train first, or give another run'}"
            )
        path = self._directory / str(steps)
        items = list(items)
        damage = _find_damage(path, items)
        if damage:
            intact = [step for step in self.all() if step < steps and not _find_damage(path.with_name(str(step)))]
            remedy = (
                f"continue from the newest intact one before it: --checkpoint {intact[-1]}"
                if intact
                else "no older one is intact, so train again or restore the folder from a copy"
            )
            raise CheckpointError(f"a checkpoint must be as qfleet wrote it, got {path}: {damage}; {remedy}")
        index = json.loads((path / _INDEX).read_bytes())
        if index["format"] != _FORMAT:
            raise CheckpointError(
                f"checkpoint format must be {_FORMAT}, got {index['format']} in {path}; use the qfleet that wrote it"
            )
        for item in items:
            if item not in index["items"]:
                raise CheckpointError(
                    f"checkpoint {path} holds {', '.join(index['items'])}, not {item}; it was saved without "
                    f"(checkpoint_replay=False does that to the replay)"
                )
        return path, index

    @staticmethod
    def _check_same(
        path: Path, item: str, recorded: Mapping[_TreePath, Mapping[str, Any]], wanted: Mapping[_TreePath, Any]
    ) -> None:
        for name in [*wanted, *recorded]:
            here = _spell(_describe(wanted[name])) if name in wanted else "nothing"
            there = _spell(recorded[name]) if name in recorded else "nothing"
            if here != there:
                raise ConfigError(
                    f"a checkpoint must hold the arrays that this configuration builds, but "
                    f"{item}/{'/'.join(name)} is {there} in {path} and {here} here; "
                    f"use the configuration that the run was trained with"
                )

    def _prepare_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.orbax-checkpoint-tmp", "*.deleted-tmp"):  # of a process that was killed at it
            for path in self._directory.glob(pattern):
                shutil.rmtree(path)

    def _delete_old(self) -> None:
        for env_steps in self.all()[: -self._keep]:
            path = self._directory / str(env_steps)
            doomed = path.with_name(f"{path.name}.deleted-tmp")
            path.rename(doomed)  # at once: half a checkpoint must not look like one
            shutil.rmtree(doomed)

    def _write_error(self, error: Exception) -> OSError:
        reason = " ".join(str(error).split())
        return OSError(
            f"a checkpoint must be writable, got {type(error).__name__} in {self._directory}: {reason}; free space or "
            f"fix permissions there, then resume from checkpoint {self.latest()}"
        )


# --- Orbax, imported when the first checkpoint is written or read: 0.3 s ---


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint

    # Orbax logs each save through absl, tracebacks of errors that it also raises included.
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    return orbax.checkpoint


@functools.cache
def _handler_classes() -> tuple[Any, Any]:
    """Returns Orbax's handler of several items, extended by index and checksums, and its arguments' class."""
    import orbax.checkpoint as ocp

    class Handler(ocp.CompositeCheckpointHandler):
        def __init__(self, contents: Callable[[], dict[str, Any]]) -> None:
            super().__init__()
            self._contents = contents

        def finalize(self, directory: Any) -> None:
            """Runs when all items are written, just before the folder gets its final name."""
            super().finalize(directory)
            contents, folder = self._contents(), Path(os.fspath(directory))
            (folder / _INDEX).write_text(json.dumps(contents, allow_nan=False), encoding="utf-8")
            files = [folder / _INDEX]
            for item in contents["items"]:
                files += sorted(path for path in (folder / item).rglob("*") if path.is_file())
            sums = {path.relative_to(folder).as_posix(): _size_and_crc32(path) for path in files}
            (folder / _CHECKSUMS).write_text(json.dumps({"files": sums}, indent=1), encoding="utf-8")

    @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
    class Arguments(ocp.args.Composite):
        pass

    return Handler, Arguments


def _read(path: Path, recorded: Mapping[_TreePath, Mapping[str, Any]], wanted: Mapping[_TreePath, Any]) -> list[Any]:
    """Returns the arrays of an item in order of `wanted`: placed as its leaves are, or as NumPy arrays for None."""
    if not recorded:
        return []
    ocp = _orbax()

    def argument(name: _TreePath, leaf: Any) -> Any:
        if not _is_jax(leaf):
            return ocp.RestoreArgs(restore_type=np.ndarray)
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf  # what _stored made of it
        return ocp.ArrayRestoreArgs(sharding=_sharding(leaf), global_shape=data.shape, dtype=data.dtype)

    arguments = {name: argument(name, leaf) for name, leaf in wanted.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=_nest(arguments.items())))
    leaves = []
    for name in wanted:
        value = functools.reduce(lambda node, key: node[key], name, tree)
        if "key_impl" in recorded[name]:
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=recorded[name]["key_impl"])
        leaves.append(value)
    return leaves


def _restore_like(path: Path, index: Mapping[str, Any], item: str, like: PyTree) -> PyTree:
    leaves = _read(path, _recorded(index, item), _named_leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# --- Trees as names and leaves ---


def _named_leaves(tree: PyTree) -> dict[_TreePath, Any]:
    # A tree that is a single array has the empty path, but Orbax wants dictionaries.
    return {tuple(map(_key_name, path)) or ("value",): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _key_name(entry: Any) -> str:
    """Returns what a tree calls one of its children: a field's name, a dictionary's key, an index."""
    return jax.tree_util.keystr((entry,), simple=True)


def _nest(leaves: Iterable[tuple[_TreePath, Any]]) -> Any:
    """Returns nested dictionaries with these leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _recorded(index: Mapping[str, Any], item: str) -> dict[_TreePath, dict[str, Any]]:
    return {tuple(leaf["path"]): leaf for leaf in index["items"][item]}


def _is_jax(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def _is_key(leaf: Any) -> bool:
    return _is_jax(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _describe(leaf: Any) -> dict[str, Any]:
    """Returns what index.json says of an array."""
    if not _is_jax(leaf):
        leaf = np.asarray(leaf)
    description = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _is_key(leaf) and isinstance(leaf, jax.Array):
        description["key_impl"] = str(jax.random.key_impl(leaf))
    return description


def _spell(description: Mapping[str, Any]) -> str:
    return f"{description['dtype']}{description['shape']}"


def _stored(leaf: Any) -> Any:
    """Returns the plain array that Orbax writes for `leaf`, safe from what happens to `leaf` afterwards."""
    if not isinstance(leaf, jax.Array):
        is_constant = isinstance(leaf, np.ndarray) and not leaf.flags.writeable
        return leaf if is_constant else np.array(leaf)
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    # Orbax copies from an accelerator before it returns. On CPU it writes from the array's own memory, and JAX then
    # quietly copies what it was told to update in place: copy here, once, instead.
    is_on_cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    return jnp.copy(leaf) if is_on_cpu else leaf


# --- Files ---


def _find_damage(path: Path, items: Iterable[str] | None = None) -> str:
    """Returns what is wrong with the files of a checkpoint, or ''. Only the index's and these items' are read."""
    try:
        sums = json.loads((path / _CHECKSUMS).read_bytes())["files"]
        expected = {name: (int(size), int(crc)) for name, (size, crc) in sums.items()}
    except OSError as error:
        return f"{_CHECKSUMS} can't be read ({error.strerror}), so it was cut off or isn't qfleet's"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{_CHECKSUMS} is not what qfleet writes"
    if _INDEX not in expected:
        return f"{_CHECKSUMS} lists no {_INDEX}"
    folders = None if items is None else {_INDEX, *items}
    for name, written in expected.items():
        if folders is None or name.split("/")[0] in folders:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            found = _size_and_crc32(file)
            if found != written:
                sizes = f"{found[0]} bytes instead of {written[0]}" if found[0] != written[0] else "other bytes inside"
                return f"{name} has changed since it was written ({sizes})"
    return ""


def _size_and_crc32(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc
