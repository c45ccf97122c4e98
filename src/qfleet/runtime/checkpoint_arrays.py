"""Reads and writes the arrays of a checkpoint through Orbax.

Importing Orbax takes 0.3 s, so that waits for the first checkpoint.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config import ConfigError
from qfleet.runtime import checkpoint_files as files
from qfleet.runtime.checkpoint_index import check_stored
from qfleet.runtime.checkpoint_trees import TreePath, is_jax, is_key, nest, sharding_of
from qfleet.runtime.run_files import shortened
from qfleet.runtime.workarounds.orbax_messages import keep_orbax_quiet


@functools.cache
def import_orbax() -> Any:
    """Returns the module `orbax.checkpoint`, which is imported by the first call."""
    import orbax.checkpoint

    keep_orbax_quiet()
    return orbax.checkpoint


def make_writer(index: Callable[[], dict[str, Any]]) -> Any:
    """Returns an `AsyncCheckpointer` of Orbax that writes an index and checksums, too.

    A single process makes the folders of a checkpoint before `save` returns. Otherwise Orbax makes them in the
    background and tells by signals when they are there, and it mixes up the signals of runs in several threads.
    """
    ocp = import_orbax()
    options = ocp.options.AsyncOptions(create_directories_asynchronously=jax.process_count() > 1)
    return ocp.AsyncCheckpointer(handler_classes()[0](index, options), async_options=options)


@functools.cache
def handler_classes() -> tuple[Any, Any]:
    """Returns Orbax's handler of several items, extended to write index and checksums, and its arguments' class."""
    import orbax.checkpoint as ocp

    class Handler(ocp.CompositeCheckpointHandler):
        def __init__(self, index: Callable[[], dict[str, Any]], options: Any) -> None:
            super().__init__(composite_options=ocp.CompositeOptions(async_options=options))
            self._index = index

        def finalize(self, directory: Any) -> None:
            """Runs when all items are written, just before the folder gets its final name."""
            super().finalize(directory)
            files.write_index(Path(os.fspath(directory)), self._index())

    @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
    class Arguments(ocp.args.Composite):
        pass

    return Handler, Arguments


def read_arrays(
    path: Path, recorded: Mapping[TreePath, Mapping[str, Any]], wanted: Mapping[TreePath, Any]
) -> list[Any]:
    """Returns the arrays of an item, in the order of `wanted`.

    An array is placed as its leaf in `wanted` is. Where that leaf is None, it comes back as a NumPy array.
    """
    if not recorded:
        return []
    ocp = import_orbax()

    def argument(name: TreePath, leaf: Any) -> Any:
        if not is_jax(leaf):
            return ocp.RestoreArgs(restore_type=np.ndarray)
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf  # as `to_stored` wrote it
        return ocp.ArrayRestoreArgs(sharding=sharding_of(leaf), global_shape=data.shape, dtype=data.dtype)

    arguments = {name: argument(name, leaf) for name, leaf in wanted.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        check_stored(reader.metadata(path).item_metadata.tree, recorded)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=nest(arguments.items())))
    leaves = []
    for name in wanted:
        value = functools.reduce(lambda node, key: node[key], name, tree)
        if "key_impl" in recorded[name]:
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=recorded[name]["key_impl"])
        leaves.append(value)
    return leaves


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever Orbax raises meanwhile into a CheckpointError, because it may be asked to read anything."""
    jax.devices()  # if there are none, the checkpoint isn't to blame
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise files.CheckpointError(
            f"a checkpoint must hold arrays that Orbax can read, got {path} ({type(error).__name__}: "
            f"{shortened(str(error))}); restore it from a copy, or give an older one with --checkpoint"
        ) from error
