"""Parameters as a safetensors file: names, shapes and plain numbers, which no reader runs."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qfleet.config import ConfigError
from qfleet.core.keys import key_shape
from qfleet.core.types import Network, Params
from qfleet.runtime.checkpoint_trees import named_leaves
from qfleet.runtime.run_files import open_regular, shortened

_MAX_HEADER_BYTES = 2**24


def write_weights(params: Params, path: Path) -> None:
    """Writes parameters to a file; their names are the paths in their tree, joined by dots.

    Raises:
      ConfigError: if two of them would get one name, or a type isn't one of safetensors.
    """
    from safetensors.numpy import save

    leaves = named_leaves(params)
    arrays = {".".join(names): np.ascontiguousarray(leaf).reshape(np.shape(leaf)) for names, leaf in leaves.items()}
    if len(arrays) < len(leaves):
        raise ConfigError(
            f"parameters must have names that differ once they are joined by dots, got {len(leaves)} parameters with "
            f"{len(arrays)} names; leave dots out of the names of your network"
        )
    try:
        content = save(arrays, metadata={"format": "np"})
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"parameters must be of types that safetensors has, got {shortened(str(error))}; let your network keep "
            f"float32"
        ) from error
    path.write_bytes(content)  # `save_file` would let nobody but its owner read the file


def read_weights(network: Network, path: Path) -> Params:
    """Returns a network's parameters from a file that `write_weights` wrote.

    No more is read than the network's parameters take.

    Raises:
      ConfigError: if the file is missing or holds something else.
    """
    from safetensors.numpy import load

    wanted = jax.eval_shape(network.init, key_shape())
    leaves = named_leaves(wanted)
    most = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values()) + _MAX_HEADER_BYTES
    try:
        with open_regular(path) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it must hold at most {most:,} bytes, got more")
        arrays = load(content)
    except Exception as error:  # the library has errors of its own, for anything that a file may hold
        raise ConfigError(
            f"an exported policy must have its parameters in a safetensors file, got {path} "
            f"({shortened(str(error))}); restore it from a copy, or export the run again"
        ) from error
    found = [_fitting(arrays, ".".join(names), leaf, path) for names, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(wanted), found)


def _fitting(arrays: dict[str, np.ndarray], name: str, wanted: Any, path: Path) -> np.ndarray:
    array = arrays.get(name)
    if array is None or (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
        got = "none" if array is None else f"{array.dtype}{list(array.shape)}"
        raise ConfigError(
            f"an exported policy must hold the parameters of the network that its config.json describes: {name} should "
            f"be {wanted.dtype}{list(wanted.shape)}, and {path} has {got}; restore the folder from a copy, or give the "
            f"`network` that the run was trained with"
        )
    return array
