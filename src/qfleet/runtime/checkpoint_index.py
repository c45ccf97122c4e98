"""Checks of a checkpoint's index, which may have been damaged or written by somebody else."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qfleet.runtime.run_files import shortened

FORMAT = 2
"""Version of the format of checkpoints that is written and read here."""

_ITEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_KEY = re.compile(r"key<\w{1,30}>")
_KEY_BYTES = 64
"""At least as much as the data of a random key takes."""


def check_index(index: Any, env_steps: int) -> str:
    """Returns what is wrong with the content of an index, or ''.

    Args:
      index: what was read from JSON.
      env_steps: environment steps that the checkpoint's folder is named after.
    """
    if not isinstance(index, dict):
        return "it is no object"
    if index.get("env_steps") != env_steps or type(index["env_steps"]) is not int:
        return f"its env_steps must be {env_steps}, got {shortened(repr(index.get('env_steps')), 50)}"
    if not isinstance(index.get("run_id", ""), str) or not re.fullmatch("[0-9a-f]{16}|", index.get("run_id", "")):
        return "its run_id must be 16 hexadecimal digits"
    for name in ("metadata", "items"):
        if not isinstance(index.get(name), dict):
            return f"its {name} must be an object"
    for item, arrays in index["items"].items():
        if not _ITEM.fullmatch(item) or not isinstance(arrays, list) or not all(map(_is_array, arrays)):
            return f"{shortened(item, 50)} must be an item with a list of arrays, each with path, shape and dtype"
        if not _are_leaves([tuple(array["path"]) for array in arrays]):
            return f"{item} must hold each array once, and none inside another"
    return ""


def declared_bytes(arrays: list[dict[str, Any]]) -> int:
    """Returns the size in bytes that the arrays of an item have in memory."""
    return sum(math.prod(array["shape"]) * _itemsize(array["dtype"]) for array in arrays)


def check_stored(stored: Any, recorded: Mapping[tuple[str, ...], Mapping[str, Any]]) -> None:
    """Raises ValueError unless the arrays that Orbax would read are as large as the index says, and no larger."""
    for name, entry in recorded.items():
        array = functools.reduce(lambda node, key: node[key], name, stored)
        shape, wanted = tuple(array.shape), tuple(entry["shape"])
        is_key_data = "key_impl" in entry and shape[:-1] == wanted and len(shape) > len(wanted) and shape[-1] <= 16
        chunk = array.storage.chunk_shape or shape
        if not (shape == wanted or is_key_data) or any(size > max(1, n) for size, n in zip(chunk, shape, strict=True)):
            raise ValueError(f"{'/'.join(name)} has shape {list(shape)} in chunks of {list(chunk)}")


def _is_array(array: Any) -> bool:
    if not isinstance(array, dict) or not isinstance(array.get("key_impl", ""), str):
        return False
    path, shape, dtype = array.get("path"), array.get("shape"), array.get("dtype")
    return (
        isinstance(path, list)
        and 0 < len(path) < 100
        and all(isinstance(name, str) for name in path)
        and isinstance(shape, list)
        and len(shape) < 32
        and all(type(size) is int and 0 <= size < 2**62 for size in shape)
        and isinstance(dtype, str)
        and _itemsize(dtype) > 0
    )


def _itemsize(dtype: str) -> int:
    """Returns the size of a number in bytes, 0 if there is no such type."""
    if _KEY.fullmatch(dtype):
        return _KEY_BYTES
    try:
        kind = np.dtype(dtype)
    except TypeError:
        return 0
    return kind.itemsize if str(kind) == dtype and not kind.hasobject else 0


def _are_leaves(paths: list[tuple[str, ...]]) -> bool:
    """Returns whether all paths differ and none leads through another one."""
    inner = {path[:length] for path in paths for length in range(1, len(path))}
    return len(set(paths)) == len(paths) and inner.isdisjoint(paths)
