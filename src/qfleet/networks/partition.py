"""Model parallelism: each parameter is divided along one of its axes over the devices of a mesh's model axis."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from qfleet.config import ConfigError
from qfleet.core.keys import key_shape
from qfleet.core.types import Network, Params

MODEL_AXIS = "model"


def partition_params(network: Network, size: int) -> Params:
    """Returns a `PartitionSpec` for each parameter, over `size` devices.

    A kernel, which has two axes or more, is divided along the longest axis that `size` divides, and of equally long
    ones along the last. A parameter with one axis is small, and every device has all of it. If a user's module
    partitions a parameter in Flax's own metadata, that is used instead.

    Raises:
      ConfigError: if a module's metadata names another axis of the mesh, or divides an axis that `size` doesn't divide.
    """
    shapes = jax.eval_shape(network.init, key_shape())
    if size == 1:
        return jax.tree.map(lambda leaf: PartitionSpec(), shapes)

    def spec(path: tuple, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        wanted = network.partition.get(tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path))
        if wanted is not None:
            _check(jax.tree_util.keystr(path), wanted, leaf.shape, size)
            return PartitionSpec(*wanted)
        axes = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if leaf.ndim < 2 or not axes:
            return PartitionSpec()
        longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return PartitionSpec(*(MODEL_AXIS if axis == longest else None for axis in range(leaf.ndim)))

    return jax.tree.map_with_path(spec, shapes)


def _check(name: str, wanted: tuple[str | None, ...], shape: tuple[int, ...], size: int) -> None:
    for axis, length in zip(wanted, shape, strict=False):
        if axis not in (None, MODEL_AXIS):
            raise ConfigError(
                f"a parameter may be partitioned over the mesh axis {MODEL_AXIS!r} only, got {wanted} for {name}; "
                f"rename the axis in the module's partitioning metadata"
            )
        if axis == MODEL_AXIS and length % size:
            raise ConfigError(
                f"a partitioned axis must divide over mesh.model, got {name} of shape {list(shape)}, partitioned as "
                f"{wanted}, over {size} devices; make it {-(-length // size) * size} long, or leave it whole"
            )


def partition_like(tree: Any, params: Params, specs: Params) -> Any:
    """Returns a `PartitionSpec` for each array of `tree`: that of the parameter whose path is the end of its own path.

    So an optimiser's moments are divided as their parameters are. Every device has all of an array that belongs to no
    parameter, or that has another shape.
    """
    known = {
        tuple(map(str, path)): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)),
            strict=True,
        )
    }

    def spec_of(path: tuple, leaf: Any) -> PartitionSpec:
        names = tuple(map(str, path))
        for start in range(len(names)):
            shape, spec = known.get(names[start:], (None, None))
            if shape == leaf.shape and spec is not None:
                return spec
        return PartitionSpec()

    return jax.tree.map_with_path(spec_of, tree)
